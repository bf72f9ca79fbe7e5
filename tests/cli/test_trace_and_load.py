"""`finemoe trace` and `finemoe analyze load`: files, tables, JSON, and errors in words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from finemoe.analysis.trace import read_trace, trace_info
from finemoe.cli.analyze.load import load
from finemoe.cli.main import Verbs, finemoe
from finemoe.cli.trace import trace

app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False, rich_markup_mode=None)
app.callback()(finemoe)
app.command("trace")(trace)
app.command("load")(load)


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    (tmp_path / "code.py").write_text("def main():\n    return 1\n" * 40)
    (tmp_path / "prose.txt").write_text("the cat sat on the mat.\n" * 40)
    return ["--corpus", f"code={tmp_path / 'code.py'}", "--corpus", f"prose={tmp_path / 'prose.txt'}"]


def call(*words: str | Path) -> Any:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_trace_and_the_load_agree(run_directory: Path, text: list[str], tmp_path: Path):
    out = tmp_path / "t.parquet"
    traced = json.loads(call("trace", run_directory, *text, "--tokens", "300", "--out", out, "--json").stdout)
    assert traced["rows"] == trace_info(out).rows == 3 * sum(traced["tokens"].values())
    found = json.loads(call("load", run_directory, *text, "--tokens", "300", "--json").stdout)
    (one,) = found["series"]
    for number, layer in one["layers"].items():
        counts: Counter[int] = Counter()
        for batch in read_trace(out, layers=[int(number)]):
            counts.update(batch["expert_ids"].flatten().to_pylist())
        assert layer["load"] == [counts[expert] for expert in range(layer["experts"])]
        assert traced["summary"]["layers"][number]["load"] == layer["load"]
    assert found["text"]["tokens"] == traced["tokens"]
    assert found["machine"]["packages"]["torch"]


def test_the_tables_fit_a_terminal(run_directory: Path, text: list[str], tmp_path: Path):
    shown = call("trace", run_directory, *text, "--tokens", "200", "--out", tmp_path / "t.parquet").stdout
    assert "Rows  1,200, one for each token and MoE layer" in shown
    shown += call("load", run_directory, *text, "--tokens", "200").stdout
    assert "7 of 63" in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 80


def test_a_report_is_written(run_directory: Path, text: list[str], tmp_path: Path):
    call("load", run_directory, *text, "--tokens", "200", "--out", tmp_path / "report")
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {"schema", "finemoe_version", "command", "date", "machine", "series", "lift"} <= results.keys()
    assert "<title>Expert load</title>" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "figures" / "load.svg").exists()
    assert (tmp_path / "report" / "together.npz").exists()


def test_nothing_is_overwritten(run_directory: Path, tmp_path: Path):
    out = tmp_path / "t.parquet"
    out.write_text("mine")
    result = call("trace", run_directory, "--text", "the cat", "--out", out)
    assert result.exit_code == 2
    assert "exists; nothing is overwritten" in result.stderr
    assert out.read_text() == "mine"
    result = call("trace", run_directory, "--text", "the cat", "--out", tmp_path)
    assert result.exit_code == 2
    assert "is a folder" in result.stderr


@pytest.mark.parametrize("verb", ["trace", "load"])
def test_what_cannot_work_is_said_in_words(verb: str, run_directory: Path, tmp_path: Path):
    out = ["--out", tmp_path / "new.parquet"] if verb == "trace" else []
    result = call(verb, tmp_path / "missing", "--text", "a", *out)
    assert result.exit_code == 2
    assert "there is nothing here" in result.stderr.replace("\n", " ")
    result = call(verb, run_directory, "--corpus", f"a={tmp_path / 'missing.txt'}", *out)
    assert result.exit_code == 2
    assert "missing.txt" in result.stderr
    assert not (tmp_path / "new.parquet").exists()
