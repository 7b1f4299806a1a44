"""ECGFounder's network in plain PyTorch, with stochastic depth whose dropped branches cost nothing.

    python model.py                    # the stages: shapes, parameters, FLOPs
    python model.py --download         # fetch the official weights to checkpoints/, hash checked
    python model.py --weights FILE     # verify a checkpoint: keys, hash, golden logits of the official file

Input: (B, 12, T) float, T = 5000 samples at 500 Hz, leads I II III aVR aVL aVF V1-V6; output: logits (B, n_classes).
Network and weights: Li et al., "An Electrocardiogram Foundation Model Built on over 10 Million Recordings" (NEJM AI 2025);
stochastic depth: Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016). This file imports no other of the project.
"""
import argparse
import hashlib
import math
import os
import pickle
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STAGES = ((64, 2), (160, 2), (160, 2), (400, 3), (400, 3), (1024, 4), (1024, 4))  # (channels, blocks)
N_BLOCKS = sum(blocks for _, blocks in STAGES)  # 20
N_FEATURES = STAGES[-1][0]  # 1024
KERNEL = 16  # also the channels per group of the grouped convolutions
MIN_SAMPLES = 32

OFFICIAL = "checkpoints/12_lead_ECGFounder.pth"
OFFICIAL_URL = "https://huggingface.co/PKUDigitalHealth/ECGFounder/resolve/main/12_lead_ECGFounder.pth"
OFFICIAL_SHA256 = "ee199f3781f4ae1f732973267f003da0a759ea12bddb0dd28a77faa60aca7997"
# First logits of the official file (strict loading, float32, CPU) for torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000).
OFFICIAL_LOGITS = (8.3751173, -4.1527028, -6.7856750, -2.8647900, 4.4135675,
                   -2.2547250, -5.3009405, -6.1225495, -1.0395477, -1.8894272)


class WeightsError(ValueError):
    """A checkpoint cannot be used; the message says what was found, what was wanted and what to do."""


class LongConv1d(torch.autograd.Function):
    """F.conv1d for kernels of an even length above 14 samples on a CPU, with a weight gradient that is several times faster.

    oneDNN has fast code for weight gradients of kernels up to 14 samples and a slow general one beyond. A weight's gradient
    does not depend on the other weights, so the two halves of the kernel are differentiated one after the other.
    """
    generate_vmap_rule = True  # for per-sample gradients by torch.func

    @staticmethod
    def forward(x, weight, bias, stride, groups):
        return F.conv1d(x, weight, bias, stride, groups=groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.stride, ctx.groups = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        half, channels = weight.shape[-1] // 2, weight.shape[0]
        span = (grad.shape[-1] - 1) * ctx.stride + half  # samples that one half of the kernel sees

        def gradients(x, weight, *wanted):
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [channels], [ctx.stride], [0], [1], False, [0], ctx.groups, wanted)

        grad_x = gradients(x, weight, True, False, False)[0] if ctx.needs_input_grad[0] else None
        _, first, grad_bias = gradients(x[..., :span], weight[..., :half], False, True, True)
        _, second, _ = gradients(x[..., half:half + span], weight[..., half:], False, True, False)
        return grad_x, torch.cat([first, second], -1), grad_bias, None, None


