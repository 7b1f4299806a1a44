"""The network against the published figures and an independent plain version; stochastic depth;
checkpoints."""
import copy
import hashlib
import re
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import model as network
from helpers import ROOT
from plain import PlainNet1D

BATCH_NORM = re.compile(r"(^|\.)(first_)?bn")


def filled(name, shape):
    """Weights that depend on their name, by the rule that the golden figures were made with."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """A file like the official one: BatchNorm keys, optimizer, and a NumPy scalar pickled under
    NumPy 1's names."""
    state = {key: torch.zeros(shape) if BATCH_NORM.search(key) else filled(key, shape)
             for key, shape in golden["model_logits"]["keys"]}
    path = tmp_path_factory.mktemp("weights") / "12_lead_ECGFounder.pth"
    torch.save({"epoch": 1, "state_dict": state, "optimizer": {}, "val_auroc": np.float64(0.9)},
               path, _use_new_zipfile_serialization=False)      # without checksums
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return path


@pytest.fixture(scope="module")
def founder(official):
    checkpoint, model = network.read_checkpoint(official), network.ecgfounder(150).eval()
    assert checkpoint["val_auroc"] == 0.9
    network.load_state(model, checkpoint["state_dict"], official)
    return model


def test_it_is_the_published_network(founder, golden):
    """Keys and shapes are the official ones without BatchNorm's, logits and features too."""
    published, x = golden["model_logits"], torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000)
    used = {key: tuple(shape) for key, shape in published["keys"] if not BATCH_NORM.search(key)}
    assert len(published["keys"]) - len(used) == 305
    assert {key: tuple(v.shape) for key, v in founder.state_dict().items()} == used
    assert sum(p.numel() for p in founder.parameters()) == 30_752_646
    with torch.no_grad():
        for got, name in ((founder(x), "logits"), (founder.forward_features(x), "features")):
            want = published[f"{name}_first10"]
            np.testing.assert_allclose(got[0, :10], want, atol=1e-5, rtol=0)


def test_any_length_equals_the_plain_network(founder):
    plain = PlainNet1D(150).eval()
    plain.load_state_dict(founder.state_dict())
    for samples in (313, 100, 37, 32):
        x = torch.randn(2, 12, samples)
        with torch.no_grad():
            torch.testing.assert_close(founder(x), plain(x), atol=1e-5, rtol=0)


def test_dropout_acts_on_the_pooled_features_alone(tiny):
    model, x = network.ecgfounder(4, dropout=0.5).train(), torch.randn(2, 12, 100)
    assert torch.equal(model.forward_features(x), model.forward_features(x))
    assert not torch.equal(model(x), model(x))


def test_every_convolution_and_its_gradient_is_right_in_bf16():
    """Some CPUs' bf16 kernels are wrong for some convolutions that pad by themselves
    (pytorch/pytorch#169688); none does."""
    model, inputs = network.ecgfounder(5), {}
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_pre_hook(lambda m, given: inputs.setdefault(m, *given))
    model(torch.randn(1, 12, 512))
    assert len(inputs) == 61 and {conv.padding for conv in inputs} == {(0,)}
    for conv, x in [*inputs.items()]:
        exact, (gradient,) = conv(x), torch.autograd.grad(conv(x).sum(), conv.weight)
        with torch.autocast("cpu", torch.bfloat16):
            coarse, (coarse_gradient,) = conv(x), torch.autograd.grad(conv(x).sum(), conv.weight)
        assert (coarse - exact).norm() < 0.02 * exact.norm(), conv
        assert (coarse_gradient - gradient).norm() < 0.02 * gradient.norm(), conv


def test_the_head_is_exact_under_autocast():
    """Coarser logits tie, which moves the ranks of rare classes."""
    model, features = network.ecgfounder(5).eval(), torch.randn(4, 1024).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.head(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.dense(features.float()))
    assert model.double().head(features).dtype == torch.float64


# --------------------------------------------------------------------------------- stochastic depth

