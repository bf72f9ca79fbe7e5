"""What a power cut would leave: the order in which files and folders were synced and renamed.

A file's bytes are safe when the file was synced, its name when the folder was. What was renamed has its new name for
good when the folder was synced after that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_Call = tuple[str, int]
"""`sync` or `rename`, and the inode, which stays through a renaming."""


@dataclass
class Recorder:
    """Every sync and renaming since `record`, in order."""

    calls: list[_Call] = field(default_factory=list)

    def assert_appeared_for_good(self, place: Path) -> None:
        """`place`, a file or a folder of files, was whole on the disk before it got its name, and has it for good."""
        renamed = self._only("rename", place)
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
        assert files
        written = [self._last_before(renamed, path) for path in files]
        if place.is_dir():
            assert self._last_before(renamed, place) > max(written), f"{place.name} was synced before its last file"
        assert self._is_synced(place.parent, after=renamed), f"nothing keeps the new name of {place.name}"

    def _only(self, call: str, path: Path) -> int:
        found = [at for at, done in enumerate(self.calls) if done == (call, path.stat().st_ino)]
        assert len(found) == 1, f"{path.name}: {len(found)} times {call}"
        return found[0]

    def _last_before(self, end: int, path: Path) -> int:
        found = [at for at, done in enumerate(self.calls[:end]) if done == ("sync", path.stat().st_ino)]
        assert found, f"{path.name} was not synced before it appeared"
        return found[-1]

    def _is_synced(self, folder: Path, after: int) -> bool:
        return ("sync", folder.stat().st_ino) in self.calls[after:]

    def assert_made_for_good(self, folder: Path) -> None:
        """A new folder's own name was synced."""
        assert self._is_synced(folder.parent, after=0), f"nothing keeps the name of {folder.name}"


def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Watch every sync and renaming of this process from now on."""
    recorder = Recorder()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watched_fsync(file: int) -> None:
        fsync(file)
        recorder.calls.append(("sync", os.fstat(file).st_ino))

    def watched_rename(source: Any, target: Any) -> None:
        rename(source, target)
        recorder.calls.append(("rename", os.stat(target).st_ino))

    def watched_replace(source: Any, target: Any) -> None:
        replace(source, target)
        recorder.calls.append(("rename", os.stat(target).st_ino))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "replace", watched_replace)
    return recorder
