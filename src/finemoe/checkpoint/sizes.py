"""What the weights of a model will take in memory, known from headers before it is opened."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from finemoe.checkpoint.gguf.opening import open_gguf
from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.language_model import Weights
from finemoe.checkpoint.open import read_model_config
from finemoe.checkpoint.storage.memory import wanted_type
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import formats_for, small_shape


def bytes_in_memory(path: str | os.PathLike[str], weights: Weights) -> int:
    """What the model at `path` takes at most, opened as `open_language_model` opens it; its cache aside.

    Blocks that stay blocks count as what they are in the file, and all else in the type that `weights` asks for.

    Raises:
        CheckpointError, ConfigError: nothing to open, or not exactly representable.
    """
    path = Path(path)
    if weights in ("auto", "stored") and kind_of(path) == "gguf":
        return _of_gguf(path)
    if weights in ("auto", "stored") and kind_of(path) == "imported":
        tensors = read_imported(path).tensors.tensors.values()
        return sum(one.nbytes if one.dtype is torch.uint8 else 4 * math.prod(one.shape) for one in tensors)
    shapes = model_shapes(read_model_config(path))
    if weights == "bf16":
        return sum(
            math.prod(shape) * wanted_type(name, torch.float32, torch.bfloat16).itemsize
            for name, shape in shapes.items()
        )
    formats = formats_for(weights, shapes) if weights == "int8" or weights == "int4" else {}
    blocks = sum(math.prod(small_shape(name, shapes[name], kind)) for name, kind in formats.items())
    return blocks + 4 * sum(math.prod(shape) for name, shape in shapes.items() if name not in formats)


def _of_gguf(path: Path) -> int:
    file = open_gguf(path)
    formats, total = file.formats(), 0
    for name, stored in file.account.items():
        kind, columns = file.tensors[name].kind, file.tensors[name].shape[-1]
        for part in stored.parts():
            total += part.rows * (kind.row_bytes(columns) if part.ours in formats else 4 * columns)
    return total
