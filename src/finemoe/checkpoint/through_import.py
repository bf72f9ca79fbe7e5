"""From any source to any format: what is foreign is imported first, into the workspace of what is written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.checkpoint.gguf.opening import import_gguf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.kinds import is_imported, kind_of
from finemoe.checkpoint.storage.workspace import appear, check_apart, fingerprint, workspace
from finemoe.core.errors import FinemoeError
from finemoe.core.logs import logger


@dataclass(frozen=True)
class Passage:
    """Where to export from and to, and what to do when that is done."""

    source: Path
    """A run, a checkpoint of one, or an imported folder."""
    place: Path
    """To write; it has its name `out` after `appear`."""
    appear: Callable[[], None]
    said: Callable[[str], str]
    """A message about these two paths as one about those that the user gave."""


@contextmanager
def passage(source: Path, out: Path, options: Mapping[str, Any], *, quiet: bool = False) -> Iterator[Passage]:
    """What to export, as `export_hf` and `export_gguf` take it.

    A Hugging Face folder or GGUF file is imported into `<out>.partial`, where the export is written too. Killed at any
    moment, the same call takes over what is there: it goes on with the import, or uses the finished one.

    Args:
        source: whatever opens.
        out: folder or file to make.
        options: of the export, JSON-able; another call with others does not take over.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: `source` cannot be imported, or `out` cannot be made; nothing is left behind.
        RunError: the disk is full or unwritable, or another process is at work there.
    """
    kind = kind_of(source)
    check_apart(source, out)
    if kind in ("run", "imported"):
        yield Passage(source, out, lambda: None, str)
        return
    mark = fingerprint("export-of-foreign", _files(source), dict(options))
    inner = f"written/{out.name}"
    with workspace(out, mark, 0, inner=inner) as folder:
        there = Path(os.path.realpath(source))
        imported, place = folder / "source" / (there.stem if kind == "gguf" else there.name), folder / inner

        def said(text: str) -> str:
            return text.replace(str(place), str(out)).replace(str(imported), str(source))

        try:
            if is_imported(imported):
                logger.info("the import of %s was there from an interrupted export", source)
            else:
                (import_gguf if kind == "gguf" else import_hf)(source, imported, quiet=quiet)
            _remove(place)  # complete, but never given its name
            yield Passage(imported, place, lambda: appear(folder, inner, Path(os.path.realpath(out))), said)
        except FinemoeError as error:  # nobody knows the folders in there
            raise type(error)(said(str(error))) from error


def _files(source: Path) -> list[Path]:
    """The files of a foreign source."""
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.is_file())
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", source.stem)
    named = (path for path in source.parent.iterdir() if path.name.startswith(stem))
    return sorted(path for path in named if path.suffix.lower() == ".gguf")


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
