"""Tensors of any bytes, and folders that hold them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finemoe.checkpoint.storage.safetensors import TensorFolder, raw_bytes


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bytes are a tensor, except for bool."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape) > 0
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


def folder_of(folder: Path, contents: dict[str, Tensor]) -> TensorFolder:
    save_file(contents, folder / "model.safetensors")
    return TensorFolder.open(folder)
