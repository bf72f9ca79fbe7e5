"""Rotary position embedding (Su et al., 2021): two layouts, and the ways to stretch it to longer contexts.

`half_split` pairs component i with i + dim / 2 (Llama), `interleaved` component 2i with 2i + 1 (DeepSeek-V2 and V3).
Scalings are a table: a new one is a config with `inverse_frequencies`, and a line in SCALINGS.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finemoe.core.config import Config, union_of

RopeLayout = Literal["half_split", "interleaved"]


class LinearScaling(Config):
    """Position interpolation (Chen et al., 2023): every position divided by `factor` (DeepSeek-Coder: 4)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat
    """[times] How much longer the context becomes."""

    def inverse_frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """All frequencies slowed down alike."""
        return plain / self.factor


class NTKScaling(Config):
    """NTK-aware scaling: a larger base, so that the slowest frequency slows by `factor` and the fastest stays."""

    kind: Literal["ntk"] = "ntk"
    factor: PositiveFloat
    """[times] How much longer the context becomes."""

    def inverse_frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """The frequencies of the base theta · factor^(dim / (dim - 2))."""
        return _frequencies(2 * len(plain), self.scaled_theta(theta, 2 * len(plain)), plain.device)

    def scaled_theta(self, theta: float, dim: int) -> float:
        """The base that gives the same frequencies without any scaling."""
        return theta * self.factor ** (dim / (dim - 2))


class Llama3Scaling(Config):
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, those between blended by wavelength."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    """[times] What slow frequencies are divided by."""
    low_freq_factor: PositiveFloat = 1.0
    """[turns] Within the original context; a frequency that turns less often is divided in full."""
    high_freq_factor: PositiveFloat = 4.0
    """[turns] A frequency that turns more often is kept."""
    original_max_positions: PositiveInt
    """[tokens] The context before stretching."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        return self

    def inverse_frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """Kept above `high_freq_factor` turns within the original context, divided below `low_freq_factor`."""
        turns = self.original_max_positions * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept


class YarnScaling(Config):
    """YaRN (Peng et al., 2023), as DeepSeek-V2 section 3.1.4 and V3 section 4.3 use it: factor 40, alpha 1, beta 32.

    Attention is also made sharper, by sqrt(t) = 0.1 · m · ln(factor) + 1 with m = 0.707 in V2 and 1 in V3: the softmax
    scale is multiplied by t for m = `mscale_all_dim`; cosines and sines by the ratio of the two sqrt(t).
    """

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    """[times] How much longer the context becomes."""
    original_max_positions: PositiveInt
    """[tokens] The context before stretching."""
    beta_fast: PositiveFloat = 32.0
    """[turns] Turns within the original context above which a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """[turns] Turns below which it is divided by `factor`."""
    mscale: float = 1.0
    """[factor] m of cosines and sines: they grow by its sqrt(t) over that of `mscale_all_dim`. At 0 they stay, and
    below they shrink."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """[factor] 0: the softmax scale stays, and only cosines and sines grow (YaRN's own form)."""
    truncate: bool = True
    """Round the edges of the blend to whole components, as DeepSeek's code does."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Equal ones blend over the one component between the rounded edges (Kimi K2).
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must not be below beta_slow {self.beta_slow}")
        if not 0 < self.rotary_factor < math.inf:
            raise ValueError(f"mscale {self.mscale} multiplies cosines and sines by {self.rotary_factor:g}")
        return self

    def inverse_frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """Divided where slow, kept where fast, blended linearly over the components between."""
        low, high = (self._component(turns, 2 * len(plain), theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(plain) - 1)
        ramp = (torch.arange(len(plain), device=plain.device, dtype=torch.float32) - low) / max(high - low, 0.001)
        kept = 1 - ramp.clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept

    def _component(self, turns: float, dim: int, theta: float) -> float:
        """The component that turns so often within the original context."""
        return dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by: t."""
        return self._root(self.mscale_all_dim) ** 2

    @property
    def rotary_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return self._root(self.mscale) / self._root(self.mscale_all_dim)

    def _root(self, mscale: float) -> float:
        """sqrt(t) of the paper; contexts are only ever stretched."""
        return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0


SCALINGS: dict[str, type[Config]] = {
    "linear": LinearScaling,
    "ntk": NTKScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
RopeScaling: Any = union_of(SCALINGS.values())


class RopeConfig(Config):
    """Rotary positions of one attention layer."""

    theta: float = Field(default=10_000.0, gt=1)
    """[base] Base of the frequencies: the pair i turns by theta^(-2i / dim) a position."""
    layout: RopeLayout = "half_split"
    """Which components are turned together: i with i + dim / 2 (Llama), or 2i with 2i + 1 (DeepSeek-V2 and V3)."""
    scaling: RopeScaling | None = None
    """How positions are stretched to contexts longer than the model was trained on."""

    def check_dim(self, dim: int, name: str) -> None:
        """Whether `dim` components can be turned in pairs.

        Raises:
            ValueError: they cannot; `name` is what the configuration calls them.
        """
        if dim % 2:
            raise ValueError(f"{name} {dim} is odd: rotary embedding pairs components, make it even")
        if isinstance(self.scaling, NTKScaling) and dim == 2:
            raise ValueError(f"{name} 2 is a single pair, which ntk scaling cannot stretch: make it larger")

    @property
    def softmax_factor(self) -> float:
        """What stretching multiplies the softmax scale by; 1 for all but YaRN."""
        return self.scaling.softmax_factor if isinstance(self.scaling, YarnScaling) else 1.0


@lru_cache(maxsize=256)
def the_same(rope: RopeConfig) -> RopeConfig:
    """The first that was equal: layers that turn alike then share one, which takes less to see than to compare."""
    return rope


def rotation(positions: Tensor, dim: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions [batch, seq]`, each `[batch, seq, dim / 2]` in float32."""
    angles = positions[..., None].float() * _turns(dim, rope, positions.device)
    if isinstance(rope.scaling, YarnScaling):
        factor = rope.scaling.rotary_factor
        return angles.cos() * factor, angles.sin() * factor
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
def _turns(dim: int, rope: RopeConfig, device: torch.device) -> Tensor:
    """By how much each pair turns a position, the same for every pass."""
    with torch.inference_mode(False):  # a pass of training may come after one of generation
        plain = _frequencies(dim, rope.theta, device)
        return plain if rope.scaling is None else rope.scaling.inverse_frequencies(plain, rope.theta)


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for every pair i."""
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    return theta**-exponent


def rotate(states: Tensor, cosine: Tensor, sine: Tensor, layout: RopeLayout, *, first: bool = False) -> Tensor:
    """Rotate components of `states [batch, heads, seq, dim]` by angles `[batch, seq, pairs]`, and keep the others.

    Where there are more components than angles turn, the last ones turn (latent attention), or the `first` (GLM-4.5).
    """
    cosine, sine = cosine[:, None].to(states.dtype), sine[:, None].to(states.dtype)
    turning = 2 * cosine.shape[-1]
    kept = states.shape[-1] - turning
    if not kept:
        return _turn(states, cosine, sine, layout)
    if first:
        states, plain = states.split((turning, kept), dim=-1)
        return torch.cat((_turn(states, cosine, sine, layout), plain), dim=-1)
    plain, states = states.split((kept, turning), dim=-1)
    return torch.cat((plain, _turn(states, cosine, sine, layout)), dim=-1)


def _turn(states: Tensor, cosine: Tensor, sine: Tensor, layout: RopeLayout) -> Tensor:
    if layout == "half_split":
        first, second = states.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    first, second = states[..., 0::2], states[..., 1::2]
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1).flatten(-2)
