"""World: the processes that train one model together, as the trainer sees them.

The trainer asks at named places and knows nothing of process groups. Each rank takes its share of every step's
sequences; what is summed is summed over all of them, and what is agreed on holds for all. `SOLO` is one process: every
answer is the question, so that a run alone computes to the bit what it would without a world.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar, final

from torch import Tensor, nn

Key = TypeVar("Key")


class World(Protocol):
    """All ranks call the same methods in the same order; each call is a meeting point."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the ranks; a name that a rank does not have counts 0 there."""
        ...

    def sum_tensors(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The same of tensors, which have the same keys and shapes everywhere."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every `.grad` the sum over the ranks, in place.

        Never the mean: losses are divided by counts of the whole step. Does nothing where the backward pass has done
        it, as that of FSDP does.
        """
        ...

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        ...


@final
class _Solo:
    """One process."""

    rank = 0
    size = 1

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)

    def sum_tensors(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return dict(tensors)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        return None

    def any(self, flag: bool) -> bool:
        return flag


SOLO: World = _Solo()
