"""The network against the published figures and an independent plain version; stochastic depth;
checkpoints."""
import ast
import os
import shutil
import subprocess
import sys
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as network
from helpers import ROOT
from plain import PlainNet1D


def filled(keys_shapes, seed=0):
    """Weights by name, by the rule that the golden figures were made with."""
    state = {}
    for name, shape in keys_shapes:
        rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        state[name] = torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))
    return state


def is_batch_norm(key):
    return any(part.startswith("bn") or part == "first_bn" for part in key.split("."))


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """A file like the official one: BatchNorm keys, optimizer, and a NumPy scalar pickled under
    NumPy 1's names."""
    entries = [(k, tuple(s)) for k, s in golden["model_logits"]["keys"]]
    state = filled([e for e in entries if not is_batch_norm(e[0])])
    state |= {k: torch.zeros(s) for k, s in entries if is_batch_norm(k)}
    path = tmp_path_factory.mktemp("weights") / "12_lead_ECGFounder.pth"
    torch.save({"epoch": 1, "step": 7, "state_dict": state, "optimizer": {"state": {}},
                "scheduler": {}, "val_auroc": np.float64(0.9)}, path,
               _use_new_zipfile_serialization=False)  # without checksums
    content = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def founder(official):
    assert network.read_checkpoint(official)["val_auroc"] == 0.9
    model = network.ecgfounder(150).eval()
    network.load_pretrained(model, official, head=True)
    return model


def test_logits_and_features_equal_the_published_network(founder, golden):
    x = torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000)
    with torch.no_grad():
        logits, features = founder(x), founder.forward_features(x)
    for got, name in ((logits, "logits_first10"), (features, "features_first10")):
        np.testing.assert_allclose(got[0, :10], golden["model_logits"][name], atol=1e-5, rtol=0)


def test_keys_and_shapes_are_the_official_ones_without_batch_norm(founder, golden):
    keys = {k: tuple(s) for k, s in golden["model_logits"]["keys"]}
    unused = {k for k in keys if is_batch_norm(k)}
    assert len(unused) == 305 and network.unused_keys(founder) == unused
    used = {k: s for k, s in keys.items() if k not in unused}
    assert {k: tuple(v.shape) for k, v in founder.state_dict().items()} == used
    assert sum(p.numel() for p in founder.parameters()) == 30_752_646


@pytest.fixture(scope="module")
def plain(founder):
    net = PlainNet1D(150).eval()
    net.load_state_dict(founder.state_dict())
    return net


@pytest.mark.parametrize("samples", [999, 313, 100, 37, 33, 32])
def test_any_length_equals_the_plain_network(founder, plain, samples):
    x = torch.randn(2, 12, samples, generator=torch.Generator().manual_seed(samples))
    with torch.no_grad():
        torch.testing.assert_close(founder(x), plain(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 5000), (1, 12, 31), (1, 11, 5000)])
def test_wrong_inputs_are_named(founder, shape):
    with pytest.raises(ValueError, match="wanted"):
        founder(torch.zeros(shape))


@pytest.mark.parametrize("kernel", [13, 15, 16, 18])
def test_convolutions_of_any_kernel(kernel):
    """Output and gradients against PyTorch's own on an input padded by hand."""
    torch.manual_seed(0)
    conv = network.SameConv1d(4, 6, kernel, stride=2, groups=2).double()
    x = torch.randn(2, 4, 51, dtype=torch.double, requires_grad=True)
    inputs, pad = (x, conv.conv.weight, conv.conv.bias), 25 * 2 + kernel - 51
    padded = F.pad(x, (pad // 2, pad - pad // 2))
    got, want = conv(x), F.conv1d(padded, conv.conv.weight, conv.conv.bias, 2, groups=2)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*gradients)


def test_dropout_acts_on_the_pooled_features_alone():
    torch.manual_seed(0)
    model = network.ecgfounder(4, dropout=0.5).train()
    x = torch.randn(2, 12, 100)
    assert torch.equal(model.forward_features(x), model.forward_features(x))
    assert not torch.equal(model(x), model(x))
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.5]


