"""The files of a checkpoint, without a look into the weights: manifests, links, pickles, code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.checkpoint.doctor.findings import Findings, few, number
from finemoe.checkpoint.kinds import CONFIG, MANIFEST
from finemoe.checkpoint.storage.untrusted import PICKLES, folder_file, read_json
from finemoe.core.errors import CheckpointError
from finemoe.core.logs import mebibytes

_MANIFEST_BYTES = 256 << 20
_CHUNK = 8 << 20


def check_manifest(folder: Path, found: Findings, *, deep: bool, quiet: bool) -> None:
    """Compare every file that manifest.json names: its size, and when `deep` its checksum.

    Raises:
        CheckpointError: the manifest itself is unreadable.
    """
    files = read_json(folder_file(folder, MANIFEST), _MANIFEST_BYTES).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST}: lists no `files`")
    sizes = [entry.get("bytes") if isinstance(entry, dict) else None for entry in files.values()]
    total = sum(size for size in sizes if isinstance(size, int))
    with mebibytes(f"checking {folder.name}", total, quiet or not deep) as advance:
        for name, entry in files.items():
            with found.guard("files"):
                _check_file(folder_file(folder, name), entry if isinstance(entry, dict) else {}, deep)
            size = entry.get("bytes") if isinstance(entry, dict) else None
            advance(size if isinstance(size, int) else 0)


def _check_file(path: Path, entry: Mapping[str, Any], deep: bool) -> None:
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise CheckpointError(f"{path}: has {size:,} bytes, and {MANIFEST} says {_shown(entry.get('bytes'))}")
    if not deep:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    if digest.hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path}: its content has changed: it does not have the checksum in {MANIFEST}")


def _shown(size: Any) -> str:
    return f"{size:,}" if isinstance(size, int) else "nothing of it"


def check_folder(folder: Path, raw: Mapping[str, Any], found: Findings) -> None:
    """Name what lies in a folder and is never opened: code, pickles, links that lead out.

    Args:
        folder: with the checkpoint in it.
        raw: its config.json, which may name code.
        found: gets a finding for each kind.
    """
    names = sorted(os.listdir(folder))
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if pickles:
        what = number(len(pickles), "pickle file")
        found.note("files", f"{what}, which may run code when opened and never is: {few(pickles)}")
    code = [name for name in names if name.endswith(".py")]
    if raw.get("auto_map") or code:
        named = few(code) if code else "named by `auto_map` alone"
        found.note("files", f"Python code of the repository is never run: {named}")
    for name in names:
        if (folder / name).is_symlink():
            _check_link(folder, name, found)
    partial = Path(f"{folder}.partial")
    if partial.exists():
        found.note("files", f"{partial}: left by an interrupted conversion; remove it if it is not to be finished")


def _check_link(folder: Path, name: str, found: Findings) -> None:
    path = folder / name
    try:
        if path.is_dir() and path.resolve().is_relative_to(folder.resolve()):
            return
        folder_file(folder, name)
    except (CheckpointError, OSError, RuntimeError) as error:
        needed = name == CONFIG or name.endswith((".safetensors", ".json", ".jinja"))
        (found.problem if needed else found.warning)("files", str(error))
