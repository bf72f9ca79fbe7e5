"""Element types of GGUF: their sizes, their values, and the header of a file. The one module that knows `gguf`.

Every row of a quantised tensor is whole blocks of one size, so rows can be read and written apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finemoe.core.errors import CheckpointError, ConfigError

PLAIN: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose elements PyTorch holds as they are; all others become F32."""
FILE_TYPES: dict[str, int] = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
"""Types that a file is written in, with the number that `general.file_type` has for them."""
KEPT_TYPES = FILE_TYPES | {"Q4_1": 3, "Q4_K": 15, "Q6_K": 18}
"""The same, and types whose blocks are passed on as they are."""

_F16_MAX = 65504.0
_PIECE = 1 << 22  # elements that are dequantised at once


@dataclass(frozen=True)
class ElementType:
    """How elements are stored."""

    number: int
    name: str
    block: int
    """Elements in a block."""
    block_bytes: int
    readable: bool

    def row_bytes(self, columns: int) -> int:
        """Size of a row, which must be whole blocks."""
        return columns // self.block * self.block_bytes

    @property
    def dtype(self) -> torch.dtype:
        """Of what `decode` returns."""
        return PLAIN.get(self.name, torch.float32)


def element_types() -> dict[int, ElementType]:
    """All types that a file may name, by number.

    Raises:
        ConfigError: the `gguf` package is not installed.
    """
    gguf = _package()
    table = {}
    for kind, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        table[int(kind)] = ElementType(int(kind), kind.name, block, block_bytes, _readable(gguf, kind, block_bytes))
    return table


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the gguf package: pip install 'finemoe[gguf]'") from error
    return gguf


def _readable(gguf: ModuleType, kind: Any, block_bytes: int) -> bool:
    if kind.name in PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def decode(data: bytearray, kind: ElementType, columns: int) -> Tensor:
    """The elements `[rows, columns]` of whole rows, in `kind.dtype`."""
    raw = torch.frombuffer(data, dtype=torch.uint8)
    if kind.name in PLAIN:
        return raw.view(PLAIN[kind.name]).view(-1, columns)
    gguf = _package()
    rows = raw.numpy().reshape(-1, kind.row_bytes(columns))
    values = np.empty((len(rows), columns), np.float32)
    step = max(1, _PIECE // columns)  # the package makes several copies of what it is given
    with np.errstate(all="ignore"):  # a damaged scale may be NaN; whoever asked looks at the values
        for at in range(0, len(rows), step):
            piece = gguf.quants.dequantize(rows[at : at + step], gguf.GGMLQuantizationType(kind.number))
            values[at : at + step] = piece
    return torch.from_numpy(values)


def encode(values: Tensor, kind: str, name: str) -> memoryview:
    """Rows `[rows, columns]` as a file holds them.

    Raises:
        CheckpointError: a value that `kind` cannot hold; names the tensor `name`.
    """
    largest = values.abs().max().item() if values.numel() else 0.0
    limit = {"F16": _F16_MAX, "Q8_0": 127 * _F16_MAX, "Q4_0": 8 * _F16_MAX}.get(kind, math.inf)
    if not largest <= limit or math.isinf(largest):
        raise CheckpointError(f"tensor {name!r} has a value of size {largest:g}, which {kind} cannot hold")
    if kind in PLAIN:
        return _bytes(values.to(PLAIN[kind]))
    gguf = _package()
    rows = np.ascontiguousarray(values.float().numpy())
    return memoryview(gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])).cast("B")


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Planned:
    """A tensor that a file will hold."""

    name: str
    shape: tuple[int, ...]
    kind: str

    def nbytes(self) -> int:
        """Size in the file, without padding."""
        block, block_bytes = _package().GGML_QUANT_SIZES[_package().GGMLQuantizationType[self.kind]]
        return int(math.prod(self.shape) // block * block_bytes)


def write_header(path: Path, architecture: str, values: Mapping[str, Any], tensors: Iterable[Planned]) -> int:
    """Write everything but the tensors' data; the alignment in bytes to which each tensor is padded.

    Args:
        path: of the new file.
        architecture: value of `general.architecture`.
        values: metadata; whole numbers become uint32, fractions float32, lists arrays.
        tensors: in the order in which their data will follow.
    """
    gguf = _package()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in values.items():
            _add(writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes(), kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return int(writer.data_alignment)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, list(value))
    else:
        raise TypeError(f"{key}: {type(value).__name__} has no place in a GGUF file")
