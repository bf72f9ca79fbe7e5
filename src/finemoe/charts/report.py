"""The folder of a report: results.json, report.html and figures/, whoever made it. This module alone writes one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from finemoe.charts.numbers import Results, clean
from finemoe.core.errors import RunError
from finemoe.core.files import make_folder, storage_error, write_text
from finemoe.core.reading import decode_json

Page = Callable[[Results], str]
Figures = Callable[[Results], Mapping[str, Any]]


def require_report_folder(out: str | os.PathLike[str] | None, kind: str, *, ours: Collection[str] = ()) -> Path | None:
    """The folder `out`, if a report may be written to it: it is new, empty, or holds an earlier one of the same kind.

    Args:
        out: may not exist yet; None where no report is wanted, and then nothing is returned.
        kind: what results.json of such a report says under `kind`.
        ours: entries that only an unfinished report of this kind leaves.

    Raises:
        RunError: it holds something else, which would be written over.
    """
    if out is None:
        return None
    folder = Path(out)
    try:
        inside = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
        if not inside or inside & set(ours):
            return folder
        found = decode_json((folder / "results.json").read_bytes()) if "results.json" in inside else None
    except OSError as error:
        raise storage_error(folder, error) from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise RunError(f"{folder} is not empty and holds no report of this kind ({kind}); choose another --out")
    return folder


def write_report(
    folder: Path, results: Results, page: Page, figures: Figures, beside: Mapping[str, str] | None = None
) -> None:
    """Write results.json, then what is made of it: `beside`, report.html, and figures/ as SVG and PNG.

    Args:
        folder: made where it does not exist.
        results: what is not finite in it becomes null, for which JSON has a name.
        page: report.html.
        figures: every figure by file name; figures of an earlier report, which may have had more, are removed.
        beside: the text of other files, by their place in the folder.

    Raises:
        RunError: it cannot be written.
    """
    from finemoe.charts import theme  # altair takes a while, and a folder is checked before any work

    try:
        _write(folder / "results.json", json.dumps(clean(results), indent=1, ensure_ascii=False) + "\n")
        for name, text in (beside or {}).items():
            _write(folder / name, text)
        _write(folder / "report.html", page(results))
        for old in (folder / "figures").glob("*.[sp][vn]g"):
            old.unlink()
        theme.save(figures(results), folder / "figures")
    except OSError as error:
        raise storage_error(folder, error) from error


def _write(path: Path, text: str) -> None:
    make_folder(path.parent)
    write_text(path, text)
