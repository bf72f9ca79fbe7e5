"""Scores against a plain loop; windows against their definition; and the same bits at every batch size."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.scoring import (
    Window,
    continuation_windows,
    middle_ids,
    rolling_windows,
    score,
    text_windows,
)
from finemoe.generation.steady import least_tokens, steady
from finemoe.model.native import available
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, small_config, v3_config

VOCAB = 300
NATIVE = pytest.mark.skipif(not available(), reason="the C++ kernels, which make it exact, do not run here")
DENSE = {"feed_forward": {"kind": "dense", "ffn_hidden_size": 24}, "leading": None}
MODELS = {
    "dense": lambda: small_config(vocab_size=VOCAB, **DENSE),
    "moe": lambda: small_config(vocab_size=VOCAB),
    "latent": lambda: v3_config(vocab_size=VOCAB),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(MODELS[request.param]()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the cat sat on the mat and the dog sat on the log. " * 20
    return Tokenizer.train([text], VOCAB)


def opened(tokenizer: Tokenizer, reach: int | None = 16) -> LanguageModel:
    return LanguageModel(build(MODELS["moe"]()).eval(), tokenizer, Path("model"), own=True, reach=reach)


def drawn_windows(count: int, longest: int = 90) -> list[Window]:
    """Of all lengths, some of which begin alike or are the same but for the last token."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, longest, (), generator=g))
        tokens = torch.randint(0, VOCAB, (length,), generator=g).tolist()
        made.append(Window(tuple(tokens), int(torch.randint(1, length, (), generator=g))))
    alike = [Window((*window.tokens[:-1], 7), 1) for window in made[:5] if len(window.tokens) > 1]
    shorter = [Window(window.tokens[: max(2, len(window.tokens) // 2)], 1) for window in made[:5]]
    return [*made, *alike, *shorter, Window((1, 2), 1)]


def plain(model: Transformer, window: Window) -> tuple[float, bool]:
    """One window at a time, the whole softmax, token by token."""
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([window.tokens[:-1]])).hidden)[0].double()
    total, greedy = 0.0, True
    for place in range(len(window.tokens) - 1 - window.num_targets, len(window.tokens) - 1):
        target = window.tokens[place + 1]
        total += float(logits[place].softmax(-1)[target].log())
        greedy = greedy and int(logits[place].argmax()) == target
    return total, greedy


def scored(model: Transformer, windows: list[Window], rows: int, most_tokens: int = 8192) -> list:
    found = {i: s for batch, _ in score(model, windows, rows, most_tokens) for i, s in batch}
    return [found[i] for i in range(len(windows))]


def test_scores_are_those_of_a_plain_loop(model: Transformer) -> None:
    windows = drawn_windows(20)
    for window, got in zip(windows, scored(model, windows, 8), strict=True):
        logprob, greedy = plain(model, window)
        assert got.logprob == pytest.approx(logprob, abs=2e-4)
        assert got.greedy == greedy


def test_a_most_probable_continuation_is_greedy(model: Transformer) -> None:
    tokens = [3, 5]
    with torch.inference_mode():
        for _ in range(4):
            tokens.append(int(model.logits(model(torch.tensor([tokens])).hidden)[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % VOCAB]
    good, bad = scored(model, [Window(tuple(tokens), 4), Window(tuple(other), 4)], 2)
    assert good.greedy
    assert not bad.greedy


@NATIVE
def test_every_batch_size_gives_the_same_bits(model: Transformer) -> None:
    assert steady(model)
    windows = drawn_windows(60)
    alone = scored(model, windows, 1)
    for rows, most_tokens in ((64, 8192), (7, 8192), (64, 200), (3, 1)):
        assert scored(model, windows, rows, most_tokens) == alone
    # Nor does it matter what else is asked: a run that goes on with half of the questions gets the same answers.
    assert scored(model, windows[::2], 64) == alone[::2]


def test_rows_that_are_read_once_serve_all_who_begin_with_them(model: Transformer) -> None:
    rows: list[int] = []
    original = model.forward

    def counting(tokens, **more):
        rows.append(len(tokens))
        return original(tokens, **more)

    options = [Window((4, 5, 6, option), 1) for option in (10, 11, 12, 13)]
    model.forward = counting  # type: ignore[method-assign]
    try:
        together = scored(model, [*options, Window((4, 5, 6), 2)], 64)
    finally:
        del model.forward
    assert rows == [1]
    assert [read for _, read in score(model, options, 64)] == [3]  # what all four share was read once
    for option, got in zip(options, together, strict=False):
        assert got.logprob == pytest.approx(scored(model, [option], 1)[0].logprob, abs=1e-4)


@given(length=st.integers(0, 40), reach=st.integers(1, 12))
def test_rolling_windows_ask_for_each_token_once_with_all_that_fits_before(length: int, reach: int) -> None:
    ids = list(range(100, 100 + length))
    windows = list(rolling_windows(ids, 1, reach))
    asked = [token for window in windows for token in window.tokens[-window.num_targets :]]
    assert asked == ids
    for number, window in enumerate(windows):
        assert 2 <= len(window.tokens) <= reach + 1  # what is read is one less
        last = number == len(windows) - 1
        if number and not last:
            assert len(window.tokens) == window.num_targets + 1
        if number and last:
            assert len(window.tokens) == reach + 1
        stream = [1, *ids]
        end = stream.index(window.tokens[-1]) + 1
        assert list(window.tokens) == stream[end - len(window.tokens) : end]


def test_rolling_windows_by_hand() -> None:
    windows = list(rolling_windows([10, 11, 12, 13, 14, 15, 16, 17], 1, 3))
    assert windows == [Window((1, 10, 11, 12), 3), Window((12, 13, 14, 15), 3), Window((14, 15, 16, 17), 2)]


def test_a_rolled_text_is_the_sum_of_a_plain_loop(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer)
    text = "the dog and the cat sat on the mat. " * 5
    asked = text_windows(model, text)
    ids = tokenizer.encode(text)
    assert asked.num_targets == len(ids)
    assert len(asked.windows) > 2
    total = math.fsum(plain(model.model, window)[0] for window in asked.windows)
    got = math.fsum(s.logprob for s in scored(model.model, list(asked.windows), 4))
    assert got == pytest.approx(total, abs=1e-3)
    assert text_windows(model, "").windows == ()


def test_blanks_that_end_the_context_move_on(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer, reach=64)
    whole = tokenizer.encode("the cat sat")
    for context, continuation in (("the cat", " sat"), ("the cat ", "sat")):
        window = continuation_windows(model, context, continuation).windows[0]
        assert window.tokens == tuple(whole)
        assert window.num_targets == len(whole) - len(tokenizer.encode("the cat"))


def test_a_border_within_a_token_is_where_the_contexts_own_tokens_end(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer, reach=64)
    whole, before = tokenizer.encode("the cats"), tokenizer.encode("the ca")
    window = continuation_windows(model, "the ca", "ts").windows[0]
    assert window.tokens == tuple(whole)
    assert window.num_targets == len(whole) - min(len(before), len(whole) - 1)
    # " the" is one token and " t", " th" are no more: the last token is asked for, never nothing.
    assert continuation_windows(model, "on th", "e").windows[0].num_targets >= 1


def test_an_empty_context_is_the_beginning_of_a_document(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer)
    for context in ("", "  "):
        window = continuation_windows(model, context, "cat").windows[0]
        assert window.tokens == (tokenizer.end_of_text_id, *tokenizer.encode(context + "cat"))
    with pytest.raises(ConfigError, match="empty text"):
        continuation_windows(model, "", "")


def test_what_is_too_long_is_cut_from_the_left_and_counted(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer, reach=8)
    whole = tokenizer.encode("the cat sat on the mat and the cat and the dog")
    assert len(whole) > 9
    asked = continuation_windows(model, "the cat sat on the mat and the cat and the", " dog")
    assert asked.truncated
    assert asked.windows[0].tokens == tuple(whole[-9:])
    assert not continuation_windows(model, "the cat", " sat").truncated
    endless = " the cat sat on the mat" * 4
    long = continuation_windows(model, "dog", endless)
    assert long.truncated
    assert long.num_targets == len(tokenizer.encode("dog" + endless)) - len(tokenizer.encode("dog"))
    assert all(len(window.tokens) <= 9 for window in long.windows)


def test_fill_in_the_middle_needs_its_tokens(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="fill-in-the-middle"):
        middle_ids(opened(tokenizer), "a", "b", 100)


def test_fill_in_the_middle_puts_prefix_then_suffix_then_the_hole() -> None:
    facts = json.loads(Tokenizer.train(["def f(): return"], 280).to_json())
    first = 1000
    for number, name in enumerate(("<fim_prefix>", "<fim_suffix>", "<fim_middle>")):
        token = {"content": name, "id": first + number, "special": True, "single_word": False, "lstrip": False}
        facts["added_tokens"].append({**token, "rstrip": False, "normalized": False})
    coder = Tokenizer.parse(json.dumps(facts), "coder")
    begin, hole, end = (coder.id_of(name) for name in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
    before, after = coder.encode("def f(a, b):"), coder.encode("return a + b")
    asked = middle_ids(opened(coder), "def f(a, b):", "return a + b", 100)
    assert asked == ([begin, *before, hole, *after, end], False)
    # What is far from the gap goes first: the end of the suffix, the beginning of the prefix.
    ids, cut = middle_ids(opened(coder), "def f(a, b):", "return a + b", 12)
    assert cut
    assert ids == [begin, *before[-6:], hole, *after[:3], end]


def completions(
    model: Transformer, prompts: list[list[int]], temperature: float, stop_ids: Collection[int] = (), most: int = 99
) -> list[list[float]]:
    """Tokens and logprobs of each, by a steady engine; the caller ends them after `most` tokens."""
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=12)
    engine = Engine(model, stop_ids=stop_ids, vocab_size=VOCAB, steady=True)
    ids = [engine.submit(Request(tuple(prompt), sampling)) for prompt in prompts]
    done = {}
    for event in engine.events():
        done[event.sequence.id] = event.sequence
        if len(event.sequence.completion) == most:
            event.sequence.stop("here")
    return [[*done[id].completion, *done[id].logprobs] for id in ids]


@NATIVE
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_completion_is_the_same_alone_and_among_others(model: Transformer, temperature: float) -> None:
    g = torch.Generator().manual_seed(2)
    lengths = [1, 2, 5, 9, 31, 32, 33, 60, 3, 14, 40, 8, 90, 300]
    prompts = [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in lengths]
    together = completions(model, prompts, temperature)
    assert together == [completions(model, [prompt], temperature)[0] for prompt in prompts]
    assert together == completions(model, prompts[::-1], temperature)[::-1]


def test_a_greedy_completion_is_that_of_a_plain_loop(model: Transformer) -> None:
    prompts = [[4], [1, 2, 3, 4, 5], list(range(40))]
    for prompt, got in zip(prompts, completions(model, prompts, 0.0), strict=True):
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(12):
                tokens.append(int(model.logits(model(torch.tensor([tokens])).hidden)[0, -1].argmax()))
        assert got[:12] == tokens[len(prompt) :]


def test_completions_end_at_stop_tokens_and_where_the_caller_says(model: Transformer) -> None:
    free = completions(model, [[4, 5]], 0.0)[0][:12]
    ended = completions(model, [[4, 5]], 0.0, stop_ids=frozenset({free[3]}))[0]
    first = free.index(free[3])
    assert ended[: first + 1] == free[: first + 1]
    assert len(ended) == 2 * (first + 1)
    told = completions(model, [[4, 5]], 0.0, most=2)[0]
    assert told[:2] == free[:2]
    assert len(told) == 4
    assert completions(model, [], 0.0) == []


def test_the_least_pass_gives_an_expert_enough_rows() -> None:
    model = build(small_config(vocab_size=VOCAB))
    assert least_tokens(model) == 64  # 6 experts, 2 a token: 22 would do, the products want 64
    wide = small_config(vocab_size=VOCAB, feed_forward={**DENSE["feed_forward"]}, leading=None)
    assert least_tokens(build(wide)) == 64
