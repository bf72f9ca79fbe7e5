"""Which weights may be blocks of few bits, and of which format each becomes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch

from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.model.quantised.blocks import FORMATS, Format

Bits = Literal["bf16", "int8", "int4"]
_LARGE = re.compile(r"^(embedding|head)\.weight$|\.((q|k|v|o|gate|up|down|q_down)_proj\.weight|(gate_up|down)_proj)$")
"""Every large product, routed experts above all. Routers choose, and norms and latents scale, what all else works on:
they are small, and stay float32."""
_FORMATS: dict[Bits, tuple[str, str]] = {"bf16": ("BF16", "BF16"), "int8": ("Q8_0", "Q8_0"), "int4": ("Q8_0", "Q4_0")}
"""Of words in and out, and of all else."""
BF16 = FORMATS["BF16"]
_ENDS = re.compile(r"^(embedding|head)\.weight$")


def may_be_small(name: str) -> bool:
    """Whether a tensor of `Transformer.state_dict()` may be blocks."""
    return _LARGE.search(name) is not None


def formats_for(bits: Bits, names: Collection[str]) -> dict[str, Format]:
    """The format of each tensor that becomes blocks of `bits`; words in and out keep 8 bits, and every product of 4 has
    the tokens' own numbers before and behind it."""
    ends, inner = (FORMATS[name] for name in _FORMATS[bits])
    return {name: ends if _ENDS.match(name) else inner for name in names if may_be_small(name)}


def as_stored(stored: Mapping[str, torch.dtype]) -> dict[str, Format]:
    """The format of each tensor that is stored in bfloat16 and may stay so."""
    return {name: BF16 for name, kind in stored.items() if kind is torch.bfloat16 and may_be_small(name)}


@contextlib.contextmanager
def of_tensor(name: str) -> Iterator[None]:
    """Say of which tensor the numbers are that no block can hold.

    Raises:
        CheckpointError: in place of a ConfigError that is raised inside.
    """
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"tensor {name!r}: {error}") from error


def small_shape(name: str, shape: tuple[int, ...], kind: Format) -> tuple[int, ...]:
    """Of the blocks that stand for a tensor of `shape`."""
    if len(shape) < 2:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)} and cannot be blocks of {kind.name}")
    return (*shape[:-1], -(-shape[-1] // kind.size), kind.bytes)


def formats_in(stored: Mapping[str, tuple[int, ...]]) -> dict[str, Format]:
    """The formats of tensors that are blocks in a file of ours, by the shapes that they have there.

    Raises:
        CheckpointError: blocks of no format that is known.
    """
    by_bytes = {one.bytes: one for one in FORMATS.values()}
    for name, shape in stored.items():
        if not shape or shape[-1] not in by_bytes or not may_be_small(name):
            raise CheckpointError(f"tensor {name!r} of bytes {list(shape)} is no weight in blocks that are known")
    return {name: by_bytes[shape[-1]] for name, shape in stored.items()}
