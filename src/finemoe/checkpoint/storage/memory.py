"""Memory for weights that are about to be read, the element type they get there, and whether they are numbers."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from finemoe.checkpoint.storage.safetensors import TensorInfo
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.memory import use_huge_pages

_ROUTER = ".router."
_ALIGNED = 64  # bytes: a line of the cache, and the widest vector


def empty_tensors(wanted: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Tensor]:
    """Tensors of these shapes and types, side by side in one piece of memory, in large pages where the system has them.

    In one piece, because large pages begin and end at multiples of 2 MiB, which few tensors do.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()}
    whole = torch.empty(sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes.values()), dtype=torch.uint8)
    use_huge_pages(whole.data_ptr(), whole.nbytes)
    made, first = {}, 0
    for name, (shape, dtype) in wanted.items():
        made[name] = whole[first : first + sizes[name]].view(dtype).view(tuple(shape))
        first += -(-sizes[name] // _ALIGNED) * _ALIGNED
    return made


def mapped(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The bytes of whole tensors where they lie, in their rows, one mapping a file: none is read before it is used, and
    the system may give a page back and read it again. A file that is cut short meanwhile ends the process.

    Raises:
        CheckpointError: a file has gone, or was cut short since its header was read.
        RunError: it cannot be mapped.
    """
    pages: dict[Path, mmap.mmap] = {}
    found = {}
    for info in infos:
        if info.path not in pages:
            pages[info.path] = _pages(info.path)
        if len(pages[info.path]) < info.offset + info.nbytes:
            raise CheckpointError(f"{info.path}: ends within tensor {info.name!r}; it was cut short")
        bytes_ = torch.frombuffer(pages[info.path], dtype=torch.uint8, offset=info.offset, count=info.nbytes)
        found[info.name] = bytes_.view(*info.shape[:-1], info.shape[-1] * info.dtype.itemsize)
    return found


def _pages(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: has gone since it was opened") from error
    except (OSError, ValueError) as error:  # ValueError: it is empty by now
        raise RunError(f"{path}: cannot be mapped: {error}; try again") from error


def wanted_type(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Element type of a tensor that is stored as `stored`; routers are float32 whatever is asked for."""
    if not stored.is_floating_point:
        return stored
    return torch.float32 if _ROUTER in name else dtype or stored


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: there is one; names `where`.
    """
    if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):  # it passes NaN on
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{where}: {count} elements are NaN or infinite")
