"""ECGFounder's network in plain PyTorch, with stochastic depth whose dropped branches cost nothing.

    python model.py --download             # fetch the official weights, hash checked
    python model.py --download --leads 1   # the one-lead release, of lead I
    python model.py --weights FILE         # verify a checkpoint: keys, hash, official logits

Input: (B, 12, T), T = 5000 samples at 500 Hz, in the order of LEADS; output: logits (B, n_classes).
Network: Li et al., "An Electrocardiogram Foundation Model Built on over 10 Million Recordings",
NEJM AI 2025. Stochastic depth: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
"""
import argparse
import hashlib
import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# (channels, blocks) of each level; a level's signals are half as long as those of the one before.
LEVELS = ((64, 2), (160, 2), (160, 2), (400, 3), (400, 3), (1024, 4), (1024, 4))
KERNEL = 16         # samples
GROUP = 16          # channels per group of the grouped convolutions
MODES = ("constant", "linear")      # of drop path
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
STEM = "first_conv.conv.weight"
UNUSED = r"(^first_|\.)bn\d?\."  # BatchNorm's keys in the official files

OFFICIAL = "checkpoints/12_lead_ECGFounder.pth"
OFFICIAL_ONE_LEAD = "checkpoints/1_lead_ECGFounder.pth"
OFFICIAL_URL = "https://huggingface.co/PKUDigitalHealth/ECGFounder/resolve/main/"
OFFICIAL_SHA256 = "ee199f3781f4ae1f732973267f003da0a759ea12bddb0dd28a77faa60aca7997"  # 12 leads
# The official file's first logits for torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000).
OFFICIAL_LOGITS = (8.3751173, -4.1527028, -6.7856750, -2.8647900, 4.4135675,
                   -2.2547250, -5.3009405, -6.1225495, -1.0395477, -1.8894272)


class WeightsError(ValueError):
    """An unusable checkpoint; the message says what was found, what was wanted and what to do."""


