"""World: the processes that train one model together, as the trainer sees them.

The trainer asks at named places and knows nothing of process groups. Each rank takes its share of every step's
sequences; what is summed is summed over all of them, and what is agreed on holds for all. `SOLO` is one process: every
answer is the question, so that a run alone computes to the bit what it would without a world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout
from finemoe.parallel.passes import Execute, OneAfterAnother

ROWS_FIGURE = "expert_rows_max_over_mean"
"""Of the layer where it is worst, the rows of the process that received most over the mean; 1 is even."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class Parts(Protocol):
    """A whole tensor, here or in files, of which parts are read. Every Tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        ...

    def __getitem__(self, index: slice | EllipsisType, /) -> Tensor:
        """Some of its rows; all of it with `...`."""
        ...


def require_shape(target: Tensor, whole: Parts) -> None:
    """Check that `whole` goes into `target`.

    Raises:
        ValueError: it is of another shape.
    """
    if target.shape != whole.shape:
        raise ValueError(f"shape {tuple(whole.shape)} does not go into {tuple(target.shape)}")


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

    @property
    def layout(self) -> Layout:
        """How they share the work."""
        ...

    @property
    def share(self) -> int:
        """Which share of every step's sequences this process reads, from 0."""
        ...

    @property
    def shares(self) -> int:
        """How many shares there are; processes that compute one sequence together read the same."""
        ...

    @property
    def piece(self) -> int:
        """Which piece of each of those sequences, from 0."""
        ...

    @property
    def pieces(self) -> int:
        """Into how many each is cut."""
        ...

    @property
    def stages(self) -> int:
        """How many pieces the model's blocks are cut into, each on ranks of its own."""
        ...

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over shares and pieces; a name that a rank does not have counts 0 there."""
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

    def spread(self, model: Transformer, products: torch.dtype | None = None) -> None:
        """Keep this process's pieces of a model that is whole here, in place; `products`: what autocast computes in."""
        ...

    def settle(self, model: Transformer) -> None:
        """After passes without a backward pass: what was put together for them is in pieces again."""
        ...

    def passes(self, model: Transformer) -> Execute:
        """What runs a step's micro-batches through what `spread` left of a model."""
        ...

    def measured(self, model: Transformer) -> Any:
        """What a measurement is given in the place of the model: whole, as far as it can tell."""
        ...

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Scalar: of all gradients together, wherever their pieces lie."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor that lies here, which is the tensor itself where it was not cut."""
        ...

    def first_row(self, tensor: Tensor) -> int:
        """The row of the whole tensor that the piece which lies here begins with; 0 where it was not cut."""
        ...

    def put(self, target: Tensor, whole: Parts) -> None:
        """Copy a whole tensor, or the piece of it that lies here, into one of the same whole shape.

        Raises:
            ValueError: the shapes differ.
        """
        ...

    def apart(self) -> Any:
        """A new group of all processes, over the CPU, for what meets the others beside training; or None.

        They wait in it as long as the slowest takes, and not `parallel.timeout` seconds. Where a process is alone, it
        has nobody to meet.
        """
        ...

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU where they were cut; on rank 0 only, none elsewhere."""
        ...

    def figures(self, arrived: Mapping[int, int]) -> dict[str, float]:
        """What to report of a step besides; `arrived`: rows that the experts which lie here took in it, by layer."""
        ...

    def everyone(self, value: Value, group: Any = None) -> list[Value]:
        """What each rank has, by rank; `group`: from `apart`, where one may keep the others waiting."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        ...

    def first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 made, for all: done once, where files are written or something is measured.

        Raises:
            FinemoeError: on all ranks, the one that rank 0 met.
        """
        ...

    def in_turn(self, make: Callable[[], Value]) -> Value:
        """What every rank makes for itself, rank 0 before the others: they then find its caches."""
        ...


@final
class _Solo:
    """One process."""

    rank = 0
    size = 1
    layout = Layout()
    share = piece = 0
    shares = pieces = stages = 1

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)

    def sum_tensors(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return dict(tensors)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        return None

    def spread(self, model: Transformer, products: torch.dtype | None = None) -> None:
        return None

    def settle(self, model: Transformer) -> None:
        return None

    def passes(self, model: Transformer) -> Execute:
        return OneAfterAnother(model)

    def measured(self, model: Transformer) -> Transformer:
        return model

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def first_row(self, tensor: Tensor) -> int:
        return 0

    @torch.no_grad()
    def put(self, target: Tensor, whole: Parts) -> None:
        require_shape(target, whole)
        target.copy_(whole[...])

    def apart(self) -> None:
        return None

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def figures(self, arrived: Mapping[int, int]) -> dict[str, float]:
        return {}

    def everyone(self, value: Value, group: Any = None) -> list[Value]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def first(self, make: Callable[[], Value]) -> Value:
        return make()

    def in_turn(self, make: Callable[[], Value]) -> Value:
        return make()


SOLO: World = _Solo()


def in_words(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 2, 3`."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
