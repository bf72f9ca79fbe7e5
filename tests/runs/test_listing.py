"""What `list_runs` says of runs in every state, from files that may be missing, cut off or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import RunError
from finemoe.core.files import sole_writer
from finemoe.runs import listing
from finemoe.runs.listing import RunInfo, list_runs, look_at
from finemoe.runs.run import train
from runs.tiny_runs import recipe

CONFIG = {
    "model": {"hidden_size": 16, "blocks": [{"feed_forward": {"kind": "dense"}}]},
    "training": {"steps": None, "tokens": 6500, "tokens_per_step": 1000},
}


def make(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"config": CONFIG, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / (f"{name}.jsonl" if name == "metrics" else f"{name}.json")).write_text(text)
    return folder


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


STEP = {"kind": "step", "step": 3, "loss": 4.0, "tokens": 3000}
MEASURED = {"kind": "validation", "step": 2, "tokens": 2000, "seconds": 1.0, "validation_loss": 4.5, "max_vio": 1.0}


def test_a_run_that_was_trained(corpus: Path, tmp_path: Path) -> None:
    run = train(recipe(corpus), out=tmp_path / "runs" / "one", quiet=True)
    [found] = list_runs(tmp_path / "runs")
    assert (found.kind, found.state, found.done, found.planned) == ("run", "finished", 6, 6)
    assert found.model == "2×16, 7 of 15+1"
    assert (found.loss, found.measures) == (run.summary["final_validation_loss"], "loss")
    assert found.bytes > 10_000
    assert abs(found.changed - (run.directory / "metrics.jsonl").stat().st_mtime) < 1
    json.dumps(found.to_dict())
    assert list_runs(run.directory) == [found]


def test_states(tmp_path: Path) -> None:
    stopped = look_at(make(tmp_path / "stopped", metrics=lines(MEASURED, STEP)))
    assert (stopped.state, stopped.done, stopped.planned, stopped.loss) == ("stopped", 3, 6, 4.5)
    failure = {"step": 4, "message": "step 4 is not finite"}
    failed = look_at(make(tmp_path / "failed", metrics=lines(STEP), failure=failure))
    assert (failed.state, failed.message) == ("failed", "step 4 is not finite")
    gone_on = look_at(make(tmp_path / "gone-on", metrics=lines({**STEP, "step": 5}), failure=failure))
    assert (gone_on.state, gone_on.message) == ("stopped", None)
    passed = look_at(make(tmp_path / "passed", metrics=lines(STEP, {"kind": "skipped", "step": 4, "tokens": 4000})))
    assert passed.done == 4
    begun = look_at(make(tmp_path / "begun"))
    assert (begun.state, begun.done, begun.loss) == ("stopped", 0, None)
    longer = make(tmp_path / "longer", summary={"steps": 4, "final_validation_loss": 2.0})
    assert look_at(longer).state == "stopped"  # config.json asks for more since
    bound = {**CONFIG, "training": {"steps": 90, "tokens_per_step": 1000, "max_tokens": 4000}}
    for tokens, state, planned in ((4100, "finished", 4), (4000, "finished", 4), (3999, "stopped", 90)):
        figures = {"steps": 4, "tokens": tokens, "final_validation_loss": 2.0}
        found = look_at(make(tmp_path / f"bound-{tokens}", config=bound, summary=figures))
        assert (found.state, found.done, found.planned) == (state, 4, planned)
    with sole_writer(tmp_path / "begun"):
        assert look_at(tmp_path / "begun").state == "running"
    assert look_at(tmp_path / "begun").state == "stopped"


@pytest.mark.parametrize(
    "files",
    [
        {"metrics": lines(STEP) + '{"kind": "st'},
        {"metrics": lines(STEP) + "not json\n"},
        {"metrics": lines(STEP) + "[1, 2]\n"},
        {"metrics": lines(STEP), "summary": "{"},
        {"metrics": lines(STEP), "summary": "[" * 10_000},
        {"metrics": lines(STEP), "failure": "3"},
        {"metrics": lines(STEP), "config": "{}"},
        {"metrics": lines(STEP), "config": {"model": {"blocks": [3]}, "training": {"tokens": "many"}}},
    ],
)
def test_what_is_damaged_leaves_a_figure_out_and_hides_no_run(tmp_path: Path, files: dict[str, Any]) -> None:
    run = make(tmp_path / "runs" / "one", **files)
    (run / "checkpoints").mkdir()
    [found] = list_runs(tmp_path / "runs")
    assert (found.state, found.done) == ("stopped", 3)


def test_a_comparison_stands_for_its_runs_and_its_folder_lists_them(tmp_path: Path) -> None:
    home = tmp_path / "runs" / "demo"
    done = {"steps": 6, "final_validation_loss": 3.0}
    make(home / "arms" / "dense" / "seed-0", summary=done)
    make(home / "arms" / "switch" / "seed-0", metrics=lines(STEP))
    (home / "compare.json").write_text(json.dumps({"name": "demo", "arms": ["dense", "switch"], "seeds": [0]}))

    def states() -> list[tuple[str, str, int | None, int | None]]:
        return [(one.kind, one.state, one.done, one.planned) for one in list_runs(tmp_path / "runs")]

    assert states() == [("comparison", "stopped", 1, 2)]
    (home / "arms" / "switch" / "seed-0" / "summary.json").write_text(json.dumps({**done, "final_validation_loss": 2}))
    (home / "results.json").write_text("{}")
    assert states() == [("comparison", "finished", 2, 2)]
    arms = list_runs(home)
    assert [one.path.parent.name for one in arms] == ["dense", "switch"]
    assert [one.state for one in arms] == ["finished", "finished"]
    [whole] = list_runs(tmp_path / "runs")
    assert whole.loss == 2.0


def test_a_reward_is_no_loss(tmp_path: Path) -> None:
    """A column of both told neither; and of rewards the largest is the best."""
    home = tmp_path / "runs" / "demo"
    for seed, reward in enumerate((0.25, 0.75)):
        summary = {
            "steps": 6,
            "final_training_loss": 0.1,
            "final_validation_reward": reward,
            "final_validation_length": 3,
        }
        make(home / "arms" / "own" / f"seed-{seed}", summary=summary)
    (home / "compare.json").write_text(json.dumps({"name": "demo", "arms": ["own"], "seeds": [0, 1]}))
    assert [(one.measures, one.loss) for one in list_runs(home)] == [("reward", 0.25), ("reward", 0.75)]
    [whole] = list_runs(tmp_path / "runs")
    assert (whole.measures, whole.loss) == ("reward", 0.75)
    begun = look_at(make(tmp_path / "begun"))
    assert begun.measures is None


def test_folders_within_folders_and_what_is_no_run(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a" / "b" / "deep", metrics=lines(STEP))
    (tmp_path / "runs" / "notes.txt").write_text("x")
    (tmp_path / "runs" / "plots").mkdir()
    (tmp_path / "runs" / ".hidden").mkdir()
    found: list[RunInfo] = list_runs(tmp_path / "runs")
    assert [one.path.name for one in found] == ["deep"]
    with pytest.raises(RunError, match="no such folder"):
        list_runs(tmp_path / "nothing")


def test_a_folder_that_may_not_be_looked_into_hides_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        make(tmp_path / "runs" / name, metrics=lines(STEP))
    look = listing.describe

    def refused(path: Path) -> RunInfo | None:
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(listing, "describe", refused)
    assert [one.path.name for one in list_runs(tmp_path / "runs")] == ["a", "c"]
