"""ECGFounder's network in plain PyTorch, with stochastic depth whose dropped branches cost
nothing.

    python model.py --download             # fetch the official weights, hash checked
    python model.py --download --leads 1   # the one-lead release, of lead I
    python model.py --weights FILE         # verify a checkpoint: keys, hash, official logits

Input: (B, 12, T) float, T = 5000 samples at 500 Hz, leads I II III aVR aVL aVF V1-V6; output:
logits (B, n_classes). Network and weights: Li et al., "An Electrocardiogram Foundation Model Built
on over 10 Million Recordings" (NEJM AI 2025). Stochastic depth: Huang et al., "Deep Networks with
Stochastic Depth" (ECCV 2016). This file imports no other project file.
"""
import argparse
import hashlib
import math
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# (channels, blocks) of each level; a level's signals are half as long as those of the one before.
LEVELS = ((64, 2), (160, 2), (160, 2), (400, 3), (400, 3), (1024, 4), (1024, 4))
KERNEL = 16         # samples
GROUP = 16          # channels per group of the grouped convolutions
MIN_SAMPLES = 32
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
STEM = "first_conv.conv.weight"     # (64, leads, 16)

OFFICIAL = "checkpoints/12_lead_ECGFounder.pth"
OFFICIAL_ONE_LEAD = "checkpoints/1_lead_ECGFounder.pth"
OFFICIAL_URL = "https://huggingface.co/PKUDigitalHealth/ECGFounder/resolve/main/"
OFFICIAL_SHA256 = "ee199f3781f4ae1f732973267f003da0a759ea12bddb0dd28a77faa60aca7997"  # 12 leads
# The official file's first logits (strict loading, float32, CPU) for
# torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000).
OFFICIAL_LOGITS = (8.3751173, -4.1527028, -6.7856750, -2.8647900, 4.4135675,
                   -2.2547250, -5.3009405, -6.1225495, -1.0395477, -1.8894272)


class WeightsError(ValueError):
    """An unusable checkpoint; the message says what was found, what was wanted and what to do."""


# ------------------------------------------------------------------------------------------ network

