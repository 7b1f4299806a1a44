"""The obvious way, as the reference of the parity tests and of the benchmark: ECGFounder's network
written down step by step after its description, stochastic depth as a mask on branches that are
computed for every sample, and records read and filtered whenever they are needed."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LEVELS = ((64, 2), (160, 2), (160, 2), (400, 3), (400, 3), (1024, 4), (1024, 4))


def swish(x):
    return x * torch.sigmoid(x)


class PaddedConv(nn.Module):
    """Pad to "SAME", then convolve."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, groups=groups)

    def forward(self, x):
        n, k, s = x.shape[-1], self.conv.kernel_size[0], self.conv.stride[0]
        p = max(0, (math.ceil(n / s) - 1) * s + k - n)
        return self.conv(F.pad(x, (p // 2, p - p // 2)))


class PlainBlock(nn.Module):
    def __init__(self, in_channels, channels, stride, first, drop_path):
        super().__init__()
        self.conv1 = PaddedConv(in_channels, channels, 1)
        self.conv2 = PaddedConv(channels, channels, 16, stride, channels // 16)
        self.conv3 = PaddedConv(channels, channels, 1)
        self.se_fc1 = nn.Linear(channels, channels // 2)
        self.se_fc2 = nn.Linear(channels // 2, channels)
        self.stride, self.first, self.drop_path = stride, first, drop_path
        self.grow = channels - in_channels

    def mask(self, x):
        """n / kept for the samples that keep their branch, drawn at random, 0 for the others."""
        n = len(x)
        kept = max(1, math.floor((1 - self.drop_path) * n + 0.5))
        index = torch.randperm(n, device=x.device)[:kept] if kept < n else slice(n)
        mask = x.new_zeros(n, 1, 1)
        mask[index] = n / kept
        return mask

    def forward(self, x):
        out = self.conv1(x if self.first else swish(x))
        out = self.conv2(swish(out))
        out = self.conv3(swish(out))
        gate = torch.sigmoid(self.se_fc2(swish(self.se_fc1(out.mean(-1)))))
        out = torch.einsum("abc,ab->abc", out, gate)
        if self.training and self.drop_path:
            out = out * self.mask(out)
        if self.stride > 1:
            x = F.max_pool1d(F.pad(x, (0, self.stride - 1)), self.stride)
        if self.grow:
            x = F.pad(x, (0, 0, self.grow // 2, self.grow - self.grow // 2))
        return out + x


class PlainNet1D(nn.Module):
    """In the place of model.ecgfounder, with the parameter names of the published network."""

    def __init__(self, n_classes, in_channels=12, drop_path=0.0, mode="constant", dropout=0.0):
        super().__init__()
        before, n_blocks = LEVELS[0][0], sum(n for _, n in LEVELS)
        rates = iter(np.linspace(drop_path if mode == "constant" else 0, drop_path, n_blocks))
        self.first_conv, self.stage_list = PaddedConv(in_channels, before, 16, 2), nn.ModuleList()
        for level, (channels, n) in enumerate(LEVELS):
            blocks = [PlainBlock(before, channels, 2, level == 0, next(rates))]
            blocks += [PlainBlock(channels, channels, 1, False, next(rates)) for _ in range(n - 1)]
            self.stage_list.append(nn.ModuleDict({"block_list": nn.Sequential(*blocks)}))
            before = channels
        self.dropout, self.dense = nn.Dropout(dropout), nn.Linear(before, n_classes)

    def forward_features(self, x):
        x = swish(self.first_conv(x))
        for level in self.stage_list:
            x = level["block_list"](x)
        return x.mean(-1)

    def head(self, features):
        return self.dense(self.dropout(features))

    def forward(self, x):
        return self.head(self.forward_features(x))


def read_and_filter(path):
    """A WFDB record -> float32 (12, 5000), filtered and normalized as ECGFounder's authors do."""
    import scipy.signal
    import wfdb
    x = wfdb.rdrecord(str(path)).p_signal.T
    x = scipy.signal.filtfilt(*scipy.signal.iirnotch(50, 30, 500), x)
    x = scipy.signal.filtfilt(*scipy.signal.butter(4, [0.67, 40], "bandpass", fs=500), x)
    x = x - np.stack([scipy.signal.medfilt(lead, 201) for lead in x])
    return ((x - x.mean()) / (x.std() + 1e-8)).astype(np.float32)
