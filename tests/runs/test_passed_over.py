"""Steps that hold nothing to count: passed over, counted, said at the end, and the same after a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from finemoe.cli.main import app
from finemoe.core.errors import DataError
from finemoe.data import Loader, TokenBatch
from finemoe.runs.run import resume, train
from runs.tiny_runs import assert_same_run, data_table, recipe, records

SEQUENCES = 4  # of a step
EMPTY = range(2 * SEQUENCES, 3 * SEQUENCES)  # all of step 3
HALF = range(4 * SEQUENCES, 4 * SEQUENCES + 2)  # the first two of step 5


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Make the weights of sequences at some positions zero."""
    original = Loader.batch

    def make(positions: range) -> None:
        def batch(loader: Loader, position: int, num_sequences: int) -> TokenBatch:
            made = original(loader, position, num_sequences)
            keep = torch.tensor([at not in positions for at in range(position, position + num_sequences)])
            return replace(made, weights=made.weights * keep[:, None])

        monkeypatch.setattr(Loader, "batch", batch)

    return make


def test_a_weightless_step_is_passed_over_and_the_run_goes_on(
    corpus: Path, tmp_path: Path, without_weights: Callable[[range], None]
) -> None:
    without_weights(EMPTY)
    raw = recipe(corpus, "v3", training={"micro_batch_tokens": 16})
    run = train(raw, out=tmp_path / "run", quiet=True)
    assert run.summary["skipped_steps"] == 1
    assert run.summary["steps"] == 6
    found = [record for record in records(run.directory) if record["kind"] in ("step", "skipped")]
    assert [record["kind"] for record in found] == ["step", "step", "skipped", "step", "step", "step"]
    assert found[2]["step"] == 3
    assert [record["tokens"] for record in found] == [64 * step for step in range(1, 7)]  # read, and not read again


def test_pieces_without_weight_count_with_the_others_of_their_step(
    corpus: Path, tmp_path: Path, without_weights: Callable[[range], None]
) -> None:
    without_weights(HALF)
    whole = train(recipe(corpus), out=tmp_path / "whole", quiet=True)
    cut = train(recipe(corpus, training={"micro_batch_tokens": 16}), out=tmp_path / "cut", quiet=True)
    assert "skipped_steps" not in whole.summary
    for one, other in zip(records(whole.directory), records(cut.directory), strict=True):
        assert one["kind"] == other["kind"]
        if one["kind"] == "step":
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_resumed_run_remembers_what_it_passed_over(
    corpus: Path, tmp_path: Path, without_weights: Callable[[range], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_weights(EMPTY)
    unbroken = train(recipe(corpus), out=tmp_path / "unbroken", quiet=True)
    out = train(recipe(corpus), out=tmp_path / "run", quiet=True).directory
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    again = resume(out, quiet=True)
    assert again.summary["skipped_steps"] == 1
    assert_same_run(unbroken.directory, out)


def test_a_run_that_finds_nothing_at_all_ends_and_says_so(
    corpus: Path, tmp_path: Path, without_weights: Callable[[range], None]
) -> None:
    without_weights(range(1000))
    config = tmp_path / "all.json"
    config.write_text(json.dumps(recipe(corpus, "dense")))
    result = CliRunner().invoke(app, ["train", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "Passed over       6 steps that held nothing to count" in result.output


def test_a_validation_text_without_anything_to_predict_is_refused_before_the_first_step(
    corpus: Path, tmp_path: Path
) -> None:
    """Documents of one token each, which with "isolate" leave a sequence of one token nothing to predict."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text('{"text": "a"}\n' * 20)
    data = data_table(corpus)
    data["corpus"]["validation_paths"] = [str(tmp_path / "empty")]
    data |= {"packing": "isolate", "sequence_length": 1, "cache_dir": str(tmp_path / "cache")}
    raw = recipe(corpus, "dense", data=data, training={"tokens_per_step": 4})
    with pytest.raises(DataError, match="hold no text to measure"):
        train(raw, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
