"""What the examination asks: the questions of GRPO, in every form, read by one road and judged by the same bounds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import merge, parse, read_toml
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.seeds import derive
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo.prompts import Prompts
from finemoe.methods.grpo.rollout import Drawn
from finemoe.methods.grpo.source import Asked
from finemoe.methods.rewards import Answer, Rewards, Scored
from finemoe.runs.config import resolve_run
from finemoe.runs.planning.stages import stages_of
from finemoe.studies.staged import examination as module
from finemoe.studies.staged.config import ExaminationConfig
from finemoe.studies.staged.examination import examine, questions
from finemoe.studies.stages import run_stage
from studies.staged.tiny_study import RECIPE

REASONING = Path(__file__).parents[3] / "recipes" / "reasoning.toml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage of the tiny study."""
    first = stages_of(tomllib.loads(RECIPE), "sums.toml", tmp_path_factory.mktemp("asked"))[0]
    run_stage(first, "sums.toml", quiet=True)
    return first.folder


class Heard:
    """What the engine was asked, what the rewards were given, and with which bounds; every answer is a 3."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[Sequence[Asked], SamplingConfig]] = []
        self.answers: list[Answer] = []
        self.bounds: dict[str, Any] = {}
        heard = self

        class Engine:
            def __init__(self, opened: Any, tokenizer: Any, autocast: Any) -> None:
                self.ids = (*tokenizer.encode("3"), tokenizer.end_of_text_id)

            def __call__(self, asked: Sequence[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
                heard.rounds.append((asked, sampling))
                one = [Drawn(each.ids, self.ids, (0.0, 0.0), "stop", {}) for each in asked]
                return [[drawn] * len(each.streams) for each, drawn in zip(asked, one, strict=True)]

        real, made = Rewards.score, Rewards.__init__

        def score(self: Rewards, answers: Sequence[Answer]) -> list[Scored]:
            heard.answers += answers
            return real(self, answers)

        def begin(self: Rewards, configs: Sequence[Any], **bounds: Any) -> None:
            heard.bounds = bounds
            made(self, configs, **bounds)

        patch.setattr(module, "OwnEngine", Engine)
        patch.setattr(Rewards, "score", score)
        patch.setattr(Rewards, "__init__", begin)


def test_the_questions_of_the_recipe_are_those_that_grpo_holds_out(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """Figures that were published stay what the recipe comes to: the same ids, streams and seed."""
    raw = read_toml(REASONING)
    zero = next(one for one in raw["stage"] if one["name"] == "zero")
    shared = {key: value for key, value in raw.items() if key not in ("stage", "study", "model")}
    laid = merge({**shared, "name": "zero"}, {key: value for key, value in zero.items() if key != "name"})
    run = resolve_run({**laid, "start_from": str(model)}, "zero")
    held_out = Prompts.read(run.setting, "{prompt}", 20).sides["validation"]

    config = parse(ExaminationConfig, raw["study"]["examination"], "recipe")
    heard, asked = Heard(monkeypatch), questions(config)
    assert len(asked) == len(held_out) == 199
    examine(model, config, asked, 4)
    (drawn, how), (greedy, surely) = heard.rounds
    assert [one.ids for one in drawn] == [one.ids for one in greedy] == [one.ids for one in held_out]
    assert [one.streams for one in drawn[:2]] == [tuple(range(16)), tuple(range(16, 32))]
    assert [one.streams for one in greedy[:2]] == [(0,), (1,)]
    assert how.seed == surely.seed == derive(4, "study")
    assert (how.temperature, surely.temperature, how.max_new_tokens) == (1.0, 0.0, 20)
    references = [one.references for one in held_out]
    assert [one.references for one in heard.answers] == [one for one in references for _ in range(16)] + references


def records(folder: Path, *given: dict[str, Any], **more: Any) -> ExaminationConfig:
    """An examination that asks those records."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in given))
    unseen = folder / "others.jsonl"
    unseen.write_text(json.dumps({"prompt": "not asked", "answer": "0"}) + "\n")
    corpus = {"kind": "files", "paths": [str(unseen)], "validation_paths": [str(path)]}
    return parse(ExaminationConfig, {"corpus": corpus, "samples": 2, "answer_tokens": 4, **more}, "study.examination")


def test_records_in_every_form_are_asked_and_rewards_are_told_how(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    forms = [
        {"question": "1+2", "answer": 3},
        {"messages": [{"role": "user", "content": "2+1"}, {"role": "assistant", "content": "3"}]},
        {"prompt": "4-1", "answers": ["3", "three"]},
    ]
    config = records(tmp_path, *forms, template="Q {prompt} A ")
    heard = Heard(monkeypatch)
    figures = examine(model, config, questions(config), 0)
    assert figures["right"] == figures["greedy"] == 1.0
    greedy = heard.answers[-3:]
    assert [one.prompt for one in greedy] == ["1+2", "2+1", "4-1"]
    assert [one.asked for one in greedy] == ["Q 1+2 A ", "Q 2+1 A ", "Q 4-1 A "]
    assert [one.text for one in greedy] == ["3"] * 3, "without the token that ended it"
    assert greedy[2].references == ("3", "three")


def test_rewards_have_the_bounds_that_grpo_has(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    heard = Heard(monkeypatch)
    for more, wanted in (
        ({}, (10.0, 2 << 30)),
        ({"reward_seconds": 2.5, "reward_memory": 1 << 29}, (2.5, 1 << 29)),
    ):
        config = records(tmp_path, {"prompt": "1+2", "answer": "3"}, **more)
        examine(model, config, questions(config), 0)
        assert (heard.bounds["deadline_seconds"], heard.bounds["memory_bytes"]) == wanted
        assert heard.bounds["keys"] == "study.examination."


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"answer": "3"}, "in no form of a conversation that is known"),
        ({"messages": [{"role": "assistant", "content": "3"}]}, "nothing is asked in it"),
        ({"prompt": "1+2"}, "has no answer for the reward 'answer' to compare with"),
    ],
)
def test_a_record_that_cannot_be_asked_or_judged_is_refused(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=rf"study\.examination\.corpus: records\.jsonl:1.* ?{said}"):
        questions(records(tmp_path, record))


def test_what_compares_with_nothing_needs_no_answer(tmp_path: Path) -> None:
    config = records(tmp_path, {"prompt": "1+2"}, rewards=[{"kind": "length", "longest": 9, "cushion": 1}])
    assert [one.text for one in questions(config)] == ["1+2"]


def test_a_template_without_a_place_for_the_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`template` has no \{prompt\} in it"):
        records(tmp_path, {"prompt": "1", "answer": "1"}, template="ask")
