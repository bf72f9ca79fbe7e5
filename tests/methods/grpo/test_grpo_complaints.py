"""Complaints of reinforcement learning that concern whole runs: 11, 13, and models that drop tokens while they train.

docs/testing.md, "Complaints", says which other tests notice 11 to 15.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.checkpoint.open import load_tokenizer
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo.batch import RolloutBatch
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.rollout import Drawn
from finemoe.methods.grpo.rollouts import Rollouts
from finemoe.methods.grpo.source import OwnEngine
from finemoe.runs.run import train
from methods.grpo.tiny_policy import base, practising
from runs.tiny_runs import steps

SHORT = {"training": {"steps": 2, "evaluate_every": 2}}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("complaints"))


OURS = {"seed", "temperature", "max_new_tokens", "tempered_logprobs"}
"""What the method sets of the ways to draw. Everything else would draw from another distribution than the policy."""


@pytest.mark.parametrize("key", sorted(set(SamplingConfig.model_fields) - OURS))
def test_11_what_would_restrict_the_draws_cannot_be_set(key: str) -> None:
    """Complaint 11 of post-training, and the reason for it.

    With top_p = 0.8 tokens are drawn from what is left of the distribution, made whole again: each is as much more
    probable as was cut off, and its ratio to the policy is that share and not 1 (TRL #4772, #6789: 0.895).
    """
    for table in ({key: 1}, {"server": {"url": "http://127.0.0.1:1", key: 1}}):
        with pytest.raises(ConfigError, match=rf"unknown key `(server\.)?{key}`"):
            parse(GRPOConfig, table, "recipe.toml")


def test_11_answers_to_learn_from_are_drawn_from_the_whole_distribution(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaint 11 of post-training; at the temperature at which they are learnt, too."""
    asked: list[SamplingConfig] = []
    real = OwnEngine.__call__

    def noted(self: OwnEngine, prompts: Any, sampling: SamplingConfig) -> list[list[Drawn]]:
        asked.append(sampling)
        return real(self, prompts, sampling)

    monkeypatch.setattr(OwnEngine, "__call__", noted)
    train(practising(start, {"temperature": 0.8}, **SHORT), out=tmp_path / "run", quiet=True)
    learnt = [one for one in asked if one.temperature == 0.8]
    assert len(learnt) >= 2, "a rollout each step"
    plain = {"temperature": 0.8, "max_new_tokens": 6, "tempered_logprobs": True}
    assert all(one == SamplingConfig(seed=one.seed, **plain) for one in learnt)


def test_13_what_is_learnt_are_the_ids_that_the_engine_drew(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaint 13 of post-training: from engine to batch, of answers whose text would be tokenised to other ids."""
    drawn: list[Drawn] = []
    batches: list[RolloutBatch] = []
    real_call, real_batch = OwnEngine.__call__, Rollouts.batch

    def told(self: OwnEngine, prompts: Any, sampling: SamplingConfig) -> list[list[Drawn]]:
        found = real_call(self, prompts, sampling)
        drawn.extend(one for group in found for one in group)
        return found

    def noted(self: Rollouts, position: int, num: int) -> RolloutBatch:
        batches.append(real_batch(self, position, num))
        return batches[-1]

    monkeypatch.setattr(OwnEngine, "__call__", told)
    monkeypatch.setattr(Rollouts, "batch", noted)
    method = {"steps_per_rollout": 2, "dynamic_sampling": 1}
    run = train(practising(start, method, **SHORT), out=tmp_path / "run", quiet=True).directory
    tokenizer = load_tokenizer(run)
    wrote = {(one.prompt, one.completion, one.logprobs) for one in drawn}
    learnt = [one for batch in batches[-2:] for one in texts_of(batch)]
    assert len(learnt) == 16
    for prompt, completion, logprobs in learnt:
        assert any((prompt, completion) == one[:2] and logprobs == pytest.approx(one[2], abs=1e-5) for one in wrote), (
            "these ids, with the log-probabilities of this very draw"
        )
    others = [one for _, one, _ in learnt if tuple(tokenizer.encode(tokenizer.decode(one))) != one]
    assert len(others) > len(learnt) / 2, "or else tokenising them again would not be noticed here"


def texts_of(batch: RolloutBatch) -> list[tuple[tuple[int, ...], tuple[int, ...], list[float]]]:
    """Of each answer that is learnt: its prompt, its own ids, and how probable they were when they were drawn."""
    rows, found = batch.rows, []
    for number in range(batch.num_sequences):
        inside = rows.documents[0] == number
        targets, learnt = rows.targets[0, inside], rows.weights[0, inside] > 0
        whole = [int(rows.tokens[0, inside][0]), *targets.tolist()]
        completion = tuple(targets[learnt].tolist())
        prompt = tuple(whole[: len(whole) - len(completion)])
        assert (*prompt, *completion) == tuple(whole), "what is learnt stands at the end"
        assert rows.tokens[0, inside].tolist() == whole[:-1]
        found.append((prompt, completion, batch.behaviour[batch.answers == number].tolist()))
    return found


PACKAGE = Path(finemoe.__file__).parent
WAY = [
    *(path for path in sorted((PACKAGE / "methods/grpo").glob("*.py")) if path.name != "prompts.py"),
    *(PACKAGE / f"generation/{name}.py" for name in ("engine", "scheduler", "runner", "sequence", "sampling")),
]
"""From prompts as ids to batches. prompts.py is before it: it tokenises the questions, once."""


def tokenised(path: Path) -> list[str]:
    """Where a file may make ids of text: names that begin with encode, but for `text.encode()` into bytes."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    to_bytes = [one.func for one in nodes if isinstance(one, ast.Call) and not (one.args or one.keywords)]
    found = []
    for node in nodes:
        match node:
            case ast.Attribute(attr=name) if node not in to_bytes:
                found.append(name)
            case ast.Name(id=name) | ast.alias(name=name):
                found.append(name)
    return [f"{path.name}: {name}" for name in found if name.startswith("encode")]


def test_13_nothing_is_tokenised_between_engine_and_batch() -> None:
    """Complaint 13 of post-training, looked for in the code."""
    assert [one for path in WAY for one in tokenised(path)] == []
    assert tokenised(PACKAGE / "methods/grpo/prompts.py") != [], "the search finds what there is"


CAPPED: dict[str, dict[str, Any]] = {
    "switch": {"capacity_factor": 0.5},
    "gshard": {"capacity_factor": 0.5},
    "v2": {"capacity_factor": 0.5, "capacity_level": "device", "capacity_exempt": 0.1},
}


@pytest.mark.parametrize("arm", CAPPED)
def test_a_model_that_dropped_tokens_drops_none_of_its_answers(corpus: Path, tmp_path: Path, arm: str) -> None:
    """Complaint 12 of post-training: with room for some alone, other experts would learn an answer than wrote it."""
    start = base(corpus, tmp_path, arm, model={"feed_forward": CAPPED[arm]})
    assert all(one["dropped"] > 0 for one in steps(start)), "the base did, or this says nothing"
    run = train(practising(start, {"inner_epochs": 2}, **SHORT), out=tmp_path / "run", quiet=True).directory
    found = steps(run)
    assert [one["dropped"] for one in found] == [0, 0]
    assert found[0]["terms"]["expert_mismatch"] == 0
    assert found[0]["terms"]["off_policy_kl"] < 1e-8
    config = json.loads((run / "config.json").read_text())
    layers = [block["feed_forward"] for block in config["model"]["blocks"]]
    assert all(one.get("capacity_factor") is None for one in layers)