class SameConv1d(nn.Module):
    """1-D convolution with "SAME" padding: (B, C, T) -> (B, out_channels, ceil(T / stride)). Of p
    zeros, p // 2 go on the left. They are added explicitly: on CPUs with AMX, oneDNN computes some
    convolutions with built-in padding wrongly in bfloat16 (pytorch/pytorch#169688)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, groups=groups)

    def forward(self, x):
        n, kernel, stride = x.shape[-1], self.conv.kernel_size[0], self.conv.stride[0]
        pad = max(0, (math.ceil(n / stride) - 1) * stride + kernel - n)
        return self.conv(F.pad(x, (pad // 2, pad - pad // 2)) if pad else x)


class Block(nn.Module):
    """Pre-activation bottleneck block with squeeze-excitation and stochastic depth:
    (B, C, T) -> (B, out_channels, ceil(T / stride)).

    In training each call draws the max(1, floor((1 - drop_path) B + 0.5)) samples that keep the
    residual branch, and scales it by B / kept, so that its expectation is the full branch."""

    def __init__(self, in_channels, out_channels, stride, drop_path, leading_swish=True):
        super().__init__()
        self.conv1 = SameConv1d(in_channels, out_channels, 1)
        self.conv2 = SameConv1d(out_channels, out_channels, KERNEL, stride, out_channels // GROUP)
        self.conv3 = SameConv1d(out_channels, out_channels, 1)
        self.se_fc1 = nn.Linear(out_channels, out_channels // 2)
        self.se_fc2 = nn.Linear(out_channels // 2, out_channels)
        self.stride, self.drop_path, self.leading_swish = stride, drop_path, leading_swish
        self.grow = out_channels - in_channels

    def branch(self, x, scale=1.0):
        h = self.conv1(F.silu(x) if self.leading_swish else x)  # (B, C, T)
        h = self.conv2(F.silu(h))                               # (B, C, T / stride)
        h = self.conv3(F.silu(h))
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(h.mean(-1)))))  # (B, C)
        return h * (scale * gate).unsqueeze(-1)

    def shortcut(self, x):
        if self.stride == 2:                        # an odd length is zero-padded first
            x = F.max_pool1d(F.pad(x, (0, x.shape[-1] % 2)), 2)
        if self.grow:                               # extra channels: zeros on both sides
            x = F.pad(x, (0, 0, self.grow // 2, self.grow - self.grow // 2))
        return x

    def forward(self, x):
        n = len(x)
        kept = max(1, math.floor((1 - self.drop_path) * n + 0.5)) if self.training else n
        if kept == n:
            return self.branch(x).add_(self.shortcut(x))
        index = torch.randperm(n, device=x.device)[:kept]
        # index_select, as on a GPU the backward of x[index] sorts.
        return self.shortcut(x).index_add(0, index, self.branch(x.index_select(0, index), n / kept))


class ECGFounder(nn.Module):
    """The published network, with its checkpoint's parameter names, randomly initialized; without
    the BatchNorm layers that it defines but never applies.

    in_channels: leads, 12 or 1 (lead I) in the official releases. drop_path, 0 <= p < 1: fraction
    of each batch that skips a residual branch in training, in every block ("constant") or from 0 in
    the first to p in the last ("linear"); else ValueError. dropout: of the pooled features."""

    def __init__(self, n_classes, in_channels=12, drop_path=0.0, drop_path_mode="constant",
                 dropout=0.0, levels=LEVELS):
        super().__init__()
        if not 0 <= drop_path < 1 or drop_path_mode not in MODES:
            raise ValueError(f"drop path {drop_path}, {drop_path_mode}; wanted 0 <= p < 1, {MODES}")
        n, channels = sum(blocks for _, blocks in levels), levels[0][0]
        grows = [i / max(1, n - 1) if drop_path_mode == "linear" else 1 for i in range(n)]
        rates = iter([drop_path * factor for factor in grows])
        self.first_conv = SameConv1d(in_channels, channels, KERNEL, stride=2)
        self.stage_list = nn.ModuleList()           # levels; an official name, like `block_list`
        for out_channels, blocks in levels:
            # What enters the first block of all has just gone through a swish.
            level = [Block(channels, out_channels, 2, next(rates), len(self.stage_list) > 0)]
            level += [Block(out_channels, out_channels, 1, next(rates)) for _ in range(blocks - 1)]
            self.stage_list.append(nn.ModuleDict({"block_list": nn.Sequential(*level)}))
            channels = out_channels
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(channels, n_classes)

    def forward_features(self, x):
        """Signals (B, in_channels, T >= 32) -> pooled features (B, 1024)."""
        if x.dim() != 3 or x.shape[2] < 32:     # torch says if the leads are too many or too few
            raise ValueError(f"shape {tuple(x.shape)}; wanted (batch, leads, samples, 32 or more)")
        x = F.silu(self.first_conv(x))              # (B, 64, T / 2)
        for level in self.stage_list:
            x = level.block_list(x)                 # (B, C, T / 4) ... (B, 1024, T / 256)
        return x.mean(-1)

    def head(self, features):
        """Features (B, 1024) -> logits (B, n_classes), in full precision."""
        with torch.autocast(features.device.type, enabled=False):   # coarser logits tie
            return self.dense(self.dropout(features.to(self.dense.weight.dtype)))

    def forward(self, x):
        return self.head(self.forward_features(x))


ecgfounder = ECGFounder


def read_checkpoint(path):
    """Read a checkpoint -> dict with at least `state_dict`, on the CPU: the weights, whatever the
    file calls them, without a wrapper's prefix. No code in the file is ever run: besides tensors
    and plain data only NumPy's numbers are allowed (official files hold some), or WeightsError."""
    scalar = np.float64().__reduce__()[0]       # what NumPy's numbers are unpickled by
    allowed = [np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
               *((scalar, f"numpy.{name}.multiarray.scalar") for name in ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")     # what torch warns of here, it also refuses
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = [checkpoint.get("state_dict"), checkpoint, *checkpoint.values()]
        state = next(part for part in parts if isinstance(part, dict)
                     and any(str(key).endswith(STEM) for key in part))
        (prefix,) = {key.removesuffix(STEM) for key, value in state.items()
                     if key.endswith(STEM) and value.dim() == 3}
        state = {key.removeprefix(prefix): value.detach() for key, value in state.items()
                 if key.startswith(prefix)}     # a wrapper may have tensors of its own
    except Exception as error:  # torch raises almost anything for a damaged file, with bad advice
        said = re.search(r"Unsupported global: GLOBAL \S+|No such file|$", str(error))[0]
        raise WeightsError(f"{path}: no ECGFounder weights, as tensors and plain data, can be read "
                           f"({said or type(error).__name__}); check the path, train again, save a "
                           "state_dict, or run `python model.py --download`") from None
    return {**checkpoint, "state_dict": state}


def load_state(model, state, path, head=True):
    """Load the state_dict `state`, read from `path`; without `head` all but the classifier. The
    file's BatchNorm tensors, which the network never applies, are left out. Raises WeightsError for
    any other difference, and for a value that is not finite."""
    skipped = UNUSED if head else rf"{UNUSED}|^dense\."
    state = {key: value for key, value in state.items() if not re.search(skipped, key)}
    kept = {} if head else model.dense.state_dict(prefix="dense.")
    try:
        model.load_state_dict({**state, **kept})
    except RuntimeError as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())[:400]}") from None
    if bad := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
        raise WeightsError(f"{path}: {bad[0]} is not finite")


