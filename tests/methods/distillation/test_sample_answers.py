"""Sampling: what is written is what the engine draws and the check lets through, also after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError, DataError
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import engine_for
from finemoe.generation.generate import complete
from finemoe.methods.distillation import sampling
from finemoe.runs.run import train
from methods.distillation.tiny_pairs import SHORT, distilling, lines


def test_every_completion_is_the_engines(teacher: LanguageModel, asked: Path, tmp_path: Path) -> None:
    done = finemoe.sample(teacher, asked, tmp_path / "out.jsonl", n=3, seed=5, **SHORT)
    prompts, skipped = sampling.read_prompts([str(asked)], teacher, 3)
    assert (len(prompts), skipped) == (8, {})
    ids, drawn = [one.question.ids for one in prompts], SamplingConfig(seed=5, max_new_tokens=12)
    wanted = complete(engine_for(teacher), ids, drawn, n=3, answers=True, quiet=True)
    texts = [one.text.text for one in wanted if one.text is not None]
    found = lines(tmp_path / "out.jsonl")
    questions = [record["messages"][0] for record in lines(asked)]
    filled = [(number, text) for number, text in enumerate(texts) if text.strip()]
    assert done.drawn == 24
    assert done.kept == len(filled) == len(found)
    for (number, text), record in zip(filled, found, strict=True):
        assert record["messages"] == [questions[number // 3], {"role": "assistant", "content": text}]
        assert record["origin"]["completion"] == number % 3
        assert record["origin"]["finish_reason"] == wanted[number].finish_reason
        mean = sum(wanted[number].logprobs) / len(wanted[number].logprobs)
        assert record["origin"]["logprob"] == pytest.approx(mean, abs=1e-3)


def test_what_ended_and_what_is_most_probable(teacher: LanguageModel, asked: Path, tmp_path: Path) -> None:
    options = {"n": 6, "temperature": 2.0, **SHORT}  # hot enough that some do not end
    everything = finemoe.sample(teacher, asked, tmp_path / "all.jsonl", **options)
    ended = finemoe.sample(teacher, asked, tmp_path / "ended.jsonl", keep="ended", **options)
    best = finemoe.sample(teacher, asked, tmp_path / "best.jsonl", best_of=2, **options)
    whole = lines(tmp_path / "all.jsonl")
    assert lines(tmp_path / "ended.jsonl") == [r for r in whole if r["origin"]["finish_reason"] == "stop"]
    assert 0 < ended.kept < everything.kept
    assert ended.left_out["did not end"] == everything.drawn - ended.kept - ended.left_out.get("empty", 0)
    wanted = []
    for prompt in dict.fromkeys(record["origin"]["prompt"] for record in whole):
        own = [record for record in whole if record["origin"]["prompt"] == prompt]
        two = sorted(own, key=lambda record: -record["origin"]["logprob"])[:2]
        wanted += [record for record in own if record in two]
    assert lines(tmp_path / "best.jsonl") == wanted
    assert best.left_out["others are more probable"] == everything.kept - len(wanted)


def test_only_right_answers(teacher: LanguageModel, asked: Path, tmp_path: Path) -> None:
    """Half of the records are given for an answer what the model writes."""
    finemoe.sample(teacher, asked, tmp_path / "once.jsonl", n=8, keep="ended", best_of=1, seed=2, **SHORT)
    said = {r["messages"][0]["content"]: r["messages"][-1]["content"] for r in lines(tmp_path / "once.jsonl")}
    assert len(said) > 3
    right = dict(list(said.items())[::2])
    records = [{"prompt": q, "answer": right.get(q, "nothing that it would say")} for q in said]
    (tmp_path / "with.jsonl").write_text("\n".join(map(json.dumps, records)))
    done = finemoe.sample(
        teacher, tmp_path / "with.jsonl", tmp_path / "right.jsonl", n=8, keep="answer", seed=2, **SHORT
    )
    found = lines(tmp_path / "right.jsonl")
    assert {record["messages"][0]["content"] for record in found} == set(right)
    assert done.left_out["another answer"] > 0


class Pulled(Exception):
    """The plug."""


@pytest.mark.parametrize("torn", [False, True], ids=["between", "within a line"])
def test_interrupted_it_comes_to_the_same_file(
    teacher: LanguageModel, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    options = {"n": 2, "keep": "ended", **SHORT}
    whole = finemoe.sample(teacher, asked, tmp_path / "whole.jsonl", **options)
    out, calls = tmp_path / "out.jsonl", 0
    choosing = sampling.ByCheck.__call__

    def pulling(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Pulled
        return choosing(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sampling.ByCheck, "__call__", pulling)
        with pytest.raises(Pulled):
            finemoe.sample(teacher, asked, out, **options)
    if torn:
        with out.open("ab") as file:
            file.write(b'{"messages": [{"role"')
        with (tmp_path / ".out.jsonl.progress").open("ab") as file:
            file.write(b'{"drawn": 2, "ke')
    asking, later = sampling._answered, []

    def watched(opened: Any, prompts: Any, *others: Any) -> Any:
        later.append(len(prompts))
        return asking(opened, prompts, *others)

    monkeypatch.setattr(sampling, "_answered", watched)
    again = finemoe.sample(teacher, asked, out, **options)
    assert later == [3]
    assert lines(out) == lines(tmp_path / "whole.jsonl")
    assert {**again.to_dict(), "path": ""} == {**whole.to_dict(), "path": ""}
    assert finemoe.sample(teacher, asked, out, **options) == again
    assert later == [3, 0]


def test_what_is_there_is_not_overwritten(teacher: LanguageModel, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        finemoe.sample(teacher, asked, out, **SHORT)
    assert out.read_text() == "mine\n"
    finemoe.sample(teacher, asked, tmp_path / "other.jsonl", **SHORT)
    with pytest.raises(ConfigError, match="begun with --n 1, now 2, --seed 0, now 1: name another --out"):
        finemoe.sample(teacher, asked, tmp_path / "other.jsonl", n=2, seed=1, **SHORT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "n: 0"),
        ({"n": 2, "best_of": 2}, "best_of"),
        ({"keep": "some"}, "keep"),
        ({"temperature": -1.0}, "temperature"),
        ({"out": "answers.txt"}, r"\.jsonl"),
    ],
)
def test_settings_that_cannot_be(asked: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    out = tmp_path / options.pop("out", "out.jsonl")
    with pytest.raises(ConfigError, match=said):
        finemoe.sample(tmp_path / "nothing", asked, out, **{**SHORT, **options})


def test_records_without_an_answer_are_told(teacher: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1"}\n{"other": 3}\n')
    with pytest.raises(DataError, match="no record has one"):
        finemoe.sample(teacher, tmp_path / "bare.jsonl", tmp_path / "out.jsonl", keep="answer", **SHORT)
    done = finemoe.sample(teacher, tmp_path / "bare.jsonl", tmp_path / "out.jsonl", **SHORT)
    assert done.prompts == len(done.skipped) == 1
    (tmp_path / "none.jsonl").write_text('{"other": 3}\n')
    with pytest.raises(DataError, match="no record holds a prompt"):
        finemoe.sample(teacher, tmp_path / "none.jsonl", tmp_path / "no.jsonl", **SHORT)


def test_sft_learns_it_as_it_is(models: dict[str, Path], teacher: LanguageModel, tmp_path: Path) -> None:
    finemoe.sample(teacher, models["chats"], tmp_path / "out.jsonl", **SHORT)
    raw = distilling({**models, "chats": tmp_path / "out.jsonl"})
    raw["method"] = {"kind": "sft"}
    ran = train(raw, out=tmp_path / "run", quiet=True)
    assert ran.summary["final_validation_loss"] > 0
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert list(report["forms"]) == ["messages"]
    assert report["num_skipped"] == 0