class SameConv1d(nn.Module):
    """1-D convolution with "SAME" padding: (B, C, T) -> (B, out_channels, ceil(T / stride)).

    The zeros are split p // 2 on the left and the rest on the right. They are added by hand: in bfloat16 oneDNN computes
    some convolutions that pad by themselves wrongly on CPUs with AMX (pytorch/pytorch#169688).
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, groups=groups)

    def forward(self, x):
        conv, n = self.conv, x.shape[-1]
        stride, groups, kernel = conv.stride[0], conv.groups, conv.kernel_size[0]
        pad = max(0, (math.ceil(n / stride) - 1) * stride + kernel - n)
        if pad:
            x = F.pad(x, (pad // 2, pad - pad // 2))
        long = kernel > 14 and kernel % 2 == 0 and x.device.type == "cpu"
        if long and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            return LongConv1d.apply(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), stride, groups)
        return F.conv1d(x, conv.weight, conv.bias, stride, groups=groups)


class Block(nn.Module):
    """Pre-activation bottleneck block with squeeze-excitation: (B, C, T) -> (B, out_channels, ceil(T / stride)).

    In training each call draws which samples keep the residual branch (`drop_path` is the share that does not), computes it
    for those alone and scales it by B / kept, so that its expectation is the whole branch. The number kept is fixed.
    """

    def __init__(self, in_channels, out_channels, stride, drop_path, leading_swish):
        super().__init__()
        self.conv1 = SameConv1d(in_channels, out_channels, 1)
        self.conv2 = SameConv1d(out_channels, out_channels, KERNEL, stride, groups=out_channels // KERNEL)
        self.conv3 = SameConv1d(out_channels, out_channels, 1)
        self.se_fc1 = nn.Linear(out_channels, out_channels // 2)
        self.se_fc2 = nn.Linear(out_channels // 2, out_channels)
        self.stride, self.drop_path, self.leading_swish = stride, drop_path, leading_swish
        self.grow = out_channels - in_channels

    def kept(self, batch_size):
        """How many samples of a batch keep the residual branch in training: max(1, floor((1 - p) B + 0.5))."""
        return max(1, math.floor((1 - self.drop_path) * batch_size + 0.5))

    def branch(self, x, scale=1.0):
        h = F.silu(x) if self.leading_swish else x
        h = self.conv1(h)                           # (B, C, T)
        h = self.conv2(F.silu(h))                   # (B, C, T / stride)
        h = self.conv3(F.silu(h))
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(h.mean(-1)))))  # (B, C)
        return h * (gate * scale if scale != 1 else gate).unsqueeze(-1)

    def shortcut(self, x):
        if self.stride == 2:                        # zero-pad an odd length by one, then the maximum of each pair
            x = F.pad(x, (0, 1)) if x.shape[-1] % 2 else x
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            x = torch.where((a >= b) | a.isnan(), a, b)  # as max-pooling, with the cheaper gradient
        if self.grow:                               # new channels: zeros before and behind
            x = F.pad(x, (0, 0, self.grow // 2, self.grow - self.grow // 2))
        return x

    def forward(self, x):
        if not self.training or not self.drop_path:
            return self.branch(x).add_(self.shortcut(x))
        batch_size, kept = len(x), self.kept(len(x))
        if kept == batch_size:
            return self.branch(x).add_(self.shortcut(x))
        index = torch.randperm(batch_size, device=x.device).narrow(0, 0, kept)
        branch = self.branch(x.index_select(0, index), batch_size / kept)
        shortcut = self.shortcut(x)
        return shortcut.index_add(0, index, branch) if shortcut is x else shortcut.index_add_(0, index, branch)


class Stage(nn.Module):
    """A run of blocks, the first of them with stride 2. `block_list` is the official checkpoint's name for them."""

    def __init__(self, blocks):
        super().__init__()
        self.block_list = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.block_list:
            x = block(x)
        return x


class ECGFounder(nn.Module):
    """The published network under the parameter names of its checkpoint. The BatchNorm layers that it holds and never
    applies are not built. `dropout` acts on the pooled features, before `dense`. See `ecgfounder` for the arguments."""

    def __init__(self, n_classes, in_channels, drop_path_rates, dropout):
        super().__init__()
        self.first_conv = SameConv1d(in_channels, STAGES[0][0], KERNEL, stride=2)
        stages, channels, rates = [], STAGES[0][0], iter(drop_path_rates)
        for i, (out_channels, n_blocks) in enumerate(STAGES):
            blocks = []
            for j in range(n_blocks):
                blocks.append(Block(channels, out_channels, 2 if j == 0 else 1, next(rates), leading_swish=i + j > 0))
                channels = out_channels
            stages.append(Stage(blocks))
        self.stage_list = nn.ModuleList(stages)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(N_FEATURES, n_classes)

    def forward_features(self, x):
        """Signals (B, in_channels, T >= 32) -> pooled features (B, 1024)."""
        channels = self.first_conv.conv.in_channels
        if x.dim() != 3 or x.shape[1] != channels or x.shape[2] < MIN_SAMPLES:
            raise ValueError(f"input of shape {tuple(x.shape)}; wanted (batch, {channels} leads, at least {MIN_SAMPLES} samples)")
        x = F.silu(self.first_conv(x))              # (B, 64, T / 2)
        for stage in self.stage_list:
            x = stage(x)                            # (B, C, T / 4) ... (B, 1024, T / 256)
        return x.mean(-1)

    def head(self, features):
        """Features (B, 1024) -> logits (B, n_classes), under autocast too in full precision: coarser logits tie."""
        with torch.autocast(features.device.type, enabled=False):
            return self.dense(self.dropout(features.to(self.dense.weight.dtype)))

    def forward(self, x):
        return self.head(self.forward_features(x))


