"""Rotary positions by complex numbers, and stretched frequencies one component at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def plain(dim: int, theta: float) -> list[float]:
    """Su et al., section 3.2.2: theta^(-2i / d)."""
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def linear(dim: int, theta: float, factor: float) -> list[float]:
    """Position interpolation: m / factor for every position m, so every frequency over the factor."""
    return [f / factor for f in plain(dim, theta)]


def ntk(dim: int, theta: float, factor: float) -> list[float]:
    """NTK-aware: b' = b · s^(d / (d - 2)) (YaRN, section 3.1)."""
    return plain(dim, theta * factor ** (dim / (dim - 2)))


def llama3(dim: int, theta: float, factor: float, low: float, high: float, original: int) -> list[float]:
    """By wavelength: short ones kept, long ones stretched, a blend of the two between."""
    found = []
    for f in plain(dim, theta):
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            found.append(f)
        elif wavelength > original / low:
            found.append(f / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append((1 - smooth) * f / factor + smooth * f)
    return found


def yarn(dim: int, theta: float, factor: float, original: int, fast: float = 32, slow: float = 1) -> list[float]:
    """DeepSeek's blend: linear in the component between the two that turn `fast` and `slow` times in the original."""

    def component(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(component(fast)), 0), min(math.ceil(component(slow)), dim - 1)
    found = []
    for i, f in enumerate(plain(dim, theta)):
        ramp = min(max((i - low) / max(high - low, 0.001), 0), 1)
        smooth = 1 - ramp
        found.append(f / factor * (1 - smooth) + f * smooth)
    return found


def rotate(states: Tensor, positions: Tensor, frequencies: Sequence[float], layout: str = "half_split") -> Tensor:
    """Su et al., equation 13: each pair of `[batch, heads, seq, dim]` is a complex number, turned by p · frequency.

    The pair is (i, i + d/2) in the half-split layout, (2i, 2i + 1) in the interleaved one.
    """
    half = states.shape[-1] // 2
    halves = {"half_split": (slice(0, half), slice(half, None)), "interleaved": (slice(0, None, 2), slice(1, None, 2))}
    first, second = halves[layout]
    pairs = torch.complex(states[..., first].double(), states[..., second].double())
    turned = pairs * torch.exp(1j * positions[:, None, :, None] * torch.tensor(frequencies, dtype=torch.float64))
    output = torch.zeros_like(states, dtype=torch.float64)
    output[..., first], output[..., second] = turned.real, turned.imag
    return output