def load_pretrained(model, path, leads=LEADS):
    """Load the official .pth, a checkpoint of post_train.py for any task, or a bare state_dict into
    all of `model` but its classifier. leads: the names of the model's. The file's others are
    dropped, which is the same as feeding zeros for them; a file that names none has all twelve, I
    alone, or these. Returns the file's dict. Raises WeightsError for what does not fit."""
    checkpoint = read_checkpoint(path)
    state, n = checkpoint["state_dict"], checkpoint["state_dict"][STEM].shape[1]
    there = checkpoint.get("leads") or {12: LEADS, 1: LEADS[:1]}.get(n, leads)
    if len(there) != n or not {*leads} <= {*there}:
        raise WeightsError(f"{path}: has the leads {', '.join(there)}; wanted {', '.join(leads)}: "
                           "give other --leads")
    state[STEM] = state[STEM][:, [there.index(lead) for lead in leads]]
    load_state(model, state, path, head=False)
    return checkpoint


def verify(path):
    """Load a checkpoint whole, and compare the official one's logits -> a line to print."""
    state = read_checkpoint(path)["state_dict"]
    leads, n_classes = state[STEM].shape[1], state.get("dense.bias", torch.zeros(0)).numel()
    model = ecgfounder(n_classes or 1, leads).eval()
    load_state(model, state, path, head=n_classes > 0)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    n = sum(not re.search(UNUSED, key) for key in state)
    found = (f"{path}: {n} tensors loaded, {len(state) - n} unused BatchNorm tensors left out, "
             f"{leads} leads, {n_classes or 'no'} classes, sha256 {digest}")
    if digest != OFFICIAL_SHA256:
        return f"{found}: not the known 12-lead release, so no logits were compared"
    logits = model(torch.linspace(-1, 1, 12 * 5000).reshape(1, 12, 5000))[0, :10]
    if not torch.allclose(logits, torch.tensor(OFFICIAL_LOGITS), rtol=1e-4, atol=0):
        raise WeightsError(f"{path}: its logits are not the published ones; try another PyTorch")
    return f"{found}: the known 12-lead release; logits equal the published ones"


def download(path, digest):
    """Fetch a release to `path`: complete and, where it is known, with this hash, or not at all."""
    url = OFFICIAL_URL + Path(path).name
    Path(path).parent.mkdir(exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, path, digest)
    except (OSError, RuntimeError) as error:    # RuntimeError: of the hash
        raise WeightsError(f"{url}: {error}; try again, or fetch it by hand to {path}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--weights", metavar="FILE", help="verify this checkpoint")
    one.add_argument("--download", action="store_true", help="fetch the official weights")
    parser.add_argument("--leads", type=int, choices=(12, 1), default=12,
                        help="leads of the release (default: 12)")
    args = parser.parse_args(argv)
    path, digest = {12: (OFFICIAL, OFFICIAL_SHA256), 1: (OFFICIAL_ONE_LEAD, None)}[args.leads]
    try:
        if args.download:
            download(path, digest)
        print(verify(args.weights or path))
    except (WeightsError, OSError) as error:
        parser.exit(2, f"model.py: {error}\n")
    except KeyboardInterrupt:   # the download is not half-written
        parser.exit(130, "model.py: interrupted\n")


if __name__ == "__main__":
    main()
