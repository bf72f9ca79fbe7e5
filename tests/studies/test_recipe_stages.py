"""Recipes of stages: each begins where it says, is done once, and the same command goes on."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import read_toml
from finemoe.core.errors import ConfigError, DataError, RunError
from finemoe.data.documents.document import SkipReport
from finemoe.data.problems.corpus import ProblemsCorpus
from finemoe.parallel.seat import Seat
from finemoe.runs.planning.stages import stages_of
from finemoe.runs.run import resume
from finemoe.studies import stages as running
from finemoe.studies.stages import StageInterruptedError, run_stages
from finemoe.training.trainer import Trainer
from runs.tiny_runs import recipe

CONFIG = "config.json"


def staged(corpus: Path, **more: Any) -> dict[str, Any]:
    """A model, its answers to a few questions, and what it learns from them."""
    first = recipe(corpus, "v3", training={"steps": 2})
    questions = corpus.parent / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "a b"}) + "\n" for n in range(40)))
    sampling = {"prompts": [str(questions)], "n": 1, "keep": "all", "max_new_tokens": 8}
    learn = {
        "method": {"kind": "sft"},
        "data": {"sequence_length": 64},
        "training": {"steps": 2, "tokens_per_step": 128},
    }
    return {
        "seed": 3,
        "model": first["model"],
        "stage": [
            {"name": "base", **{key: value for key, value in first.items() if key not in ("seed", "model")}},
            {"name": "answers", "start_from": "base", "sample": sampling},
            {
                "name": "learnt",
                "start_from": "base",
                **learn,
                "data": {**learn["data"], "corpus": {"kind": "files", "paths": ["{answers}/answers.jsonl"]}},
            },
        ],
        **more,
    }


def test_every_stage_begins_where_it_says_and_is_done_once(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_stages(staged(corpus), out=out, quiet=True)
    assert [one["stage"] for one in done] == ["base", "answers", "learnt"]
    learnt = json.loads((out / "3-learnt" / CONFIG).read_text())
    assert learnt["start_from"] == str(out / "1-base")
    assert learnt["seed"] == 3
    assert learnt["data"]["corpus"]["paths"] == [str(out / "2-answers" / "answers.jsonl")]
    assert done[2]["summary"]["steps"] == 2
    times = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.safetensors"))}
    again = run_stages(staged(corpus), out=out, quiet=True)
    assert again == done
    assert times == {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.safetensors"))}


def test_what_all_stages_have_in_common_is_said_once_and_by_one_process(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "finemoe"):
        run_stages(staged(corpus), out=tmp_path / "out")
    said = [one for one in caplog.messages if one.startswith(("stage ", "when exported"))]
    assert [one.partition(":")[0] for one in said] == [
        "stage 1 of 3", "when exported", "stage 2 of 3", "stage 3 of 3",
    ]  # fmt: skip
    caplog.clear()
    monkeypatch.setattr(running, "speaks", lambda: False)  # as on every rank but the first
    with caplog.at_level(logging.INFO, "finemoe"):
        run_stages(staged(corpus), out=tmp_path / "out")
    assert not [one for one in caplog.messages if one.startswith("stage ")]


def test_overrides_are_of_all_stages_or_of_one(corpus: Path, tmp_path: Path) -> None:
    run_stages(staged(corpus), out=tmp_path / "out", quiet=True, overrides=["seed=5", "stage.learnt.training.steps=3"])
    configs = {name: json.loads((tmp_path / "out" / name / CONFIG).read_text()) for name in ("1-base", "3-learnt")}
    assert [one["training"]["steps"] for one in configs.values()] == [2, 3]
    assert {one["seed"] for one in configs.values()} == {5}


def test_what_to_do_with_a_stage_that_was_trained_otherwise(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_stages(staged(corpus), out=out, quiet=True)

    def refused(*overrides: str) -> str:
        with pytest.raises(RunError) as error:
            run_stages(staged(corpus), out=out, quiet=True, overrides=overrides)
        return str(error.value)

    longer = refused("stage.learnt.training.steps=3")
    assert f"`finemoe resume {out / '3-learnt'} --set training.steps=3`" in longer
    assert "3-learnt holds a run of another configuration (training.steps: 2 there, 3 here): " in longer
    otherwise = refused("stage.learnt.optimizer.kind=muon")
    assert "resume" not in otherwise, "what was trained cannot be trained with something else"
    assert f'a recipe of its own with start_from = "{out / "1-base"}"' in otherwise
    assert "finemoe resume" not in refused("stage.base.seed=9")
    for wrong in ("stages.learnt.training.steps=3", "learnt.training.steps=3"):
        with pytest.raises(ConfigError, match=r"did you mean `stage`, as in --set stage\.learnt\.training\.steps=3\?"):
            run_stages(staged(corpus), out=out, quiet=True, overrides=[wrong])
    assert resume(out / "3-learnt", overrides=["training.steps=3"], quiet=True).summary["steps"] == 3
    assert run_stages(staged(corpus), out=out, quiet=True)[2]["summary"]["steps"] == 3, "it is left as it was changed"
    assert "training.steps=4" in refused("stage.learnt.training.steps=4")


@pytest.mark.parametrize("done", [0, 1])
def test_a_stage_that_was_changed_before_its_end_goes_on_as_it_was_changed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    out, raw, original = tmp_path / "out", staged(corpus), Trainer.step
    raw["stage"] = raw["stage"][:1]

    def stopping(trainer: Trainer, *given: Any) -> Any:
        if not done:
            raise KeyboardInterrupt
        trainer.request_stop()
        return original(trainer, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping)
        with pytest.raises((StageInterruptedError, KeyboardInterrupt)):
            run_stages(raw, out=out, quiet=True)
        with suppress(KeyboardInterrupt):
            assert resume(out / "1-base", overrides=["training.steps=4"], quiet=True).interrupted
    assert run_stages(raw, out=out, quiet=True)[0]["summary"]["steps"] == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "is called None"),
        ({"name": "base"}, "is called 'base'"),
        ({"name": "A b"}, "is called 'A b'"),
        ({"data": {"corpus": {"kind": "files", "paths": ["{late}/x"]}}}, "is no stage before it"),
    ],
)
def test_what_cannot_be_is_refused(corpus: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    raw = staged(corpus)
    raw["stage"][2] = {**raw["stage"][2], **change}
    with pytest.raises(ConfigError, match=said):
        stages_of(raw, "recipe", tmp_path)


@pytest.mark.parametrize(
    ("change", "overrides", "said"),
    [
        ({"method": {"kind": "sft", "too_lng": "cut"}}, [], "stage learnt: unknown key `method.too_lng`"),
        ({"data": {"corpus": {"kind": "problems", "problem": "sums"}}}, [], "stage learnt: `data.corpus.problem`"),
        ({"method": {"kind": "grpo", "answer_tokens": 64}}, [], "stage learnt: method.answer_tokens 64 leaves no room"),
        ({"start_from": "answers"}, [], "stage learnt: begins with stage answers, which writes answers"),
        ({"model": {"preset": "tiny-moe"}}, [], "stage learnt: `start_from` brings its own model"),
        ({"start_from": "nowhere"}, [], "nowhere"),
        (
            {
                "method": {
                    "kind": "grpo",
                    "answer_tokens": 8,
                    "group": 2,
                    "rewards": [{"kind": "function", "path": "nowhere.py:f"}],
                }
            },
            [],
            "stage learnt: the rewards cannot be computed: `path`: nowhere.py: no such file",
        ),
        (
            {"data": {"sequence_length": 64, "corpus": {"kind": "files", "paths": ["no/x"]}}},
            [],
            "stage learnt: corpus path no/x",
        ),
        ({}, ["stage.answers.sample.prompts=['no.jsonl']"], "stage answers: corpus path no.jsonl"),
        (
            {},
            ["method.too_long=cut"],
            "stage base: unknown key .*; --set method.too_long=cut is laid on every stage: "
            "did you mean --set stage.learnt.method.too_long=cut",
        ),
        ({}, ["method.mixx=1"], "stage base: unknown key `method.mixx`[^;]*; known: kind$"),
    ],
)
def test_the_keys_of_a_late_stage_are_read_before_the_first_trains(
    corpus: Path, tmp_path: Path, change: dict[str, Any], overrides: list[str], said: str
) -> None:
    raw = staged(corpus)
    raw["stage"][2] = {**raw["stage"][2], **change}
    with pytest.raises((ConfigError, DataError, RunError), match=said):
        run_stages(raw, out=tmp_path / "out", overrides=overrides, quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_override_goes_beyond_what_a_stage_says_itself(corpus: Path, tmp_path: Path) -> None:
    stages = stages_of(staged(corpus), "recipe", tmp_path, ["training.steps=7", "stage.learnt.training.tokens=4000"])
    assert stages[0].raw["training"]["steps"] == 7
    assert "steps" not in stages[2].raw["training"], "one length takes the place of another, as in any recipe"
    assert stages[2].raw["training"]["tokens"] == 4000
    with pytest.raises(ConfigError, match="no stage is called 'lernt'"):
        stages_of(staged(corpus), "recipe", tmp_path, ["stage.lernt.seed=1"])


def test_a_stage_that_samples_takes_the_seed_and_nothing_that_does_nothing(corpus: Path, tmp_path: Path) -> None:
    raw = staged(corpus)
    changes = ["stage.answers.sample.n=3", "seed=8", "training.steps=2"]
    sampling = stages_of(raw, "recipe", tmp_path, changes)[1]
    assert sampling.sampling is not None
    assert (sampling.sampling.n, sampling.raw["seed"]) == (3, 8)
    raw["stage"][1]["training"] = {"steps": 3}
    with pytest.raises(ConfigError, match="`training` does nothing where answers are sampled"):
        stages_of(raw, "recipe", tmp_path)


def test_a_stage_may_keep_by_rewards(corpus: Path, tmp_path: Path) -> None:
    """What is asked is put as it is, and worth its length; what was kept says so."""
    raw = staged(corpus)
    rule = tmp_path / "rule.py"
    rule.write_text("def short(prompt, completion, record):\n    return 2.0 if prompt[-1] == '?' else 0.0\n")
    sampling = {key: value for key, value in raw["stage"][1]["sample"].items() if key != "keep"}
    sampling |= {"rewards": [{"kind": "function", "path": f"{rule}:short"}], "at_least": 1.5, "template": "{prompt}"}
    raw["stage"] = [
        raw["stage"][0],
        {**raw["stage"][1], "sample": {**sampling, "n": 2, "best_of": 1, "max_new_tokens": 60}},
    ]
    done = run_stages(raw, out=tmp_path / "out", quiet=True)
    found = done[1]["sampled"]
    assert found["drawn"] == 80
    kept = [json.loads(line) for line in (tmp_path / "out" / "2-answers" / "answers.jsonl").read_text().splitlines()]
    assert len(kept) == found["kept"]
    assert {one["origin"]["reward"] for one in kept} == {2.0}
    assert sum(found["left_out"].values()) == 80 - len(kept)
    assert run_stages(raw, out=tmp_path / "out", quiet=True) == done


def test_a_stage_may_ask_a_corpus_and_only_what_is_trained_on(corpus: Path, tmp_path: Path) -> None:
    raw = staged(corpus)
    problems = {"kind": "problems", "problem": "running_sum", "count": 30, "validation_count": 30, "difficulty": 2}
    raw["stage"] = raw["stage"][:2]
    raw["stage"][1] = {**raw["stage"][1], "sample": {"corpus": problems, "n": 1, "keep": "all", "max_new_tokens": 4}}
    (_, done) = run_stages(raw, out=tmp_path / "out", quiet=True)
    texts = (tmp_path / "out" / "2-answers" / "answers.jsonl").read_text().splitlines()
    asked = {json.loads(line)["messages"][0]["content"] for line in texts}
    held = ProblemsCorpus(**problems).validation_documents(SkipReport(), whole=True)
    assert held is not None
    assert not asked & {json.loads(one.text)["prompt"] for one in held}
    assert 0 < done["sampled"]["drawn"] < 25, "25 sums there are, and some are held out"


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a"], "keeps": 1}, "keeps"),
        ({"n": 1}, "exactly one of prompts and corpus"),
        ({"prompts": ["a"], "corpus": {"kind": "problems"}}, "exactly one of prompts and corpus"),
        ({"prompts": ["a"], "at_least": 1.0}, "at_least goes with rewards"),
        ({"prompts": ["a"], "keep": "all", "rewards": [{"kind": "answer"}]}, "leave keep out"),
        ({"prompts": ["a"], "rewards": [{"kind": "anwser"}]}, "did you mean `answer`"),
        ({"prompts": ["a"], "n": 2, "best_of": 2}, "best_of 2 of n = 2 answers leaves no choice"),
        ({"prompts": ["a"], "rewards": [{"kind": "answer"}], "template": "Q: "}, "has no {prompt} in it"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(corpus: Path, tmp_path: Path, sample: dict[str, Any], said: str) -> None:
    raw = staged(corpus)
    raw["stage"][1]["sample"] = sample
    with pytest.raises(ConfigError, match=said):
        stages_of(raw, "recipe", tmp_path)


def test_a_template_keeps_its_braces(corpus: Path, tmp_path: Path) -> None:
    raw = staged(corpus)
    raw["stage"][2]["method"] = {"kind": "grpo", "template": "{prompt}"}
    raw["stage"][2]["method"]["opens"] = "{think}"
    method = stages_of(raw, "recipe", tmp_path)[2].raw["method"]
    assert (method["template"], method["opens"]) == ("{prompt}", "{think}")


def test_the_recipe_of_a_part_of_the_study_has_its_stages() -> None:
    """With the rates that the study found best, where it tried some."""
    rates = {"distilled": 1e-3, "student-rl": 2e-4}
    folder = Path(__file__).parents[2]
    whole, part = (read_toml(folder / "recipes" / f"{one}.toml") for one in ("reasoning", "distil"))
    results = json.loads((folder / "benchmarks/results/reasoning/results.json").read_text(encoding="utf-8"))
    best = {one["stage"]: max(one["came_to"], key=one["came_to"].get) for one in results["tuning"]}
    known = {one["name"]: one for one in whole["stage"]}
    for stage in part["stage"]:
        if stage["name"] in rates:
            rate = stage["optimizer"]["learning_rate"]
            assert rate == rates[stage["name"]] == float(best[stage["name"]])
            stage["optimizer"]["learning_rate"] = known[stage["name"]]["optimizer"]["learning_rate"]
        assert stage == known[stage["name"]]
    apart = ("stage", "study")
    assert {key: one for key, one in part.items() if key not in apart} == {
        key: one for key, one in whole.items() if key not in apart
    }


@pytest.mark.parametrize("name", ["reasoning", "r1"])
def test_what_was_recorded_of_a_study_is_of_its_recipe(name: str) -> None:
    """Stages and claims; comments may have changed since."""
    folder = Path(__file__).parents[2]
    recipe = read_toml(folder / "recipes" / f"{name}.toml")
    results = json.loads((folder / f"benchmarks/results/{name}/results.json").read_text(encoding="utf-8"))
    assert results["recipe"]["stage"] == recipe["stage"]
    claims = results["experiments"]["claims"]["claims"]
    assert [one["statement"] for one in claims] == [one["statement"] for one in recipe["study"]["claims"]]


def test_what_processes_cannot_do_in_a_late_stage_is_told_before_the_first_trains(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By as many as torchrun started, or by the one that is alone."""
    raw, out = staged(corpus), tmp_path / "out"
    raw["stage"].pop(1)
    raw["stage"][1] = {
        "name": "zero",
        "start_from": "base",
        "method": {"kind": "grpo", "template": "{prompt}", "answer_tokens": 4, "rewards": [{"kind": "answer"}]},
        "data": {"sequence_length": 64, "corpus": {"kind": "problems", "problem": "running_sum", "count": 100}},
        "training": {"steps": 1},
    }
    with pytest.raises(ConfigError, match=r"stage zero: .*shard 3 .* are 3 processes, and 1 is running"):
        run_stages(raw, out=out, quiet=True, overrides=["stage.zero.parallel.shard=3"])
    assert not out.exists()
    monkeypatch.setattr(running, "seat", lambda: Seat(0, 2, 0, 2, "localhost", 1, True))
    with pytest.raises(ConfigError, match=r"stage zero: method.kind 'grpo' .* there are 2: .*before it, base, could"):
        run_stages(raw, out=out, quiet=True)
    with pytest.raises(ConfigError, match="stage answers: it samples answers, which one process does"):
        run_stages(staged(corpus), out=out, quiet=True)
    assert not out.exists()