class LongConv1d(torch.autograd.Function):
    """F.conv1d for kernels of an even length above 14 samples on a CPU, with a weight gradient
    that is several times faster; a training step gains 5 % in float32, 14 % in bf16.

    oneDNN has fast code for the weight gradients of kernels up to 14 samples and slow general code
    beyond. One weight's gradient does not depend on the other weights, so the two halves of the
    kernel are differentiated one after the other.
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
        span = (grad.shape[-1] - 1) * ctx.stride + half  # samples that half of the kernel sees

        def gradients(x, weight, *wanted):
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [channels], [ctx.stride], [0], [1], False, [0], ctx.groups, wanted)

        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradients(x, weight, True, False, False)[0]
        _, first, grad_bias = gradients(x[..., :span], weight[..., :half], False, True, True)
        _, second, _ = gradients(x[..., half:half + span], weight[..., half:], False, True, False)
        return grad_x, torch.cat([first, second], -1), grad_bias, None, None


class SameConv1d(nn.Module):
    """1-D convolution with "SAME" padding: (B, C, T) -> (B, out_channels, ceil(T / stride)).

    Of the p zeros, p // 2 go on the left and the rest on the right. They are added explicitly: on
    CPUs with AMX, oneDNN computes some convolutions with built-in padding wrongly in bfloat16
    (pytorch/pytorch#169688).
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
        slow = kernel > 14 and kernel % 2 == 0 and x.device.type == "cpu"
        if slow and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            autocast = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
            weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
            return LongConv1d.apply(x.to(dtype), weight, bias, stride, groups)
        return F.conv1d(x, conv.weight, conv.bias, stride, groups=groups)


class Block(nn.Module):
    """Pre-activation bottleneck block with squeeze-excitation and stochastic depth:
    (B, C, T) -> (B, out_channels, ceil(T / stride)).

    In training each call draws which samples keep the residual branch (`drop_path` is the fraction
    that does not), computes it for those alone and scales it by B / kept, so that its expectation
    is the full branch. The number kept is fixed for a given B.
    """

    def __init__(self, in_channels, out_channels, stride, drop_path, leading_swish):
        super().__init__()
        groups = out_channels // GROUP
        self.conv1 = SameConv1d(in_channels, out_channels, 1)
        self.conv2 = SameConv1d(out_channels, out_channels, KERNEL, stride, groups)
        self.conv3 = SameConv1d(out_channels, out_channels, 1)
        self.se_fc1 = nn.Linear(out_channels, out_channels // 2)
        self.se_fc2 = nn.Linear(out_channels // 2, out_channels)
        self.stride, self.drop_path, self.leading_swish = stride, drop_path, leading_swish
        self.grow = out_channels - in_channels

    def kept(self, batch_size):
        """How many samples of a batch keep the residual branch in training:
        max(1, floor((1 - p) B + 0.5))."""
        return max(1, math.floor((1 - self.drop_path) * batch_size + 0.5))

    def branch(self, x, scale=1.0):
        h = F.silu(x) if self.leading_swish else x
        h = self.conv1(h)                           # (B, C, T)
        h = self.conv2(F.silu(h))                   # (B, C, T / stride)
        h = self.conv3(F.silu(h))
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(h.mean(-1)))))  # (B, C)
        if scale != 1:
            gate = gate * scale
        return h * gate.unsqueeze(-1)

    def shortcut(self, x):
        if self.stride == 2:                        # an odd length is zero-padded first
            x = F.max_pool1d(F.pad(x, (0, x.shape[-1] % 2)), 2)
        if self.grow:                               # extra channels: zeros on both sides
            x = F.pad(x, (0, 0, self.grow // 2, self.grow - self.grow // 2))
        return x

    def forward(self, x):
        if not self.training or self.kept(len(x)) == len(x):
            return self.branch(x).add_(self.shortcut(x))
        batch_size, kept = len(x), self.kept(len(x))
        index = torch.randperm(batch_size, device=x.device).narrow(0, 0, kept)
        branch = self.branch(x.index_select(0, index), batch_size / kept)
        return self.shortcut(x).index_add(0, index, branch)


class ECGFounder(nn.Module):
    """The published network, with its checkpoint's parameter names. The BatchNorm layers that it
    defines but never applies are omitted. See `ecgfounder`."""

    def __init__(self, n_classes, in_channels, levels, drop_path_rates, dropout):
        super().__init__()
        channels, rates = levels[0][0], iter(drop_path_rates)
        self.first_conv = SameConv1d(in_channels, channels, KERNEL, stride=2)
        self.stage_list = nn.ModuleList()           # levels; an official name, like `block_list`
        for i, (out_channels, n_blocks) in enumerate(levels):
            blocks = []
            for j in range(n_blocks):
                stride = 2 if j == 0 else 1
                # What enters the first block has just gone through a swish.
                blocks.append(Block(channels, out_channels, stride, next(rates),
                                    leading_swish=i + j > 0))
                channels = out_channels
            self.stage_list.append(nn.ModuleDict({"block_list": nn.Sequential(*blocks)}))
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(channels, n_classes)

    def forward_features(self, x):
        """Signals (B, in_channels, T >= 32) -> pooled features (B, 1024)."""
        leads = self.first_conv.conv.in_channels
        if x.dim() != 3 or x.shape[1] != leads or x.shape[2] < MIN_SAMPLES:
            raise ValueError(f"input of shape {tuple(x.shape)}; wanted (batch, {leads} leads, "
                             f"at least {MIN_SAMPLES} samples)")
        x = F.silu(self.first_conv(x))              # (B, 64, T / 2)
        for level in self.stage_list:
            x = level.block_list(x)                 # (B, C, T / 4) ... (B, 1024, T / 256)
        return x.mean(-1)

    def head(self, features):
        """Features (B, 1024) -> logits (B, n_classes). In full precision even under autocast, as
        coarser logits would tie."""
        with torch.autocast(features.device.type, enabled=False):
            return self.dense(self.dropout(features.to(self.dense.weight.dtype)))

    def forward(self, x):
        return self.head(self.forward_features(x))


def ecgfounder(n_classes, in_channels=12, drop_path=0.0, drop_path_mode="constant", dropout=0.0,
               levels=LEVELS):
    """Build the network, randomly initialized.

    in_channels: the number of leads; the official releases have 12, or 1 (lead I). drop_path,
    0 <= p < 1: fraction of each batch that skips a residual branch in training; the same in every
    block ("constant") or growing from 0 in the first of the 20 blocks to p in the last ("linear").
    dropout, 0 <= p < 1: of the pooled features. levels: (channels, blocks) of each. Raises
    ValueError for other rates or modes.
    """
    for name, rate in (("drop_path", drop_path), ("dropout", dropout)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}; wanted 0 <= {name} < 1")
    if drop_path_mode not in ("constant", "linear"):
        raise ValueError(f"drop_path_mode is {drop_path_mode!r}; wanted 'constant' or 'linear'")
    n_blocks = sum(blocks for _, blocks in levels)
    rates = [drop_path] * n_blocks
    if drop_path_mode == "linear":
        rates = [drop_path * (i / max(1, n_blocks - 1)) for i in range(n_blocks)]
    return ECGFounder(n_classes, in_channels, levels, rates, dropout)


# ------------------------------------------------------------------------------------------ weights

def read_checkpoint(path):
    """Read a checkpoint -> dict with at least `state_dict`, on the CPU; a bare state_dict becomes
    such a dict. No code in the file is ever run: besides tensors and plain data only what the
    official file needs is allowed, a NumPy float64 scalar (`val_auroc`, pickled under NumPy 1's
    names). Raises WeightsError for anything else.
    """
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    scalar = multiarray.scalar
    allowed = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"),
               np.dtype, type(np.dtype("float64"))]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of here, it also refuses
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything for a damaged file
        lines = str(error).splitlines() or [type(error).__name__]
        telling = [line.strip() for line in lines if "Unsupported" in line or "load key" in line]
        reason = getattr(error, "strerror", None) or (telling or lines)[0]
        raise WeightsError(f"{path}: cannot be read as a checkpoint of tensors and plain data "
                           f"({reason}); fetch or train it again; `python model.py --download` "
                           "fetches the official weights") from None
    if isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint}
    state = checkpoint["state_dict"] if isinstance(checkpoint, dict) else None
    plain = isinstance(state, dict) and all(  # not sparse, quantized, nested, or without data
        isinstance(v, torch.Tensor) and v.layout == torch.strided and v.device.type == "cpu"
        and not v.is_quantized and not v.is_nested for v in state.values())
    if not plain or not state:
        raise WeightsError(f"{path}: holds no `state_dict` of tensors; wanted the official .pth or "
                           "a checkpoint of post_train.py")
    return checkpoint


