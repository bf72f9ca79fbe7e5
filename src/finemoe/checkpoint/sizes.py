"""What the weights of a model will take in memory, known from headers before it is opened."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import torch

from finemoe.checkpoint.gguf.opening import open_gguf
from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.language_model import Weights
from finemoe.checkpoint.open import read_model_config, types_of
from finemoe.checkpoint.storage.memory import wanted_type
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import BF16, as_stored, formats_for, small_shape


def bytes_in_memory(path: str | os.PathLike[str], weights: Weights) -> int:
    """What the model at `path` takes at most, opened as `open_language_model` opens it; its cache aside.

    Blocks that stay blocks count as what they are in the file, and all else in the type that `weights` asks for.

    Raises:
        CheckpointError, ConfigError: nothing to open, or not exactly representable.
    """
    path = Path(path)
    if weights in ("auto", "stored") and kind_of(path) == "gguf":
        return _of_gguf(path)
    if weights == "auto" or weights == "stored":
        return _as_stored(path, weights)
    shapes = model_shapes(read_model_config(path))
    formats = {} if weights == "fp32" else formats_for(weights, shapes)
    blocks = sum(math.prod(small_shape(name, shapes[name], kind)) for name, kind in formats.items())
    return blocks + 4 * sum(math.prod(shape) for name, shape in shapes.items() if name not in formats)


def _as_stored(path: Path, weights: Literal["auto", "stored"]) -> int:
    kind = kind_of(path)
    if kind == "imported":
        infos = read_imported(path).tensors.tensors
        stored, shapes = {name: one.dtype for name, one in infos.items()}, {n: one.shape for n, one in infos.items()}
    else:
        config, given = types_of(path, kind)
        stored, shapes = dict(given), model_shapes(config)
    halves, total = as_stored(stored) if weights == "stored" else {}, 0
    small = bool(halves) or torch.uint8 in stored.values()
    for name, dtype in stored.items():
        if name in halves:
            total += math.prod(small_shape(name, shapes[name], halves[name]))
        else:
            as_float32 = (small or weights == "auto") and dtype is not torch.uint8
            wide = torch.float32 if as_float32 else wanted_type(name, dtype, None)
            total += math.prod(shapes[name]) * wide.itemsize
    return total


def _of_gguf(path: Path) -> int:
    file = open_gguf(path)
    formats, total = file.formats(), 0
    if torch.cuda.is_available() and set(formats.values()) == {BF16}:  # nothing keeps it from the GPU, in float32
        formats = {}
    for name, stored in file.account.items():
        kind, columns = file.tensors[name].kind, file.tensors[name].shape[-1]
        for part in stored.parts():
            total += part.rows * (kind.row_bytes(columns) if part.ours in formats else 4 * columns)
    return total
