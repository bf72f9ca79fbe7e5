"""Grammars through llguidance: what comes out always parses, and a state rolled back never went on."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from finemoe.core import seeds
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.generation import SamplingConfig, pick
from finemoe.generation.grammar import Grammar, Grammars, GrammarState
from finemoe.generation.processors import Context
from finemoe.generation.sampling import alternatives, distribution
from finemoe.text import Tokenizer
from finemoe.text.from_vocabulary import CONTROL, NORMAL, UNUSED, tokenizer_from_vocabulary

here = pytest.mark.skipif(find_spec("llguidance") is None, reason="llguidance is not installed (the extra serve)")

TEXT = ['{"name": "Ada", "tags": ["x", "é🙂"], "n": 12} true false yes no maybe 2026-11-28 aab abab'] * 4
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -5, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "é🙂", None]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "n", "ok"],
    "additionalProperties": False,
    **COMPACT,
}


def trained() -> Tokenizer:
    return Tokenizer.train(TEXT, 300)


def from_gguf() -> Tokenizer:
    """Bytes, words, ids without a token, and several tokens that end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<s>", "</s>", "<|eot|>", "[PAD259]", "ab", "ye", "yes", '{"']
    types = [NORMAL] * 256 + [CONTROL] * 3 + [UNUSED] + [NORMAL] * 4
    merges = ["a b", "y e", "ye s", '{ "']
    return tokenizer_from_vocabulary(
        pre="gpt-2", tokens=names, token_types=types, merges=merges, bos_id=256, eos_id=257, stop_ids=[258]
    )


