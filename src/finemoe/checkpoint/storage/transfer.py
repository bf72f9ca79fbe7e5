"""What both directions of a conversion need: a fingerprint, progress, and a look at every element."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.core.errors import CheckpointError
from finemoe.core.logs import progress

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that travel with the weights."""


@contextlib.contextmanager
def named(where: Path | str) -> Iterator[None]:
    """Put `where` before the messages of what knows no paths.

    Raises:
        CheckpointError: as raised inside.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def fingerprint(verb: str, tensors: TensorFolder, settings: Any) -> str:
    """Tells whether an interrupted conversion was one of the same files with the same JSON-able `settings`."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in tensors.files]
    headers = [(info.name, str(info.dtype), info.shape, info.offset) for info in tensors.tensors.values()]
    return f"{verb} {hashlib.sha256(json.dumps([stats, headers, settings]).encode()).hexdigest()}"


@contextlib.contextmanager
def mebibytes(description: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Progress over `total` bytes; yields `advance(bytes)`."""
    if quiet:
        yield lambda _: None
        return
    done = 0
    with progress(description, total >> 20, "MiB") as advance:

        def count(nbytes: int) -> None:
            nonlocal done
            advance((done + nbytes >> 20) - (done >> 20))
            done += nbytes

        yield count


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: there is one; names `where`.
    """
    if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):  # it passes NaN on
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{where}: {count} elements are NaN or infinite")
