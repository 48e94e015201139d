"""SQNR: how much of a signal is left over its quantization error, in decibels."""

import math

from torch import Tensor

_CHUNK = 1 << 22


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers; infinite without noise, minus infinite without signal.

    >>> decibels(100.0, 1.0)
    20.0
    """
    ratio = float("inf") if noise == 0 else 0.0 if signal == 0 else signal / noise
    return 10 * math.log10(ratio) if 0 < ratio < float("inf") else ratio if ratio else float("-inf")


def sqnr(x: Tensor, quantized: Tensor) -> float:
    """Of a tensor and its quantized values, dB; summed in float64, piece by piece."""
    signal = noise = 0.0
    for a, b in zip(x.reshape(-1).split(_CHUNK), quantized.reshape(-1).split(_CHUNK), strict=True):
        signal += float(a.double().square().sum())
        noise += float((a.double() - b.double()).square().sum())
    return decibels(signal, noise)