@pytest.mark.parametrize("p, batch, kept", [(0.5, 8, 4), (0.5, 5, 3), (0.9, 4, 1), (0.01, 8, 8)])
def test_the_branch_is_computed_for_the_kept_samples_alone(p, batch, kept):
    """What is added is the plain branch scaled by B / kept, and so are the gradients."""
    block, computed = network.Block(16, 32, 2, p, True).train(), []
    block.conv1.register_forward_hook(lambda m, inputs, out: computed.append(len(out)))
    x = torch.randn(batch, 16, 64, requires_grad=True)
    out, shortcut = block(x), block.shortcut(x)
    changed = (out != shortcut).flatten(1).any(1)
    assert computed == [kept] and changed.sum() == kept
    want = shortcut + block.branch(x) * (batch / kept) * changed[:, None, None]
    torch.testing.assert_close(out, want)
    inputs, weights = (x, *block.parameters()), torch.randn_like(out)
    got, wanted = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, want))
    torch.testing.assert_close(got, wanted)


def test_blocks_draw_independently_and_anew():
    x, (a, b) = torch.randn(32, 16, 40), (network.Block(16, 16, 1, 0.5, True) for _ in range(2))
    kept = [tuple((block(x) != x).flatten(1).any(1).tolist()) for block in (a, a, b, b)]
    assert len({*kept}) == 4


# -------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("bare", [True, False])
def test_a_bare_state_dict_and_a_file_without_a_head_load(tiny, tmp_path, bare):
    state, model = network.ecgfounder(150).state_dict(), network.ecgfounder(7)
    headless, path = {k: v for k, v in state.items() if "dense" not in k}, tmp_path / "w.pth"
    torch.save(state if bare else {"state_dict": headless}, path)
    want = {**headless, **copy.deepcopy(model).dense.state_dict(prefix="dense.")}
    network.load_pretrained(model, path)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    assert ("12 leads, 150 " if bare else "12 leads, no ") in network.verify(path)


@pytest.mark.parametrize("named, asked", [(None, "I"), (["V1"], "V1")])
def test_one_lead_is_lead_i_unless_the_file_names_it(tiny, tmp_path, named, asked):
    state, path = network.ecgfounder(4, 1).state_dict(), tmp_path / "w.pth"
    torch.save({"state_dict": state, "leads": named}, path)
    model = network.ecgfounder(3, 1)
    network.load_pretrained(model, path, (asked,))
    assert torch.equal(model.first_conv.conv.weight, state[network.STEM])
    with pytest.raises(network.WeightsError, match=f"leads {asked}; wanted II"):
        network.load_pretrained(model, path, ("II",))


def test_verify_compares_the_logits_of_the_release(official, monkeypatch, capsys, fails, golden):
    sha256 = hashlib.sha256(official.read_bytes())
    monkeypatch.setattr(network, "OFFICIAL_SHA256", sha256.hexdigest())
    fails(network.main, ["--weights", official], "not the published ones")  # it has other weights
    monkeypatch.setattr(network, "OFFICIAL_LOGITS", tuple(golden["model_logits"]["logits_first10"]))
    network.main(["--weights", str(official)])
    said = "204 tensors .* 305 unused .* 12 leads, 150 classes.* equal the published ones"
    assert re.search(said, capsys.readouterr().out, re.DOTALL)


def test_a_download_is_checked_by_its_hash(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    path, there = tmp_path / "12_lead_ECGFounder.pth", f"{tmp_path.as_uri()}/"
    path.write_bytes(b"weights")
    monkeypatch.setattr(network, "OFFICIAL_URL", there)
    fails(network.main, ["--download"], path.name, "invalid hash")
    assert not any((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(network, "OFFICIAL_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(network, "verify", Mock(side_effect=[KeyboardInterrupt, ""]))
    fails(network.main, ["--download"], "interrupted", status=130)
    network.main(["--download"])
    assert (tmp_path / network.OFFICIAL).read_bytes() == b"weights"
    with pytest.raises(SystemExit, match="2"):
        network.main(["--download", "--weights", "mine.pth"])   # which of them would it verify?


def test_each_script_imports_those_below_it_alone():
    below = {"model": "", "data": "", "evaluate": "data model", "post_train": "data evaluate model"}
    for name, wanted in below.items():
        text = (ROOT / f"{name}.py").read_text()
        found = re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)
        assert {*found} & below.keys() == {*wanted.split()}