def ecgfounder(n_classes, in_channels=12, drop_path=0.0, drop_path_mode="constant", dropout=0.0):
    """Build the network, randomly initialised.

    drop_path, 0 <= p < 1: share of each batch that skips a residual branch in training; the same in every block
    ("constant") or growing from 0 in the first of the 20 blocks to p in the last ("linear").
    in_channels: 12 leads, or 1 (lead I) for the one-lead release. Raises ValueError for anything else out of range.
    """
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; wanted 0 <= drop_path < 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; wanted 0 <= dropout < 1")
    if drop_path_mode not in ("constant", "linear"):
        raise ValueError(f"drop_path_mode is {drop_path_mode!r}; wanted 'constant' or 'linear'")
    rates = [drop_path * (i / (N_BLOCKS - 1) if drop_path_mode == "linear" else 1.0) for i in range(N_BLOCKS)]
    return ECGFounder(n_classes, in_channels, rates, dropout)


def unused_keys():
    """The 305 BatchNorm keys that the official checkpoints hold and the published network never applies."""
    layers = ["first_bn"] + [f"stage_list.{i}.block_list.{j}.bn{k}" for i, (_, blocks) in enumerate(STAGES)
                             for j in range(blocks) for k in (1, 2, 3)]
    return {f"{layer}.{name}" for layer in layers
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def read_checkpoint(path):
    """Read a checkpoint -> dict with at least `state_dict`, on the CPU. No code of the file is ever run.

    torch.load with weights_only=True, allowing beside tensors only what the official file needs: a NumPy float64 scalar
    (`val_auroc`, pickled under NumPy 1 names). Raises WeightsError for anything else.
    """
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed = [(multiarray.scalar, "numpy.core.multiarray.scalar"), (multiarray.scalar, "numpy._core.multiarray.scalar"),
               np.dtype, type(np.dtype("float64"))]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it refuses
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise WeightsError(f"{path}: {error.strerror.lower()}; wanted a checkpoint, `python model.py --download` fetches the official weights") from None
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "load key" in line), "damaged")
        raise WeightsError(f"{path}: refused, not a checkpoint of tensors and plain data ({reason.strip()}); "
                           "fetch or train it again; `python model.py --download` fetches the official weights") from None
    except Exception as error:  # torch raises nearly every type for a damaged file
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: damaged or not a PyTorch checkpoint ({reason}); "
                           "fetch or train it again; `python model.py --download` fetches the official weights") from None
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) and is_plain(value) for key, value in state.items()):
        raise WeightsError(f"{path}: holds no `state_dict` of tensors; wanted the official .pth or a checkpoint of post_train.py")
    return checkpoint


