"""Every knob against the distribution that its definition gives, computed token by token in Python's float64."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from finemoe.core import seeds
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.generation import SamplingConfig, pick
from finemoe.generation.processors import Context
from finemoe.generation.sampling import alternatives, distribution


def oracle(logits: list[float], config: SamplingConfig, context: Context) -> list[float]:
    """Probabilities of one row, in the order of the definitions."""
    scores, drawn = list(logits), list(context.completion)
    for token in range(len(scores)):
        if token in drawn or token in context.prompt:
            penalty = config.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= drawn.count(token) * config.frequency_penalty + (token in drawn) * config.presence_penalty
        scores[token] += dict(config.logit_bias).get(token, 0.0)
    alive = {t for t in range(len(scores)) if context.allowed is None or context.allowed[t]}
    if len(drawn) < config.min_new_tokens:
        alive = alive - set(context.end_ids) or alive
    order = sorted(alive, key=lambda t: (-scores[t], t))
    if config.temperature == 0:
        return [float(token == order[0]) for token in range(len(scores))]
    weights = {t: math.exp((scores[t] - scores[order[0]]) / config.temperature) for t in order}
    order = order[: config.top_k]
    if config.top_p not in (None, 1.0):
        whole, reached, kept = sum(weights[t] for t in order), 0.0, []
        for token in order:
            if kept and reached >= config.top_p:
                break
            kept.append(token)
            reached += weights[token] / whole
        order = kept
    order = [t for t in order if weights[t] >= (config.min_p or 0.0) * weights[order[0]]]
    whole = sum(weights[t] for t in order)
    return [weights[t] / whole if t in order else 0.0 for t in range(len(scores))]


KNOBS: dict[str, list[Any]] = {
    "temperature": [0.0, 0.3, 0.7, 1.0, 1.7],
    "top_k": [None, 1, 2, 5, 40],
    "top_p": [None, 0.2, 0.7, 0.95, 1.0],
    "min_p": [None, 0.0, 0.05, 0.4, 1.0],
    "repetition_penalty": [1.0, 1.3, 0.6],
    "presence_penalty": [0.0, 0.5, -1.5],
    "frequency_penalty": [0.0, 0.7, -0.4],
    "logit_bias": [{}, {0: 3.0, 2: -100.0}, {1: -0.7, 900: 5.0}],
    "min_new_tokens": [0, 1, 5],
}


def situations(count: int, seed: int) -> list[tuple[list[float], SamplingConfig, Context]]:
    draw, found = random.Random(seed), []
    for _ in range(count):
        vocab = draw.randrange(3, 12)
        knobs = {name: draw.choice(values) for name, values in KNOBS.items()}
        logits = torch.tensor([draw.gauss(0, 2) for _ in range(vocab)]).tolist()
        allowed = torch.tensor([draw.random() < 0.6 for _ in range(vocab)])
        allowed[draw.randrange(vocab)] = True
        tokens = [[draw.randrange(vocab) for _ in range(draw.randrange(6))] for _ in range(2)]
        context = Context(*tokens, {0, draw.randrange(vocab)}, allowed if draw.random() < 0.5 else None)
        found.append((logits, SamplingConfig(**knobs), context))
    return found


@pytest.mark.parametrize("only", [*KNOBS, "all"])
def test_the_distribution_is_that_of_the_definitions(only: str) -> None:
    for logits, config, context in situations(200 if only != "all" else 1500, 1):
        chosen = config if only == "all" else SamplingConfig(**{only: config.model_dump()[only]})
        found = distribution(torch.tensor([logits]), chosen, [context])[0]
        assert found.dtype == torch.float64
        expected = torch.tensor(oracle(logits, chosen, context), dtype=torch.float64)
        torch.testing.assert_close(found.exp(), expected, atol=2e-6, rtol=0)
        assert torch.equal(found > -torch.inf, expected > 0)


@pytest.mark.parametrize("seed", range(6))
def test_draws_follow_the_distribution(seed: int) -> None:
    """Chi-square over 2000 draws of the combinations that leave more than one token."""
    found = [s for s in situations(100, 100 + seed) if max(oracle(*s)) < 0.9]
    found = [s for s in found if min(p for p in oracle(*s) if p) > 0.005]  # the test needs to expect a few of each
    assert len(found) >= 5
    for logits, config, context in found[:5]:
        expected = torch.tensor(oracle(logits, config, context), dtype=torch.float64)
        stream, count = seeds.generator(seed, "test"), 2000
        rows = torch.tensor([logits]).expand(count, -1)
        ids, _ = pick(rows, config, [stream] * count, [context] * count)
        seen = torch.bincount(ids, minlength=len(logits))
        assert not seen[expected == 0].any()
        kept = expected > 0
        assert chisquare(seen[kept].numpy(), count * expected[kept].numpy()).pvalue > 1e-4


def test_rows_of_a_batch_keep_their_own_past() -> None:
    logits, config = torch.randn(3, 8), SamplingConfig(repetition_penalty=1.5, frequency_penalty=1.0, min_new_tokens=2)
    contexts = [Context([1], [2, 2], {0}), Context([3], [], {0}), Context([], [5], {4})]
    together = distribution(logits, config, contexts)
    for row, context in enumerate(contexts):
        assert torch.equal(together[row], distribution(logits[row : row + 1], config, [context])[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_new_knob_changes_nothing(temperature: float) -> None:
    """To the bit, and without a copy of the logits."""
    logits, config = torch.randn(5, 3000), SamplingConfig(temperature=temperature, top_p=0.9)
    before = logits.clone()
    contexts = [Context([1, 2], [3], {0})] * 5
    plain = pick(logits, config, [seeds.generator(i, "x") for i in range(5)])
    given = pick(logits, config, [seeds.generator(i, "x") for i in range(5)], contexts)
    assert all(torch.equal(one, other) for one, other in zip(plain, given, strict=True))
    assert torch.equal(logits, before)


def test_the_logits_of_the_caller_are_never_changed() -> None:
    for logits, config, context in situations(50, 3):
        given = torch.tensor([logits])
        pick(given, config, [seeds.generator(0, "x")], [context])
        distribution(given, config, [context])
        assert given.tolist() == [logits]


def test_logprobs_are_the_models_own_and_with_a_grammar_those_of_what_it_allows() -> None:
    logits = torch.randn(1, 9)
    config = SamplingConfig(temperature=0.5, repetition_penalty=2.0, logit_bias={3: 2.0}, min_p=0.2)
    ids, logprobs = pick(logits, config, [seeds.generator(0, "x")], [Context([3], [4])])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, ids])
    allowed = torch.arange(9) % 2 == 0
    ids, logprobs = pick(logits, config, [seeds.generator(0, "x")], [Context([3], [4], allowed=allowed)])
    assert allowed[ids]
    torch.testing.assert_close(logprobs, (logits[0, ids].exp() / logits[0, allowed].exp().sum()).log())


def test_alternatives_are_the_most_probable_and_sum_to_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    (best,) = alternatives(logits, 2)
    own = logits.log_softmax(-1)[0]
    assert best == ((1, own[1].item()), (2, own[2].item()))
    (few,) = alternatives(logits, 99, [Context(allowed=torch.tensor([True, False, True, False]))])
    assert [token for token, _ in few] == [2, 0]
    assert sum(math.exp(logprob) for _, logprob in few) == pytest.approx(1.0)
    assert alternatives(logits, 0) == [()]


def test_what_ends_a_completion() -> None:
    ends = frozenset({1, 2})
    assert SamplingConfig().end_ids(ends) == {1, 2}
    assert SamplingConfig(stop_ids=[7]).end_ids(ends) == {1, 2, 7}
    assert SamplingConfig(stop_ids=7, ignore_end=True).end_ids(ends) == {7}


def test_the_older_name_of_ignore_end_goes_on() -> None:
    assert parse(SamplingConfig, {"stop_at_end_of_text": False}, "here").ignore_end
    assert parse(SamplingConfig, {"stop_at_end_of_text": True}, "here") == SamplingConfig()
    assert not SamplingConfig(ignore_end=True).stop_at_end_of_text
    with pytest.raises(ConfigError, match="opposite of ignore_end"):
        parse(SamplingConfig, {"stop_at_end_of_text": True, "ignore_end": False}, "here")


def test_a_configuration_is_a_key_and_comes_back_from_json() -> None:
    config = SamplingConfig(logit_bias={5: 1.0, 3: -2.0}, stop="\n", stop_ids=[4])
    assert config.stop == ("\n",)
    assert hash(config) == hash(SamplingConfig(logit_bias={"3": -2, 5: 1}, stop=["\n"], stop_ids=4))
    assert SamplingConfig(**json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {None: 1}}, "logit_bias"),
        ({"logit_bias": 3}, "logit_bias"),
        ({"stop": ["a", ""]}, "an empty string would stop"),
        ({"stop_ids": [-1]}, "stop_ids"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is more than max_new_tokens 8"),
        ({"logprobs": -1}, "logprobs"),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(SamplingConfig, bad, "here")


def test_transformers_defines_repetition_and_least_probability_alike() -> None:
    """The witness, in its own order: penalty, temperature, top-k, top-p, min-p."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    prompt, completion = [3, 5, 5], [7, 3]
    config = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.4)
    scores, seen = logits.clone(), torch.tensor([prompt + completion])
    for processor in (
        processors.RepetitionPenaltyLogitsProcessor(1.4),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.1),
    ):
        scores = processor(seen, scores)
    found = distribution(logits, config, [Context(prompt, completion)])
    assert 2 < (found > -torch.inf).sum() < 20
    torch.testing.assert_close(found.exp(), scores.double().softmax(-1), atol=1e-6, rtol=0)
