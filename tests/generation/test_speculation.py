"""Guesses change no text: with each source of them, greedy and drawn, the tokens are those of an engine without."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from finemoe.core.errors import ConfigError
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.speculation import Acceptance, FromModel, FromModule, FromText, Guesses
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer

PROMPTS = [(5, 9, 30, 5, 9), tuple(range(40, 90)), (7,), (5, 9, 30, 5, 9), (1, 2, 1, 2, 1)]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=40)
DRAWN = SamplingConfig(temperature=0.7, top_k=8, seed=5, max_new_tokens=40)


def make(seed: int = 1, **changes: Any) -> Transformer:
    table = {"preset": "tiny-v3", "vocab_size": 100, "num_layers": 2, "init_std": 0.3, **changes}
    model = Transformer(expand(resolve(table, "test")))
    initialize(model, seed=seed)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make()


def sources(model: Transformer) -> dict[str, Guesses]:
    return {
        "text": FromText(3),
        "module, once": FromModule(model),
        "module, again": FromModule(model, most=3),
        "the model itself": FromModel(model, 64, most=3, block_size=8),
        "another model": FromModel(make(2, preset="tiny-moe"), 64, most=4, block_size=8),
    }


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", sources(make()))
@pytest.mark.parametrize("tight", [False, True])
def test_guesses_change_no_token(model: Transformer, name: str, sampling: SamplingConfig, tight: bool) -> None:
    # Little room, so that sequences are put back in the middle of their guesses.
    room: dict[str, Any] = (
        {"cache_bytes": 4 * 96 * 3 * 130, "block_size": 4, "max_tokens": 9, "chunk": 5} if tight else {}
    )
    plain = Engine(model).generate(PROMPTS, sampling)
    engine = Engine(model, guesses=sources(model)[name], **room)
    guessed = engine.generate(PROMPTS, sampling)
    assert [one.completion for one in guessed] == [one.completion for one in plain]
    found = engine.acceptance
    assert found.tokens == 40 * len(PROMPTS)
    assert sum(found.guessed) > 0
    if name == "the model itself" and sampling is GREEDY:
        assert found.rates == [1.0] * len(found.rates)
        assert found.tokens_per_pass > (1.5 if tight else 3)


def test_a_module_that_was_trained_to_look_ahead_is_believed() -> None:
    """A text whose next token follows from the last: the module is made to know it."""
    model = make(3)
    with torch.no_grad():  # the head says what the embedding of the token that follows says
        for parameter in model.mtp[0].parameters():
            parameter.zero_()
        model.mtp[0].norm.weight.fill_(1.0)
        model.mtp[0].embedding_norm.weight.fill_(1.0)
        model.mtp[0].hidden_norm.weight.fill_(1.0)
        model.mtp[0].projection.weight[:, : model.config.hidden_size] = torch.eye(model.config.hidden_size)
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
    plain = Engine(model).generate([(5, 6)], GREEDY)[0]
    engine = Engine(model, guesses=FromModule(model, most=4))
    assert engine.generate([(5, 6)], GREEDY)[0].completion == plain.completion
    assert engine.acceptance.rates == [1.0] * 4
    assert engine.acceptance.tokens_per_pass == 4


def test_a_module_that_is_missing_or_worthless_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="no multi-token prediction module"):
        FromModule(make(preset="tiny-moe"))
    model = make(4)
    with caplog.at_level(logging.WARNING, "finemoe"):
        Engine(model, guesses=FromModule(model)).generate([(n,) for n in range(8)], GREEDY)
    assert "its weights may be missing or never trained" in caplog.text


def test_requests_come_and_go_while_others_are_guessed(model: Transformer) -> None:
    engine = Engine(model, guesses=FromModule(model, most=2))
    first = engine.submit(Request((5, 9), GREEDY))
    engine.step()
    second = engine.submit(Request((7,), DRAWN))
    for _ in range(4):
        engine.step()
    assert engine.cancel(first)
    assert not engine.cancel(first)
    drawn = [event.token_id for event in engine.events() if event.sequence.id == second]
    assert drawn == Engine(model).generate([(7,)], DRAWN)[0].completion[-len(drawn) :]
    assert not engine.busy


def test_acceptance_is_counted_by_depth() -> None:
    found = Acceptance()
    for depth, right in ((0, True), (0, False), (1, True), (0, True)):
        found.count(depth, right)
    found.passed(2, 5)
    assert found.rates == [2 / 3, 1.0]
    assert found.tokens_per_pass == 2.5
    assert Acceptance().tokens_per_pass == 0.0


@pytest.mark.parametrize("name", ["text", "module, again", "the model itself"])
def test_the_last_token_alone_says_that_it_is_the_last(model: Transformer, name: str) -> None:
    # Several tokens may come of one pass, and who looks later finds the sequence further on, or at its end.
    engine = Engine(model, guesses=sources(model)[name], stop_ids=[3])
    for seed, count in enumerate((5, 12, 30)):
        engine.submit(Request((1, 2, 1, 2), SamplingConfig(seed=seed, max_new_tokens=count)))
    said: dict[int, list[str | None]] = {}
    ended: dict[int, str | None] = {}
    while engine.busy:
        events = engine.step()
        for event in events:
            said.setdefault(event.sequence.id, []).append(event.finish_reason)
        ended |= {one.id: one.finish_reason for one in engine.ended}
    assert len(ended) == 3
    for number, reasons in said.items():
        assert reasons[-1] == ended[number] is not None
        assert set(reasons[:-1]) <= {None}