def is_plain(value):
    """Whether `value` is an ordinary tensor: not sparse, quantized, nested, or without data."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not (value.is_quantized or value.is_nested)


def load_pretrained(model, path, head=False):
    """Load the official `.pth`, or a checkpoint of post_train.py of any task, into `model`; returns the checkpoint's dict.

    Without `head` everything but `dense` is loaded and the head keeps its initialisation (the file must hold some head all
    the same); with it the class count must fit too. Every other difference raises WeightsError, naming the first missing,
    unexpected and misshapen keys, before anything is loaded. Of the file only the unused BatchNorm keys are left out.
    """
    checkpoint = read_checkpoint(path)
    load_state(model, checkpoint["state_dict"], path, head)
    return checkpoint


def load_state(model, found, path, head):
    """Load a checkpoint's state_dict `found`, read from `path`, as load_pretrained says."""
    unused, wanted = unused_keys(), model.state_dict()
    missing = sorted(wanted.keys() - found.keys()) + (sorted(unused - found.keys()) if unused & found.keys() else [])
    unexpected = sorted(found.keys() - wanted.keys() - unused)
    state = {key: found[key] for key in wanted if key in found and (head or not key.startswith("dense."))}
    misshapen = [f"{key} {tuple(v.shape)}, wanted {tuple(wanted[key].shape)}"
                 for key, v in state.items() if v.shape != wanted[key].shape]
    problems = [f"{len(keys)} {name} key{'s' * (len(keys) > 1)} (first: {keys[0]})"
                for name, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if keys]
    if not problems:
        problems = [f"{key} is not finite" for key, v in state.items() if not torch.isfinite(v).all()][:1]
    if problems:
        raise WeightsError(f"{path}: {'; '.join(problems)}; wanted ECGFounder's network with "
                           f"{model.first_conv.conv.in_channels} leads" + (f" and {len(wanted['dense.bias'])} classes" if head else ""))
    model.load_state_dict(state, strict=head)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(model, samples=5000):
    """One line per part of the network: name, output shape for one ECG, parameters, FLOPs (2 per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode
    parts = [("first_conv", model.first_conv)] + [(f"stage_list.{i}", s) for i, s in enumerate(model.stage_list)] \
        + [("dense", model.dense)]
    shapes = {}
    hooks = [part.register_forward_hook(lambda m, i, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:])))
             for name, part in parts]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, model.first_conv.conv.in_channels, samples))
    for hook in hooks:
        hook.remove()
    flops = counter.get_flop_counts()
    size = lambda part: sum(p.numel() for p in part.parameters())
    lines = [f"{'part':14} {'output':>14} {'parameters':>12} {'MFLOP':>8}"]
    lines += [f"{name:14} {str(shapes[name]):>14} {size(part):>12,} "
              f"{sum(flops[f'{type(model).__name__}.{name}'].values()) / 1e6:8.1f}" for name, part in parts]
    return lines + [f"{'all':14} {'':14} {size(model):>12,} {counter.get_total_flops() / 1e6:8.1f}"]


def verify(path):
    """Check a checkpoint and say what it is: lines to print. Raises WeightsError where something is wrong."""
    state = read_checkpoint(path)["state_dict"]
    stem, dense = state.get("first_conv.conv.weight"), state.get("dense.weight")
    if stem is None or dense is None or stem.dim() != 3 or dense.dim() != 2:
        raise WeightsError(f"{path}: has no first_conv.conv.weight and dense.weight; wanted ECGFounder's network")
    model = ecgfounder(dense.shape[0], stem.shape[1]).eval()
    load_state(model, state, path, head=True)
    dropped = len(state) - len(model.state_dict())
    lines = [f"{path}: {len(model.state_dict())} tensors loaded, {dropped} unused BatchNorm tensors left out; "
             f"{stem.shape[1]} leads, {dense.shape[0]} classes"]
    digest = sha256(path)
    if digest != OFFICIAL_SHA256:
        return lines + [f"sha256 {digest}: not the known 12-lead release, so its logits were not compared"]
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000))[0, :len(OFFICIAL_LOGITS)]
    if not torch.allclose(logits, torch.tensor(OFFICIAL_LOGITS), rtol=1e-4, atol=0):
        raise WeightsError(f"{path}: the file is the known release, but its logits {logits.tolist()} are not the published ones; "
                           "this installation of PyTorch computes the network wrongly")
    return lines + ["sha256 is the known 12-lead release's", "logits equal the published ones (rtol 1e-4)"]


def download(path, url):
    """Fetch the official weights to `path`: complete and with the known hash, or not at all."""
    if os.path.exists(path) and sha256(path) == OFFICIAL_SHA256:
        return
    from http.client import HTTPException
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=OFFICIAL_SHA256)
    except (OSError, ValueError, HTTPException) as error:
        raise WeightsError(f"{url}: cannot be fetched ({error}); run the same command again, or --url for a mirror") from None
    except RuntimeError as error:  # the hash differs; nothing was written
        raise WeightsError(f"{url}: not the known release ({error}); nothing was kept, run the same command again") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", metavar="FILE", help="verify this checkpoint")
    parser.add_argument("--download", action="store_true", help=f"fetch the official weights to {OFFICIAL}")
    parser.add_argument("--url", default=OFFICIAL_URL, help="where to fetch them from (default: Hugging Face)")
    args = parser.parse_args(argv)
    try:
        if args.download:
            download(OFFICIAL, args.url)
        if args.download or args.weights:
            lines = verify(args.weights or OFFICIAL)
        else:
            lines = describe(ecgfounder(n_classes=150))
        print("\n".join(lines))
    except (WeightsError, OSError) as error:
        sys.stderr.write(f"model.py: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
