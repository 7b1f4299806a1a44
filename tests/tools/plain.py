"""The obvious way, as the reference of the parity tests and of the benchmark: ECGFounder's network
written down step by step after its description, stochastic depth as a mask on branches that are
computed for every sample, and records read and filtered whenever they are needed."""
import math

import numpy as np
import scipy.signal
import torch
import torch.nn.functional as F
import wfdb

import model as network

LEVELS = ((64, 2), (160, 2), (160, 2), (400, 3), (400, 3), (1024, 4), (1024, 4))


def swish(x):
    return x * torch.sigmoid(x)


def convolve(x, layer, stride=1, groups=1):
    """Pad to "SAME", then convolve."""
    n, k = x.shape[-1], layer.conv.weight.shape[-1]
    p = max(0, (math.ceil(n / stride) - 1) * stride + k - n)
    x = F.pad(x, (p // 2, p - p // 2))
    return F.conv1d(x, layer.conv.weight, layer.conv.bias, stride, groups=groups)


class PlainNet1D(network.ECGFounder):
    """Only the parameters are those of model.py's network; so it can stand in its place."""

    def __init__(self, n_classes, in_channels=12, drop_path=0.0, mode="constant", dropout=0.0):
        super().__init__(n_classes, in_channels, drop_path, mode, dropout, LEVELS)
        start, n_blocks = drop_path if mode == "constant" else 0.0, sum(n for _, n in LEVELS)
        self.rates = np.linspace(start, drop_path, n_blocks)

    def block(self, x, layers, out, channels, stride, drop_path):
        out = convolve(out, layers.conv1)
        out = convolve(swish(out), layers.conv2, stride, channels // 16)
        out = convolve(swish(out), layers.conv3)
        gate = torch.sigmoid(layers.se_fc2(swish(layers.se_fc1(out.mean(-1)))))
        out = torch.einsum("abc,ab->abc", out, gate)
        n, kept = len(x), max(1, math.floor((1 - drop_path) * len(x) + 0.5))
        if self.training and kept < n:
            mask = out.new_zeros(n, 1, 1)
            mask[torch.randperm(n, device=x.device)[:kept]] = n / kept
            out = out * mask
        if stride > 1:
            x = F.max_pool1d(F.pad(x, (0, stride - 1)), stride)
        grow = channels - x.shape[1]
        return out + F.pad(x, (0, 0, grow // 2, grow - grow // 2))

    def forward_features(self, x):
        x, rates = swish(convolve(x, self.first_conv, 2)), iter(self.rates)
        for i, (channels, n) in enumerate(LEVELS):
            for j in range(n):
                out, layers = swish(x) if i + j else x, self.stage_list[i].block_list[j]
                x = self.block(x, layers, out, channels, 2 if j == 0 else 1, next(rates))
        return x.mean(-1)


def read_and_filter(path):
    """A WFDB record -> float32 (12, 5000), filtered and normalized as ECGFounder's authors do."""
    x = wfdb.rdrecord(str(path)).p_signal.T
    x = scipy.signal.filtfilt(*scipy.signal.iirnotch(50, 30, 500), x)
    x = scipy.signal.filtfilt(*scipy.signal.butter(4, [0.67, 40], "bandpass", fs=500), x)
    x = x - np.stack([scipy.signal.medfilt(lead, 201) for lead in x])
    return ((x - x.mean()) / (x.std() + 1e-8)).astype(np.float32)
