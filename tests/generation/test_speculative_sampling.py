"""Drawn texts with guesses against the exact distribution, by a chi-square test, and stops within a guess."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chi2

from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.sampling import distribution
from finemoe.generation.speculation import FromModel, FromModule, FromText, Guesses
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer

VOCAB, DRAWS = 8, 1500
PROMPT = tuple(first for first in range(VOCAB) for second in range(VOCAB) for first in (first, second))
"""Every pair is in it, so that look-up always has a guess."""


def make(seed: int, vocab: int = VOCAB, preset: str = "tiny-v3") -> Transformer:
    table = {"preset": preset, "vocab_size": vocab, "num_layers": 2, "init_std": 0.15}
    model = Transformer(expand(resolve(table, "test")))
    initialize(model, seed=seed)
    return model.eval()


def guesses_of(name: str, model: Transformer) -> Guesses:
    if name == "text":
        return FromText(2)
    if name == "module":
        return FromModule(model, most=2)
    return FromModel(make(2, preset="tiny-moe"), 1024, most=2)


@torch.inference_mode()
def exact(model: Transformer, sampling: SamplingConfig) -> torch.Tensor:
    """The probability of every three tokens after `PROMPT`, `[vocab, vocab, vocab]`, from whole texts."""
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    tokens = torch.cat([torch.tensor(PROMPT).expand(len(pairs), -1), pairs], dim=1)
    logits = model.logits(model(tokens).hidden[:, -3:])
    first, second, third = (distribution(logits[:, place], sampling).exp() for place in range(3))
    chosen = first.gather(1, pairs[:, :1]) * second.gather(1, pairs[:, 1:]) * third
    return chosen.view(VOCAB, VOCAB, VOCAB)


def surprise(found: Counter[tuple[int, ...]], expected: torch.Tensor) -> float:
    """The chi-square test's p; triples of which fewer than 5 are expected count as one."""
    wanted = (expected * DRAWS).flatten()
    have = torch.zeros_like(wanted)
    for (first, second, third), count in found.items():
        have[(first * VOCAB + second) * VOCAB + third] += count
    rare = wanted < 5
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    have = torch.cat([have[~rare], have[rare].sum()[None]])
    statistic = float(((have - wanted) ** 2 / wanted.clamp(min=1e-12)).sum())
    return float(chi2.sf(statistic, len(wanted) - 1))


@pytest.mark.parametrize("name", ["text", "module", "a small model"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 5}], ids=["plain", "cut"])
def test_drawn_texts_with_guesses_follow_the_models_distribution(name: str, sampling: dict[str, float]) -> None:
    model = make(1)
    config = SamplingConfig(seed=11, max_new_tokens=3, **sampling)
    engine = Engine(model, guesses=guesses_of(name, model), max_sequences=64)
    done: dict[int, tuple[int, ...]] = {}
    parent = None
    for repetition in range(DRAWS):
        number = engine.submit(Request(PROMPT, config, repetition, parent))
        parent = number if parent is None else parent
    for event in engine.events():
        done[event.sequence.id] = tuple(event.sequence.completion)
    expected = exact(model, config)
    assert expected.sum() == pytest.approx(1.0, abs=1e-4)
    right, guessed = sum(engine.acceptance.right), sum(engine.acceptance.guessed)
    assert guessed > DRAWS / 2  # so that there is something to get wrong
    assert 0 < right < guessed
    found = Counter(done.values())
    assert surprise(found, expected) > 1e-3
    # The test would notice if one text in five had another end.
    moved = ((a, b, (c + (number % 5 == 0)) % VOCAB) for number, (a, b, c) in enumerate(done.values()))
    assert surprise(Counter(moved), expected) < 1e-3


def test_nothing_stays_behind_a_stop_that_was_guessed() -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat and the cat sat on the hat. "] * 5, vocab_size=290)
    model = make(3, vocab=300, preset="tiny-dense")
    prompt = tuple(tokenizer.encode("the cat sat on the mat and the cat sat"))
    free = Engine(model, tokenizer=tokenizer)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=40, repetition_penalty=0.7)
    plain = free.generate([prompt], sampling)[0]
    assert plain.text is not None
    text = plain.text.text
    pieces = {text[place : place + 2] for place in range(2, len(text) - 2)}
    stops = {piece for piece in pieces if piece.isascii()}  # what is no character yet may need another token
    assert len(stops) > 3
    ended = 0
    for stop in sorted(stops):
        asked = sampling.model_copy(update={"stop": (stop,)})
        one = Engine(model, tokenizer=tokenizer).generate([prompt], asked)[0]
        engine = Engine(model, tokenizer=tokenizer, guesses=FromText(4))
        other = engine.generate([prompt], asked)[0]
        assert one.text is not None
        assert other.text is not None
        assert other.completion == one.completion
        assert stop not in tokenizer.decode(
            other.completion[:-1], continues=True
        )  # it ends with the token that ended it
        assert (
            (other.text.text, other.stopped_by) == (one.text.text, stop) == (text[: text.index(stop)], one.stopped_by)
        )
        ended += engine.acceptance.tokens_per_pass > 1
    assert ended  # some of them by a token that was guessed
