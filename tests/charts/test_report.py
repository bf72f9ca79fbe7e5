"""The one writer of a report's folder, and what it may be written over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts import theme
from finemoe.charts.report import require_report_folder, write_report
from finemoe.core.errors import RunError

RESULTS = {"kind": "made up", "value": float("nan"), "points": [1, float("inf")], "é": "é"}


def figures(*names: str) -> Any:
    chart = theme.base([{"x": 1, "y": 2}]).mark_point().encode(x="x:Q", y="y:Q")
    return lambda results: dict.fromkeys(names, chart)


def page(results: Any) -> str:
    return f"<p>{results['kind']}</p>"


def test_a_folder_has_results_page_figures_and_what_lies_beside(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    write_report(out, RESULTS, page, figures("one"), beside={"items/m/t.jsonl": "1\n", "table.csv": "a,b\n"})
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "results.json", "report.html", "figures/one.svg", "figures/one.png", "items/m/t.jsonl", "table.csv"
    }  # fmt: skip
    text = (out / "results.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"kind": "made up", "value": None, "points": [1, None], "é": "é"}
    assert '"é"' in text
    assert text.endswith("}\n")
    assert (out / "report.html").read_text(encoding="utf-8") == "<p>made up</p>"


def test_figures_of_an_earlier_report_go_and_other_files_stay(tmp_path: Path) -> None:
    write_report(tmp_path, RESULTS, page, figures("one", "two"))
    (tmp_path / "figures" / "mine.txt").touch()
    write_report(tmp_path, RESULTS, page, figures("two"))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"two.svg", "two.png", "mine.txt"}


def test_a_page_that_fails_loses_no_results(tmp_path: Path) -> None:
    def broken(results: Any) -> str:
        raise KeyError("missing")

    with pytest.raises(KeyError):
        write_report(tmp_path, RESULTS, broken, figures("one"), beside={"table.csv": "a,b\n"})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["kind"] == "made up"
    assert (tmp_path / "table.csv").exists()


def test_what_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "figures").touch()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(tmp_path, RESULTS, page, figures("one"))
    with pytest.raises(RunError, match="cannot be written"):
        write_report(tmp_path / "figures" / "deeper", RESULTS, page, figures("one"))


@pytest.mark.parametrize(
    "inside", [{}, {".hidden": ""}, {"results.json": '{"kind": "load"}', "x": ""}, {"answers": ""}]
)
def test_a_new_an_empty_or_an_earlier_folder_may_be_written_over(inside: dict[str, str], tmp_path: Path) -> None:
    for name, text in inside.items():
        (tmp_path / name).write_text(text)
    assert require_report_folder(str(tmp_path), "load", ours=("answers",)) == tmp_path
    assert require_report_folder(tmp_path / "new", "load") == tmp_path / "new"


def test_no_folder_is_asked_for() -> None:
    assert require_report_folder(None, "load") is None


@pytest.mark.parametrize(
    "inside",
    [
        {"thesis.tex": ""},
        {"results.json": "{"},
        {"results.json": "[]"},
        {"results.json": '{"kind": "knockout"}'},
        {"results.json": "{}"},
        {"answers": ""},
    ],
)
def test_what_is_something_else_is_not_written_over(inside: dict[str, str], tmp_path: Path) -> None:
    for name, text in inside.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match="is not empty and holds no report of this kind"):
        require_report_folder(tmp_path, "load")


def test_what_the_terminal_says_needs_no_altair() -> None:
    """It takes half a second to load: words, numbers and the check of a folder do without."""
    charts = Path(theme.__file__).parent
    names = [".".join(path.with_suffix("").relative_to(charts).parts) for path in charts.rglob("words.py")]
    modules = ", ".join(f"finemoe.charts.{name}" for name in (*names, "numbers", "report"))
    code = f"import sys, {modules}; print([name for name in ('altair', 'vl_convert', 'jinja2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(names) >= 6
    assert done.stdout.strip() == "[]"
