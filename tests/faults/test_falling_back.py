"""Where a damaged file need not stop anything, it does not: what is left is used, the rest is kept, and it is said."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finemoe.checkpoint.kinds import kind_of, read_config
from finemoe.checkpoint.open import load_model, read_model_config
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.files import plain_words
from finemoe.core.logs import JsonLines
from finemoe.evaluation.runner import Answers
from finemoe.evaluation.task import Scored
from finemoe.runs.directory import cut_metrics
from finemoe.runs.planning.sizing import size
from finemoe.runs.run import resume, train
from finemoe.training.directory import read_metrics, read_summary
from runs.tiny_runs import checkpoints, newest_state, recipe, steps


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(corpus), out=tmp_path_factory.mktemp("unbroken") / "run", quiet=True).directory


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


@pytest.mark.parametrize(
    "line", [b"\x00\x00\xff", b'{"kind": "step"', b"[1]", b'{"kind": "step", "step": "2", "loss": 1}']
)
def test_a_bad_line_of_the_metrics_is_left_out_and_kept_aside(
    unbroken: Path, copied: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    (copied / "summary.json").unlink()
    shutil.rmtree(checkpoints(copied)[-1])  # so that two steps run again
    metrics = copied / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    number = next(at for at, one in enumerate(lines) if b'"kind": "step", "step": 2,' in one)
    lines[number] = line + b"\n"
    metrics.write_bytes(b"".join(lines))
    before = metrics.read_bytes()
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        assert not resume(copied, quiet=True).interrupted
    assert f"line {number + 1} is damaged and left out" in caplog.text
    assert (copied / "metrics.damaged.jsonl").read_bytes() == before
    assert newest_state(copied)[1] == newest_state(unbroken)[1]
    assert steps(copied) == [record for record in steps(unbroken) if record["step"] != 2]


def test_a_kill_while_damaged_metrics_are_set_aside_loses_none_of_them(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(b"x\n")
    before = (copied / "metrics.jsonl").read_bytes()

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finemoe.runs.directory.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        cut_metrics(copied, 6)
    assert (copied / "metrics.jsonl").read_bytes() == before
    assert (copied / "metrics.damaged.jsonl").read_bytes() == before


def test_a_second_damage_does_not_take_the_place_of_the_first(copied: Path) -> None:
    kept = []
    for damage in (b"x\n", b"y\n"):
        with (copied / "metrics.jsonl").open("ab") as file:
            file.write(damage)
        kept.append((copied / "metrics.jsonl").read_bytes())
        cut_metrics(copied, 6)
    assert [(copied / f"metrics.damaged{number}.jsonl").read_bytes() for number in ("", "-2")] == kept


def test_a_run_without_metrics_is_finished_all_the_same(copied: Path) -> None:
    (copied / "summary.json").unlink()
    (copied / "metrics.jsonl").unlink()
    assert resume(copied, quiet=True).summary["steps"] == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": "six"}', '{"steps": 6}', "[" * 10_000])
def test_a_damaged_summary_is_told_and_written_again(
    unbroken: Path, copied: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (copied / "summary.json").write_text(text)
    with pytest.raises(RunError, match=r"summary\.json: .*`finemoe resume .*` writes it again"):
        read_summary(copied)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        resume(copied, quiet=True)
    assert "writes it again" in caplog.text
    made, had = read_summary(copied), read_summary(unbroken)
    assert made is not None
    assert had is not None
    assert made["final_validation_loss"] == had["final_validation_loss"]


def test_damaged_lines_are_named_once(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(b"x\n" * 3)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        records = read_metrics(copied)
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert len(caplog.records) == 1
    assert "and 2 more is damaged" in caplog.text


def test_a_full_disk_under_an_evaluation_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(tmp_path / "task.jsonl")
    answers.keep("a", Scored(-1.0, 1, True))

    def full(self: JsonLines, record: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(JsonLines, "write", full)
        with pytest.raises(RunError, match=r"task\.jsonl: the disk is full; free some space"):
            answers.keep("b", Scored(-1.0, 1, True))
    answers.close()
    again = Answers(tmp_path / "task.jsonl")
    assert set(again.known) == {"a"}
    again.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk is full; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: permission denied"),
        (OSError("odd"), "odd"),
    ],
)
def test_what_the_system_refuses_has_no_number(error: OSError, words: str) -> None:
    assert plain_words(error).startswith(words)
    assert "Errno" not in plain_words(error)


@pytest.mark.parametrize("content", [b"", b"{", b"<html></html>", b"[1]", b"\0" * 64, b"\xff\xfe\xff"])
@pytest.mark.parametrize("open_it", [kind_of, load_model, size, read_config, read_model_config])
def test_a_damaged_configuration_of_a_run_is_put_back(
    copied: Path, content: bytes, open_it: Callable[[Path], object]
) -> None:
    (copied / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_it(copied)
    assert str(caught.value).startswith(f"{copied / 'config.json'}: the configuration of this run is damaged: ")
    copy = checkpoints(copied)[-1] / "config.json"
    assert str(caught.value).endswith(f"each checkpoint of the run holds a copy, such as {copy}")
    shutil.copyfile(copy, copied / "config.json")
    open_it(copied)
