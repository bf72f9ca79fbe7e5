"""A copy of a run's state, so that training may go on while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from finemoe.checkpoint.run_state.state import RunState
from finemoe.core import memory

_ALIGNMENT = 64
_MOST_OF_MEMORY = 0.75  # of what is available; the rest is for what the run has not needed yet


class NoRoomError(Exception):
    """The copy would take more memory than there is. It never leaves the process."""

    def __init__(self, needed: int, available: int, sharers: int = 1) -> None:
        here = f" for {sharers} processes of this machine, which take one each" if sharers > 1 else ""
        super().__init__(f"{needed / 2**30:.2f} GiB, and {available / 2**30:.2f} GiB are available{here}")


_Layout = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@final
class Snapshot:
    """Memory for one copy, used again by the next one."""

    def __init__(self, sharers: int = 1) -> None:
        """`sharers`: processes of this machine that take a copy each at the same time, this one among them."""
        self._layout: _Layout = ()
        self._places: list[Tensor] = []
        self._sharers = sharers

    def make_room(self, run: RunState) -> None:
        """Have the memory for `take` of `run`.

        Sharers do so before any of them copies: what one has filled is not available to the others any more.

        Raises:
            NoRoomError: there is too little memory.
        """
        tensors = [tensor for part in run.tensors for tensor in part.values()]
        names = [name for part in run.tensors for name in part]
        layout = tuple((name, tuple(value.shape), value.dtype) for name, value in zip(names, tensors, strict=True))
        if layout != self._layout:
            self._places, self._layout = [], ()  # the old ones first: there is room for one copy
            self._places, self._layout = _places(tensors, self._sharers), layout

    def leave(self) -> None:
        """Give the memory back: no copy is taken after all."""
        self._places, self._layout = [], ()

    def take(self, run: RunState) -> RunState:
        """`run` with every tensor copied to the CPU; valid until the next `make_room` or `take`.

        Raises:
            NoRoomError: there is too little memory; nothing was copied.
        """
        self.make_room(run)
        tensors = [tensor for part in run.tensors for tensor in part.values()]
        with torch.no_grad():
            for place, tensor in zip(self._places, tensors, strict=True):
                place.copy_(tensor)
        copies = iter(self._places)
        model, optimizer, method = (_filled(part, copies) for part in run.tensors)
        return replace(run, model=model, optimizer=optimizer, method=method)


def _filled(names: Mapping[str, Tensor], copies: Iterator[Tensor]) -> dict[str, Tensor]:
    return {name: next(copies) for name in names}


def _places(tensors: Sequence[Tensor], sharers: int) -> list[Tensor]:
    """Room for each of `tensors` in one block, which NumPy asks the system for in huge pages."""
    starts, at = [], 0
    for tensor in tensors:
        starts.append(at)
        at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    available = memory.available_bytes()
    if available is not None and at * sharers > _MOST_OF_MEMORY * available:
        raise NoRoomError(at, available, sharers)
    try:
        block = torch.from_numpy(np.empty(at, dtype=np.uint8))
    except MemoryError as error:
        raise NoRoomError(at, 0) from error
    return [
        block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
