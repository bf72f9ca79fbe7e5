"""What a run directory says of itself, for those who need no torch to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finemoe.checkpoint.kinds import COMPARISON, models_below
from finemoe.core.errors import RunError


def require_run(directory: Path) -> None:
    """Check that a run was begun in `directory`.

    Raises:
        RunError: not a run directory, or one checkpoint of a run.
    """
    if (directory / "manifest.json").exists() and (directory / "state.json").exists():
        raise RunError(f"{directory}: is one checkpoint of a run; give the run's own directory, two above it")
    if (directory / COMPARISON).exists():
        raise RunError(
            f"{directory}: is a comparison of several runs: `finemoe resume {directory}` on the command line goes on "
            "with all of them, and each lies in a folder of its own below arms/"
        )
    if not (directory / "config.json").exists():
        if several := models_below(directory):
            listed = ", ".join(map(str, several[:5])) + (" ..." if len(several) > 5 else "")
            raise RunError(f"{directory}: holds several runs; name one of them: {listed}")
        raise RunError(f"{directory}: not a run directory (no config.json); `finemoe train RECIPE` starts one")


def read_summary(directory: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None while it is not.

    Raises:
        RunError: it cannot be read.
    """
    return read_object(directory / "summary.json")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
        RunError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: unreadable: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: must hold a JSON object, not {type(found).__name__}")
    return found
