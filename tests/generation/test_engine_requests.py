"""What a request may ask of the engine beside its text: constraints, experts, deadlines, bits that nobody moves."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from finemoe.core.errors import ConfigError, DataError
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.engine import blocks_for
from finemoe.generation.grammar import Grammar
from finemoe.generation.sequence import Sequence
from finemoe.generation.speculation import FromText
from finemoe.generation.steady import steady
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.presets import resolve
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer
from oracles.steady import complete

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=10)
DRAWN = SamplingConfig(seed=3, max_new_tokens=10)


@pytest.fixture(scope="module", params=["tiny-moe", "tiny-v3", "tiny-dense"])
def model(request: pytest.FixtureRequest) -> Transformer:
    made = Transformer(expand(resolve({"preset": request.param, "vocab_size": 300, "init_std": 0.1}, "test")))
    initialize(made, seed=1)
    return made.eval()


def done(engine: Engine, requests: list[Request]) -> list[Any]:
    ids = [engine.submit(request) for request in requests]
    found = {event.sequence.id: event.sequence for event in engine.events()}
    return [found[id] for id in ids]


def tokens_fed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass from now on has, as they come."""
    fed: list[int] = []
    forward = model.forward

    def counted(tokens: torch.Tensor, **others: Any) -> Any:
        fed.append(tokens.numel())
        return forward(tokens, **others)

    monkeypatch.setattr(model, "forward", counted)
    return fed


def test_among_thirty_two_others_a_text_is_the_same_to_the_last_bit(model: Transformer) -> None:
    if not steady(model):
        pytest.skip("no C++ kernels here")
    prompts = [tuple((7 * n + k) % 300 for k in range(1 + 5 * n % 60)) for n in range(33)]
    for sampling in (GREEDY, DRAWN):
        alone = Engine(model, steady=True).generate([prompts[9]], sampling)[0]
        together = Engine(model, steady=True).generate(prompts, sampling)[9]
        assert together.completion == alone.completion
        assert together.logprobs == alone.logprobs


def test_how_much_memory_there_is_changes_no_bit_of_a_steady_engine(model: Transformer) -> None:
    prompts = [tuple((7 * n + k) % 300 for k in range(1 + 5 * n % 60)) for n in range(20)]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24)
    block = 8 * 4 * sum(config.attention.cache_elements_per_token() for config in model.config.blocks)
    tight, ample = (
        Engine(model, steady=True, block_size=8, cache_bytes=blocks * block).generate(prompts, sampling)
        for blocks in (14, 400)
    )
    assert [one.completion for one in tight] == [one.completion for one in ample]
    if steady(model):
        assert [one.logprobs for one in tight] == [one.logprobs for one in ample]


def test_steady_engines_give_the_bits_of_the_loop_that_evaluation_had(model: Transformer) -> None:
    prompts = [tuple((7 * n + k) % 300 for k in range(1 + 5 * n % 60)) for n in range(12)]
    sequences = [Sequence.start(n, prompt, DRAWN, 0) for n, prompt in enumerate(prompts)]
    before = {one.id: one for one in complete(model, sequences, lambda _: False, stop_ids=frozenset(), vocab_size=300)}
    after = Engine(model, steady=True).generate(prompts, DRAWN)
    assert [one.completion for one in after] == [before[n].completion for n in range(12)]
    if steady(model):
        assert [one.logprobs for one in after] == [before[n].logprobs for n in range(12)]


def test_constraints_and_experts_are_those_of_their_request() -> None:
    model = Transformer(expand(resolve({"preset": "tiny-moe", "vocab_size": 300, "init_std": 0.1}, "test")))
    initialize(model, seed=2)
    model.eval()
    layers = list(model.moe_layers)
    few = torch.zeros(63, dtype=torch.bool)
    few[10:20] = True
    held = [
        None,
        {layer: RoutingConstraint(allowed=few) for layer in layers},
        {layer: RoutingConstraint(num_active=2, shared=False) for layer in layers},
    ]
    prompt = tuple(range(50, 90))
    requests = [Request(prompt, GREEDY, constraint=one, experts=True) for one in held]
    engine = Engine(model, block_size=8)
    done(engine, [Request(prompt, GREEDY)])  # what is known of a prompt says nothing of its experts
    together = done(engine, requests)
    for number, request in enumerate(requests):
        (alone,) = done(Engine(model, block_size=8), [request])
        assert together[number].completion == alone.completion
        assert together[number].experts == alone.experts
        chosen = together[number].experts[layers[0]]
        assert len(chosen) == len(prompt) + 9  # what was drawn last is not read
        assert {len(one) for one in chosen} == {2 if number == 2 else 7}
    assert {expert for one in together[1].experts[layers[1]] for expert in one} <= set(range(10, 20))
    assert len({tuple(one.completion) for one in together}) == 3


def test_a_prefix_under_another_constraint_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(expand(resolve({"preset": "tiny-moe", "vocab_size": 300, "init_std": 0.1}, "test")))
    initialize(model, seed=2)
    model.eval()
    without = {layer: RoutingConstraint(shared=False) for layer in model.moe_layers}
    engine = Engine(model, block_size=8)
    prompt = tuple(range(50, 90))
    first = done(engine, [Request(prompt, GREEDY)])
    second = done(engine, [Request(prompt, GREEDY, constraint=without)])
    equal = {layer: RoutingConstraint(shared=False) for layer in model.moe_layers}
    fed = tokens_fed(model, monkeypatch)
    third = done(engine, [Request(prompt, GREEDY, constraint=equal)])
    assert sum(fed) < len(prompt)  # an equal constraint is the same one
    monkeypatch.undo()
    assert done(Engine(model), [Request(prompt, GREEDY, constraint=without)])[0].completion == second[0].completion
    assert second[0].completion == third[0].completion != first[0].completion