def load_pretrained(model, path, head=False, leads=None):
    """Load the official `.pth`, a post_train.py checkpoint for any task, or a bare state_dict into
    `model`; returns how many of the file's leads were left out.

    Without `head` everything but `dense` is loaded, whether or not the file holds one. leads: the
    names of the model's leads; the file's other leads (a file that names none has all twelve, I
    alone, or these) are dropped, which is the same as feeding zeros for them. See `load_state` for
    what is refused.
    """
    checkpoint = read_checkpoint(path)
    state, left_out = checkpoint["state_dict"], 0
    stem = state.get(STEM)
    if leads and stem is not None and stem.dim() == 3:
        unnamed = {len(LEADS): LEADS, 1: LEADS[:1]}.get(stem.shape[1], leads)
        there = checkpoint.get("leads", unnamed)
        there = there if isinstance(there, list | tuple) else []
        if len(there) != stem.shape[1]:
            raise WeightsError(f"{path}: does not name its {stem.shape[1]} leads; wanted as many "
                               "names in --leads")
        lacking = [lead for lead in leads if lead not in there]
        if lacking:
            raise WeightsError(f"{path}: has leads {', '.join(map(str, there))}; wanted "
                               f"{', '.join(lacking)} too: give other --leads")
        state = {**state, STEM: stem[:, [there.index(lead) for lead in leads]]}
        left_out = len(there) - len(leads)
    load_state(model, state, path, head)
    return left_out