def sentencepiece(older: bool = False) -> Tokenizer:
    """Spaces as ▁ and bytes as <0x41>. The `older` kind puts a space before whatever it encodes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "yes", "▁yes", "no"]
    inner = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    if older:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return Tokenizer(inner, "here")


TOKENIZERS = {
    "trained": trained,
    "gguf": from_gguf,
    "sentencepiece": sentencepiece,
    "older": lambda: sentencepiece(older=True),
}
GRAMMARS = {
    "object": Grammar(json_schema=SCHEMA),
    "any": Grammar(json_schema={"type": ["array", "string"], "maxItems": 2, "maxLength": 4, "items": {}, **COMPACT}),
    "regex": Grammar(regex=r"(ab|a+)/[0-9]{2,3}(\.é)?"),
    "choice": Grammar(choice=("yes", "no", 'yes\n"maybe"', "🙂 a", "\\")),
}


def parses(name: str, text: str) -> bool:
    if name == "regex":
        return re.fullmatch(GRAMMARS[name].regex or "", text) is not None
    if name == "choice":
        return text in (GRAMMARS[name].choice or ())
    value = json.loads(text)
    if name == "any":
        return isinstance(value, (list, str))
    assert set(value) <= {"name", "n", "tags", "ok"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert -5 <= value["n"] <= 120
    assert isinstance(value["ok"], bool)
    return all(tag in ("x", "é🙂", None) for tag in value.get("tags", []))


def draw_one(state: GrammarState, tokenizer: Tokenizer, seed: int, most: int = 300) -> tuple[list[int], bool]:
    """What a random model writes, and whether it came to an end. Any value ends at last, but not soon."""
    stream, ids = torch.Generator().manual_seed(seed), list[int]()
    config = SamplingConfig(temperature=0.7, top_p=0.98, seed=seed)
    for _ in range(most):
        logits = 3 * torch.randn(1, tokenizer.vocab_size, generator=stream)
        context = Context((), ids, tokenizer.stop_ids, state.allowed())
        drawn, logprobs = pick(logits, config, [stream], [context])
        assert state.allowed()[drawn]
        assert -math.inf < float(logprobs) <= 0
        state.advance(int(drawn))
        if int(drawn) in tokenizer.stop_ids:
            assert state.ended
            return ids, True
        ids.append(int(drawn))
    return ids, False


@here
@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_comes_out_always_parses(kind: str, name: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    grammars, finished = Grammars(tokenizer), 0
    for seed in range(40):
        ids, whole = draw_one(grammars.start(GRAMMARS[name]), tokenizer, seed)
        finished += whole
        text = tokenizer.decode(ids, continues=True)
        assert not whole or parses(name, text), text
    assert finished >= 30


@here
@pytest.mark.parametrize("name", GRAMMARS)
def test_rolled_back_is_as_never_advanced(name: str) -> None:
    tokenizer = from_gguf()
    grammars = Grammars(tokenizer)
    ids, whole = draw_one(grammars.start(GRAMMARS[name]), tokenizer, 3)
    ids = [*ids, 258] if whole else ids
    for kept in range(0, len(ids) + 1, max(1, len(ids) // 12)):
        for count in {1, 2, len(ids) - kept} & set(range(len(ids) - kept + 1)):
            never, went = grammars.start(GRAMMARS[name]), grammars.start(GRAMMARS[name])
            for token in ids[:kept]:
                never.advance(token)
            for token in ids[: kept + count]:
                went.advance(token)
            went.rollback(count)
            assert torch.equal(never.allowed(), went.allowed())
            assert (never.ended, never.may_end) == (went.ended, went.may_end)
            for token in ids[kept:]:
                never.advance(token)
                went.advance(token)
                assert torch.equal(never.allowed(), went.allowed())


@here
def test_logprobs_are_those_of_the_constrained_distribution_and_sum_to_one() -> None:
    tokenizer = from_gguf()
    state = Grammars(tokenizer).start(Grammar(regex="[a-f]{3}"))
    logits = torch.randn(1, tokenizer.vocab_size)
    context = Context(allowed=state.allowed())
    allowed = sorted(i for i, name in tokenizer.token_bytes.items() if re.fullmatch(b"[a-f]{1,3}", name))
    (given,) = alternatives(logits, 999, [context])
    assert sorted(token for token, _ in given) == allowed == torch.nonzero(state.allowed())[:, 0].tolist()
    assert math.fsum(math.exp(logprob) for _, logprob in given) == pytest.approx(1.0, abs=1e-6)
    own = logits[0, allowed].softmax(-1)
    torch.testing.assert_close(distribution(logits, SamplingConfig(), [context])[0, allowed].exp().float(), own)
    ids, logprobs = pick(logits, SamplingConfig(), [seeds.generator(0, "x")], [context])
    assert float(logprobs) == pytest.approx(dict(given)[int(ids)], abs=1e-6)


@here
def test_ends_are_let_through_where_the_grammar_may_end_and_only_there() -> None:
    tokenizer = from_gguf()
    state = Grammars(tokenizer).start(Grammar(regex="ab?"))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert not state.allowed()[[257, 258]].any()
    state.advance(a)
    assert state.allowed().nonzero()[:, 0].tolist() == [b, 257, 258]
    assert (state.may_end, state.ended) == (True, False)
    state.advance(b)
    assert state.ended
    assert state.allowed().nonzero()[:, 0].tolist() == [257, 258]
    state.advance(258)
    assert state.ended
    state.rollback(2)
    assert state.allowed()[b]
    # Where nothing but an end may come, the least length gives way.
    finished = Grammars(tokenizer).start(Grammar(choice=["a"]))
    finished.advance(a)
    context = Context((), [a], tokenizer.stop_ids, finished.allowed())
    drawn, _ = pick(torch.zeros(1, 264), SamplingConfig(min_new_tokens=5), [seeds.generator(0, "x")], [context])
    assert int(drawn) in (257, 258)


@here
def test_neither_control_tokens_nor_empty_ids_nor_ids_beyond_the_vocabulary() -> None:
    tokenizer = from_gguf()
    for size in (264, 300, 262):
        state = Grammars(tokenizer, vocab_size=size).start(Grammar(regex="(?s:.)*"))
        mask = state.allowed()
        assert mask.shape == (size,)
        assert not mask[256]
        assert mask[[257, 258, 260]].all()
        assert not mask[264:].any()


@here
def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing() -> None:
    tokenizer = from_gguf()
    state = Grammars(tokenizer).start(Grammar(choice=["yes", "no"]))
    before = state.allowed()
    with pytest.raises(ValueError, match="not allowed"):
        state.advance(tokenizer.encode("x")[0])
    assert torch.equal(state.allowed(), before)
    assert state.accepts([*tokenizer.encode("yes"), 257, 257]) == 2
    assert state.accepts([257, 257]) == 0
    assert state.accepts(tokenizer.encode("n") + tokenizer.encode("e")) == 1
    assert torch.equal(state.allowed(), before)
    with pytest.raises(ValueError, match="cannot roll back 1 of 0"):
        state.rollback(1)
    twin = state.copy()
    twin.advance(tokenizer.encode("n")[0])
    assert torch.equal(state.allowed(), before)


@here
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"regex": "(a"}, "regex cannot be followed: unclosed group"),
        ({"regex": "(?=a)b"}, "regex cannot be followed: look-around"),
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be followed: Invalid type: strin"),
        ({"json_schema": {"if": {}}}, 'json_schema cannot be followed: Unimplemented keys: \\["if"\\]'),
        ({"json_schema": '{"a'}, "json_schema is not JSON"),
        ({"json_schema": "[1]"}, "json_schema must be an object"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_named(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Grammars(from_gguf()).start(Grammar(**bad))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of json_schema, regex and choice, not regex and choice"),
        ({"choice": []}, "choice"),
        ({"choice": ["a", ""]}, "choice"),
    ],
    ids=str,
)
def test_one_kind_of_grammar_is_given(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(Grammar, bad, "here")


def test_a_grammar_is_a_key() -> None:
    assert len({Grammar(json_schema={"type": "null"}), Grammar(json_schema='{"type": "null"}')}) == 1


def test_without_the_package_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.generation.grammar.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'finemoe\[serve\]'"):
        Grammars(from_gguf())


@here
def test_a_vocabulary_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a token that ends"):
        Grammars(from_gguf(), vocab_size=200)