def test_time_and_others_may_end_a_request_and_its_blocks_are_free(model: Transformer) -> None:
    engine = Engine(model, cache_bytes=1 << 20, reuse=False)
    pool = engine._scheduler._pool
    late = engine.submit(Request((5,), GREEDY, deadline=time.monotonic() - 1))
    ended = engine._sequences[late]
    others = [engine.submit(Request((6, n), GREEDY)) for n in range(3)]
    kept = [engine._sequences[id] for id in others]
    engine.step()
    assert ended.finish_reason == "deadline"
    engine.cancel(others[1])
    list(engine.events())
    assert [one.finish_reason for one in kept] == ["length", "cancelled", "length"]
    assert pool.num_free == pool.num_blocks


def test_the_cache_takes_what_size_says(model: Transformer) -> None:
    numbers = measure(model.config, 1).cache_elements_per_token
    if model.config.mtp:
        numbers += sum(block.attention.cache_elements_per_token() for block in model.config.mtp)
    for dtype, width in ((None, 4), (torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
        assert blocks_for(model, 16, dtype, 10 * 16 * width * numbers) == 10
        caches = model.new_blocks(3, 16, dtype)
        held = [value for layer in caches for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert sum(one.numel() * one.element_size() for one in held) == 3 * 16 * width * numbers
    with pytest.raises(DataError, match="no room for a block"):
        blocks_for(model, 16, None, 10)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.95), (torch.float8_e4m3fn, 0.5)], ids=str)
def test_a_narrow_cache_says_nearly_the_same(model: Transformer, dtype: torch.dtype, least: float) -> None:
    prompts = [tuple((11 * n + k) % 300 for k in range(30)) for n in range(6)]
    short = SamplingConfig(temperature=0.0, max_new_tokens=1)
    plain, narrow = (Engine(model, cache_dtype=kind).generate(prompts, short) for kind in (None, dtype))
    difference = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(plain, narrow, strict=True)]
    assert 0 < max(difference) < (0.05 if dtype is torch.bfloat16 else 0.5)


def test_samples_of_one_prompt_read_it_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = tokens_fed(model, monkeypatch)
    prompt = tuple(range(100, 200))
    Engine(model, block_size=16).generate([prompt] * 4, DRAWN)
    assert sum(fed) == 100 + 3 + 4 * 9


@pytest.mark.parametrize("chunk", [7, 256])
def test_a_prompt_is_scored_and_alternatives_are_reported(model: Transformer, chunk: int) -> None:
    prompt = tuple(range(40, 70))
    asked = SamplingConfig(seed=1, max_new_tokens=4, logprobs=3, prompt_logprobs=2)
    engine = Engine(model, block_size=8, chunk=chunk, max_tokens=chunk)
    engine.generate([prompt], GREEDY)  # its blocks are not used again: all of the prompt has to be read
    (one,) = done(engine, [Request(prompt, asked)])
    text = torch.tensor([[*prompt, *one.completion]])
    with torch.inference_mode():
        logprobs = model.logits(model(text).hidden)[0].log_softmax(-1)
    assert len(one.prompt_logprobs) == len(prompt) - 1
    reported = [*one.prompt_logprobs, *zip(one.logprobs, one.likely, strict=True)]
    for place, (logprob, likely) in enumerate(reported):
        best = logprobs[place].topk(2 if place < len(prompt) - 1 else 3)
        assert logprob == pytest.approx(float(logprobs[place, text[0, place + 1]]), abs=1e-3)
        assert [value for _, value in likely] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert all(value == pytest.approx(float(logprobs[place, token]), abs=1e-3) for token, value in likely)


def test_a_grammar_is_followed_beside_a_request_without_one() -> None:
    pytest.importorskip("llguidance", reason="pip install 'finemoe[serve]'")
    tokenizer = Tokenizer.train(['{"name": "x", "count": 12}\n' * 40], 300)
    made = Transformer(expand(resolve({"preset": "tiny-moe", "vocab_size": 300, "init_std": 0.1}, "test")))
    initialize(made, seed=1)
    made.eval()
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer"}},
        "required": ["count"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    sampling = SamplingConfig(seed=2, max_new_tokens=60, logprobs=2)
    for guesses in (None, FromText(3)):
        engine = Engine(made, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer, guesses=guesses)
        asked = [
            Request((5, 6), sampling, grammar=Grammar(json_schema=schema)),
            Request((5, 6), sampling),
            Request((5, 6), sampling, grammar=Grammar(choice=("yes", "no"))),
        ]
        held, free, chosen = done(engine, asked)
        if held.finish_reason == "stop":
            assert isinstance(json.loads(tokenizer.decode(held.text_ids, continues=True))["count"], int)
        assert tokenizer.decode(chosen.text_ids, continues=True) in ("yes", "no")
        alone = Engine(made, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer)
        assert free.completion == alone.generate([(5, 6)], sampling)[0].completion
    with pytest.raises(ConfigError, match="knows the model's tokenizer"):
        Engine(made).submit(asked[0])