def load_state(model, found, path, head):
    """Load the state_dict `found`, read from `path`; with `head` the classifier too, whose number
    of classes must match.

    Only the file's unused BatchNorm keys and, without `head`, its classifier are skipped. Any other
    difference raises WeightsError, naming the first missing, unexpected and mismatched keys, before
    anything is loaded.
    """
    unused, wanted = unused_keys(model), model.state_dict()
    classifier = {key for key in wanted if key.startswith("dense.")}
    if not head:
        wanted = {key: value for key, value in wanted.items() if key not in classifier}
    # A file that has any of the unused keys must have all of them.
    needed = wanted.keys() | (unused if unused & found.keys() else set())
    state = {key: found[key] for key in wanted if key in found}
    problems = {"missing": sorted(needed - found.keys()),
                "unexpected": sorted(map(str, found.keys() - needed - classifier)),
                "mismatched": [f"{key} {tuple(value.shape)}, wanted {tuple(wanted[key].shape)}"
                              for key, value in state.items() if value.shape != wanted[key].shape]}
    said = [f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in problems.items() if keys]
    if not said:
        said = [f"{key} is not finite" for key, v in state.items() if not v.isfinite().all()][:1]
    if said:
        classes = f" and {len(wanted['dense.bias'])} classes" if head else ""
        raise WeightsError(f"{path}: {'; '.join(said)}; wanted the parameters of ECGFounder's "
                           f"network with {model.first_conv.conv.in_channels} leads{classes}")
    model.load_state_dict(state, strict=head)


def unused_keys(model):
    """The 305 BatchNorm keys that the official checkpoints hold and the network never applies."""
    layers = ["first_bn", *(f"{name}.bn{i}" for name, module in model.named_modules()
                            if isinstance(module, Block) for i in (1, 2, 3))]
    return {f"{layer}.{key}" for layer in layers for key in nn.BatchNorm1d(1).state_dict()}


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def verify(path):
    """Check a checkpoint -> lines to print that describe it. Raises WeightsError if something is
    wrong."""
    state = read_checkpoint(path)["state_dict"]
    stem = state.get(STEM)
    head = [value for key, value in state.items() if str(key).startswith("dense.")]
    if stem is None or stem.dim() != 3 or any(value.dim() == 0 for value in head):
        raise WeightsError(f"{path}: has no {STEM}; wanted ECGFounder's network")
    n_classes = len(head[0]) if head else 1
    model = ecgfounder(n_classes, stem.shape[1]).eval()
    load_state(model, state, path, bool(head))
    unused, digest = len(unused_keys(model) & state.keys()), sha256(path)
    classes = f"{n_classes} classes" if head else "no head"
    lines = [f"{path}: {len(state) - unused} tensors loaded, {unused} unused BatchNorm tensors "
             f"left out; {stem.shape[1]} leads, {classes}"]
    if digest != OFFICIAL_SHA256:
        return lines + [f"sha256 {digest}: not the known 12-lead release, so its logits were not "
                        "compared"]
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000))
    logits = logits[0, :len(OFFICIAL_LOGITS)]
    if not torch.allclose(logits, torch.tensor(OFFICIAL_LOGITS), rtol=1e-4, atol=0):
        raise WeightsError(f"{path}: the file is the known release, but its logits "
                           f"{logits.tolist()} are not the published ones: this installation "
                           "of PyTorch computes the network wrongly; try another version")
    return lines + ["sha256 matches the known 12-lead release",
                    "logits equal the published ones (rtol 1e-4)"]


def download(path, url, digest=None):
    """Fetch weights to `path`: complete and, where it is known, with this hash, or not at all."""
    from http.client import HTTPException
    if digest and os.path.exists(path) and sha256(path) == digest:
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=digest)
    except (OSError, ValueError, HTTPException) as error:
        raise WeightsError(f"{url}: cannot be fetched ({error}); run the same command again, or "
                           "give a mirror with --url") from None
    except RuntimeError as error:  # the hash differs; nothing was written
        raise WeightsError(f"{url}: not the known release ({error}); nothing was kept, run the "
                           "same command again") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--weights", metavar="FILE", help="verify this checkpoint")
    add("--download", action="store_true", help="fetch the official weights to checkpoints/")
    add("--leads", type=int, choices=(12, 1), default=12, help="leads of the release (default: 12)")
    add("--url", help="where to fetch it from (default: Hugging Face)")
    args = parser.parse_args(argv)
    if not args.download and not args.weights:
        parser.error("nothing to do; give --download or --weights FILE")
    path, digest = {12: (OFFICIAL, OFFICIAL_SHA256), 1: (OFFICIAL_ONE_LEAD, None)}[args.leads]
    try:
        if args.download:
            download(path, args.url or OFFICIAL_URL + os.path.basename(path), digest)
            print("\n".join(verify(path)))
        if args.weights:
            print("\n".join(verify(args.weights)))
    except (WeightsError, OSError) as error:
        parser.exit(2, f"model.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "model.py: interrupted; no file is half-written\n")


if __name__ == "__main__":
    main()