@pytest.mark.parametrize("arguments", [{"drop_path": 1.0}, {"drop_path": -0.1}, {"dropout": 1.0},
                                       {"drop_path_mode": "cubic"}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="wanted"):
        network.ecgfounder(4, **arguments)


def bf16_error(function, x):
    """Relative error of `function` under bf16 autocast against float32."""
    with torch.autocast("cpu", enabled=False):
        exact = function(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = function(x).detach().float()
    return ((coarse - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("training", [True, False])
def test_every_convolution_is_right_in_bf16(training):
    """Some CPUs' bf16 kernels are wrong for some convolutions that pad by themselves
    (pytorch/pytorch#169688)."""
    torch.manual_seed(0)
    model, x = network.ecgfounder(5).train(training), torch.randn(1, 12, 512)
    shapes = {}
    for module in model.modules():
        if isinstance(module, network.SameConv1d):
            module.register_forward_hook(lambda m, inputs, out: shapes.update({m: inputs[0].shape}))
    with torch.set_grad_enabled(training):
        model(x)
        assert len(shapes) == 61
        for module, shape in list(shapes.items()):
            x = torch.randn(shape)
            assert bf16_error(module, x) < 0.02, module
            if training:
                gradient = lambda x: torch.autograd.grad(module(x).sum(), module.conv.weight)[0]
                assert bf16_error(gradient, x) < 0.02, module
        x = torch.randn(1, 12, 512)
        assert bf16_error(model.forward_features, x) < 0.02
        assert bf16_error(model, x) < 0.02


def test_no_convolution_pads_by_itself(monkeypatch):
    """In bf16 CPUs with AMX compute some of those wrongly (pytorch/pytorch#169688)."""
    conv1d = Mock(wraps=F.conv1d)
    monkeypatch.setattr(F, "conv1d", conv1d)
    network.ecgfounder(5)(torch.randn(2, 12, 640))
    padded = [c for c in conv1d.mock_calls if c.args[4:] or c.kwargs.get("padding")]
    assert conv1d.call_count == 61 and not padded


def test_the_head_is_exact_under_autocast():
    """Coarser logits tie, which moves the ranks of rare classes."""
    model, features = network.ecgfounder(5).eval(), torch.randn(4, 1024).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.head(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.dense(features.float()))
    assert model.double().head(features).dtype == torch.float64


def test_gradients_of_each_sample(tiny):
    """torch.func's grad under vmap against one backward a sample."""
    torch.manual_seed(0)
    model, x, y = network.ecgfounder(5).train(), torch.randn(3, 12, 320), torch.rand(3, 5).round()
    loss_of = F.binary_cross_entropy_with_logits
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return loss_of(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(3):
        loss_alone = loss_of(model(x[i:i + 1]), y[i:i + 1])
        alone = torch.autograd.grad(loss_alone, list(model.parameters()))
        for (name, got), want in zip(together.items(), alone):
            assert (got[i] - want).norm() <= 1e-4 * want.norm() + 1e-8, name


# --------------------------------------------------------------------------------- stochastic depth

def test_rates_of_both_modes():
    same, growing = (
        [m.drop_path for m in network.ecgfounder(4, drop_path=0.5, **mode).modules()
         if isinstance(m, network.Block)] for mode in ({}, {"drop_path_mode": "linear"}))
    assert same == [0.5] * 20
    np.testing.assert_allclose(growing, np.linspace(0, 0.5, 20))


@pytest.mark.parametrize("p, batch, kept", [(0.5, 8, 4), (0.5, 5, 3), (0.9, 4, 1), (0.99, 1, 1),
                                            (0.2, 10, 8), (0.01, 8, 8)])
def test_the_branch_is_computed_for_the_kept_samples_alone(p, batch, kept):
    block = network.Block(16, 32, 2, p, True).train()
    seen = []
    block.conv1.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    x = torch.randn(batch, 16, 64)
    out, shortcut = block(x), block.shortcut(x)
    assert seen == [kept] and block.kept(batch) == kept
    changed = (out != shortcut).flatten(1).any(1)
    assert changed.sum() == kept
    with torch.no_grad():  # what is added is the plain branch scaled by B / kept
        want = shortcut + block.branch(x) * batch / kept
    torch.testing.assert_close(out[changed], want[changed])


def test_blocks_draw_independently_and_anew():
    torch.manual_seed(0)
    a, b = (network.Block(16, 16, 1, 0.5, True).train() for _ in range(2))
    x = torch.randn(16, 16, 40)
    kept = [tuple((block(x) != x).flatten(1).any(1).tolist()) for block in (a, a, b, b)]
    assert len(set(kept)) == 4


def test_gradients_reach_the_kept_samples_and_every_parameter():
    torch.manual_seed(0)
    block = network.Block(16, 16, 1, 0.5, True).train()
    x = torch.randn(8, 16, 40, requires_grad=True)
    out = block(x)
    out.sum().backward()
    kept = (out != x).flatten(1).any(1)
    plain = x.detach().clone().requires_grad_()
    (plain + block.branch(plain) * 2.0 * kept[:, None, None]).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    assert (x.grad[~kept] == 1).all()  # a dropped branch: the shortcut's gradient alone
    model = network.ecgfounder(3, drop_path=0.9).train()
    model(torch.randn(2, 12, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("p, training", [(0.5, False), (0.0, True)])
def test_in_eval_and_at_zero_it_is_the_plain_network_bit_for_bit(founder, p, training):
    model, x = network.ecgfounder(150, drop_path=p).train(training), torch.randn(4, 12, 500)
    model.load_state_dict(founder.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), founder(x))


# -------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_a_bare_state_dict_and_a_file_without_a_head_load(tiny, tmp_path, bare, with_head):
    """And a scalar of this NumPy."""
    founder = network.ecgfounder(150)
    state = {k: v for k, v in founder.state_dict().items() if with_head or "dense" not in k}
    whole = {"state_dict": state, "val_auroc": np.float64(0.5)}
    torch.save(state if bare else whole, tmp_path / "w.pth")
    assert bare or network.read_checkpoint(tmp_path / "w.pth")["val_auroc"] == 0.5
    model = network.ecgfounder(7)
    head = model.dense.weight.clone()
    network.load_pretrained(model, tmp_path / "w.pth")
    assert torch.equal(model.dense.weight, head)
    said = network.verify(tmp_path / "w.pth")[0]
    assert ("150 classes" if with_head else "no head") in said
    for key, value in model.state_dict().items():
        assert "dense" in key or torch.equal(value, founder.state_dict()[key]), key


# ----------------------------------------------------------------------------------------- the tool

def test_verify_compares_the_logits_of_the_release(official, monkeypatch, capsys, fails, golden):
    monkeypatch.setattr(network, "OFFICIAL_SHA256", network.sha256(official))
    # The stand-in has other weights.
    fails(network.main, ["--weights", official], "not the published ones")
    monkeypatch.setattr(network, "OFFICIAL_LOGITS", tuple(golden["model_logits"]["logits_first10"]))
    network.main(["--weights", str(official)])
    out = capsys.readouterr().out
    for words in ("204 tensors", "305 unused", "12 leads, 150 classes", "the known 12-lead",
                  "logits equal the published ones"):
        assert words in out


def test_download_checks_the_hash(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    official = tmp_path / "release"
    official.write_bytes(b"weights")
    url = official.as_uri()
    fails(network.main, ["--download", "--url", url], "not the known release")
    assert not any((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(network, "OFFICIAL_SHA256", network.sha256(official))
    monkeypatch.setattr(network, "verify", lambda path: [f"verified {path}"])
    network.main(["--download", "--url", url])
    assert "verified checkpoints/12_lead_ECGFounder.pth" in capsys.readouterr().out
    assert network.sha256(network.OFFICIAL) == network.sha256(official)
    network.main(["--download", "--url", "file:///nowhere"])  # there already: nothing is fetched


@pytest.mark.parametrize("name, wanted", [
    ("model", set()), ("data", set()), ("evaluate", {"data", "model"}),
    ("post_train", {"data", "model", "evaluate"})])
def test_each_script_imports_those_below_it_alone(name, wanted):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
              for alias in node.names}
    assert {path.stem for path in ROOT.glob("*.py")} & found == wanted


def test_copied_without_the_others_they_import(tmp_path):
    for name in ("model", "data"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import data, model; assert model.__file__.startswith({str(tmp_path)!r})"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)
