"""Low-rank adapters (Hu et al., arXiv 2106.09685): W = W0 + s B A, for a matrix or for chosen ones of a stack.

They are saved by the name of the weight that they adapt, with `.lora_A`, `.lora_B` and, in a stack, `.experts` behind
it. The experts of a stack may have different ranks: those of one rank stand together, under the weight's name and
`.rank8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

A, B, EXPERTS = ".lora_A", ".lora_B", ".experts"
_RANK = re.compile(r"(.+)\.rank\d+")


@dataclass(frozen=True)
class LowRank:
    """The two factors of one weight's change."""

    weight: str
    """That they adapt, by the name in `Transformer.state_dict()`."""
    a: Tensor
    """[rank, in], or [chosen experts, rank, in]."""
    b: Tensor
    """[out, rank], or [chosen experts, out, rank]."""
    experts: Tensor | None = None
    """[chosen experts] int64; None for a matrix."""

    @property
    def rank(self) -> int:
        """Of each."""
        return self.a.shape[-2]


def stack_name(weight: str, rank: int) -> str:
    """What the factors of a stack are called by, where their experts have this rank."""
    return f"{weight}.rank{rank}"


def merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`base + scale · b @ a`, for a matrix or a stack of them: everybody merges with this, so all get the same bits."""
    return base + scale * (b @ a)


def read_low_rank(tensors: Mapping[str, Tensor]) -> list[LowRank]:
    """The adapters among the tensors that a run keeps of its method, in the order of their names.

    Args:
        tensors: by the names above.
    """
    names = sorted(name.removesuffix(A) for name in tensors if name.endswith(A))
    found = []
    for name in names:
        experts = tensors.get(name + EXPERTS)
        match = _RANK.fullmatch(name) if experts is not None else None
        found.append(LowRank(name if match is None else match[1], tensors[name + A], tensors[name + B], experts))
    return found
