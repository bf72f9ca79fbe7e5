"""Tensors of a checkpoint that lie in its files: each is read when it is asked for, whole or some of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import final

import torch
from torch import Tensor

from finemoe.checkpoint.storage.safetensors import TensorFolder


@final
class Filed:
    """One of them."""

    def __init__(self, folder: TensorFolder, name: str) -> None:
        self._folder, self._name = folder, name
        info = folder.info(name)
        self.shape, self.dtype = torch.Size(info.shape), info.dtype

    def __getitem__(self, index: slice | EllipsisType) -> Tensor:
        """Rows in a memory of their own; all of it with `...`.

        Raises:
            CheckpointError: the file was cut short since it was opened.
        """
        return self._folder.read(self._name, () if isinstance(index, EllipsisType) else (index,))


@final
class FiledTensors(Mapping[str, Tensor]):
    """Whole tensors by name. None is kept: who asks twice reads twice."""

    def __init__(self, folder: TensorFolder) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._folder.tensors:
            raise KeyError(name)
        return self._folder.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.tensors)

    def __len__(self) -> int:
        return len(self._folder.tensors)

    @property
    def unread(self) -> dict[str, Filed]:
        """The same, of which rows can be read."""
        return {name: Filed(self._folder, name) for name in self}


def unread(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | Filed]:
    """What can be read by rows where it lies in files; else the tensors themselves."""
    return tensors.unread if isinstance(tensors, FiledTensors) else tensors
