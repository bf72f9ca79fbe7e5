"""`finemoe analyze knockout` and `finemoe analyze relevance`: tables, JSON, reports, refusals, interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from finemoe.checkpoint.selection import read_selection
from finemoe.cli.analyze.knockout import knockout
from finemoe.cli.analyze.relevance import relevance
from finemoe.cli.main import Verbs
from finemoe.core import logs

TEXT = "def main():\n    return 1\n" * 6


def call(*arguments: Any) -> Any:
    """Run one of the verbs on a terminal of 80 columns."""
    app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(knockout)
    app.command()(relevance)

    @app.callback()
    def _main(debug: bool = False) -> None:
        logs.set_up(debug=debug)

    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def texts(folder: Path) -> list[str]:
    for name, text in (("code", TEXT), ("prose", "main return def " * 9)):
        (folder / f"{name}.txt").write_text(text)
    return [f"--corpus={name}={folder / name}.txt" for name in ("code", "prose")]


@pytest.fixture
def few(run_directory: Path, tmp_path: Path) -> list[Any]:
    return [run_directory, *texts(tmp_path), "--tokens", 60, "--length", 16]


def test_table_fits_80_columns_and_says_what_was_left_out(few: list[Any]) -> None:
    result = call("knockout", *few, "--experiment", "masked,shared,active,layers")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("top 1/16 left out (4 of 63)", "7 active (as trained)", "shared experts out", "layer 2, routed"):
        assert words in result.stdout


def test_single_experts_and_pairs_can_be_picked(few: list[Any]) -> None:
    picks = ["--layer", 1, "--expert", 3, "--expert", 5]
    result = call("knockout", *few, "--experiment", "experts,pairs", *picks, "--json")
    found = json.loads(result.stdout)
    assert found["kind"] == "knockout"
    assert [(r["layer"], r["expert"]) for r in found["experiments"]["experts"]["records"]] == [(1, 3), (1, 5)]
    assert [r["experts"] for r in found["experiments"]["pairs"]["records"]] == [[3, 5]]
    assert set(found["text"]["domains"]) == {"code", "prose"}
    assert found["model"]["moe_layers"]["1"] == {"routed": 63, "active": 7, "shared": 1, "router": "softmax_topk"}
    table = call("knockout", *few, "--experiment", "experts,pairs", *picks).stdout
    assert "layer 1, expert 3" in table
    assert "layer 1, 3 and 5" in table


def test_report_has_a_page_the_results_and_figures(few: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("knockout", *few, "--experiment", "active", "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    assert found["complete"]
    assert found["schema"] == 1
    assert found["machine"]["cores"]
    assert "Fewer active experts" in (out / "report.html").read_text()
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".png"}
    assert str(out / "report.html") in result.stdout.replace("\n", "")


def test_ctrl_c_writes_what_is_finished(few: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finemoe.analysis import knockout as laboratory

    def interrupted(asked: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(laboratory.EXPERIMENTS, "experts", interrupted)
    result = call("knockout", *few, "--experiment", "active,experts", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not found["complete"]
    assert set(found["experiments"]) == {"active"}
    assert "incomplete" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "maskd"], "unknown experiment `maskd`, did you mean `masked`?"),
        (["--experiment", ","], "no experiment is named"),
        (["--layer", 7], "layer 7 has no routed experts; the MoE layers of this model are 0, 1, 2"),
        (["--expert", 63], "expert 63 does not exist: they are numbered 0 to 62"),
        (["--pairs", 1], "at least 2 experts make a pair"),
        (["--batch", 0], "Invalid value for '--batch'"),
    ],
)
def test_mistakes_are_named(few: list[Any], arguments: list[Any], message: str) -> None:
    result = call("knockout", *few, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_relevance_writes_a_selection_that_fits_its_model(few: list[Any], tmp_path: Path) -> None:
    from finemoe.checkpoint.open import read_model_config

    path, report = tmp_path / "s.json", tmp_path / "report"
    result = call("relevance", *few, "--score", "token", "--p", 0.3, "--out", path, "--report", report)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:10])) <= 80
    selection = read_selection(path, read_model_config(few[0]))
    assert (selection.score, selection.p) == ("token", 0.3)
    assert selection.source == str(few[0])
    found = json.loads((report / "results.json").read_text())
    assert found["selection"]["trainable_parameters"] == selection.trainable_parameters
    assert "The experts a task needs" in (report / "report.html").read_text()
    shown = json.loads(call("relevance", *few, "--json").stdout)
    assert shown["selection"]["p"] == 0.1


@pytest.mark.parametrize("p", ["0", "-1", "1.01"])
def test_impossible_shares_are_refused(few: list[Any], p: str) -> None:
    result = call("relevance", *few, "--p", p)
    assert result.exit_code == 2
    assert "above 0 and at most 1" in result.stderr


def test_dense_models_have_nothing_to_knock_out(tmp_path: Path) -> None:
    from finemoe.checkpoint.run_state.state import RunState, save
    from finemoe.model.config import expand
    from finemoe.model.initialize import initialize
    from finemoe.model.presets import resolve
    from finemoe.model.transformer import Transformer
    from finemoe.text.tokenizer import Tokenizer

    config = expand(resolve({"preset": "tiny-dense", "vocab_size": 300}, "test"))
    model = Transformer(config)
    initialize(model, seed=1)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    (tmp_path / "config.json").write_text(text)
    save(tmp_path / "checkpoints", 1, RunState(model.state_dict(), {}, {"step": 1}, text), keep=1)
    Tokenizer.train([TEXT], vocab_size=290).save(tmp_path / "tokenizer.json")
    for verb in ("knockout", "relevance"):
        result = call(verb, tmp_path, "--text", "def main")
        assert result.exit_code == 2
        assert "dense" in result.stderr
