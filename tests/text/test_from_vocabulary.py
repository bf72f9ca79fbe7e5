"""Tokenizers from bare vocabularies: what each splitting does, what is refused, and the way back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from finemoe.core.errors import DataError
from finemoe.text import Tokenizer, TokenizerSettings, require_faithful, tokenizer_from_vocabulary, vocabulary_of
from finemoe.text.from_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED
from finemoe.text.pretokenizers import SPLITTINGS

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NAMES = [*ALPHABET, "<s>", "</s>", "<|user|>", "[PAD259]", "ab", "ba", "aba", "12", "ĠĠ"]
TYPES = [NORMAL] * 256 + [CONTROL, CONTROL, USER_DEFINED, UNUSED] + [NORMAL] * 5
MERGES = ["a b", "b a", "ab a", "1 2", "Ġ Ġ"]


def make(pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    given = {"tokens": NAMES, "merges": MERGES, "token_types": TYPES, "bos_id": 256, "eos_id": 257, **changes}
    return tokenizer_from_vocabulary(pre=pre, **given)


def pieces(pre: str, text: str) -> list[str]:
    """How `pre` splits, as text."""
    facts = json.loads(make(pre).to_json())
    inner = tokenizers.Tokenizer.from_str(json.dumps({**facts, "post_processor": None}))
    assert inner.pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in inner.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_every_splitting_loses_nothing_and_comes_back_by_name(pre: str) -> None:
    tokenizer = make(pre)
    require_faithful(tokenizer, ["Äpfel 3½ months нещо w048 7tuijk 漢字かな", "ab  aba\n\n 1212"])
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.pre == pre
    assert (list(vocabulary.tokens), list(vocabulary.token_types)) == (NAMES, TYPES)
    assert list(vocabulary.merges) == MERGES


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "it's 1234  x", ["it", "'s", " 1234", " ", " x"]),
        ("smollm", "a 1234", ["a", " ", "1", "2", "3", "4"]),
        ("deepseek-llm", "don't 12\n x", ["don", "'", "t", " ", "1", "2", "\n", " x"]),
        ("deepseek-llm", "ab漢字かな가", ["ab", "漢字かな가"]),
        ("deepseek-llm", "ƻa", ["ƻ", "a"]),  # a letter without cases is no letter there
        ("deepseek-coder", "ƻa", ["ƻa"]),
        ("deepseek-v3", "x=1234;y", ["x", "=", "123", "4", ";y"]),
        ("deepseek-v3", "漢字かなabc", ["漢字かな", "abc"]),
        ("llama-bpe", "I'LL 12345", ["I", "'LL", " ", "123", "45"]),
        ("qwen2", "I'LL 12", ["I", "'LL", " ", "1", "2"]),
        ("default", "a, 1234567", ["a", ",", " ", "123", "456", "7"]),
    ],
)
def test_how_each_splits(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


def test_only_llama_takes_whole_words_before_merging() -> None:
    tokens = [*NAMES, "xyz"]  # no merge makes it
    changes = {"tokens": tokens, "token_types": [*TYPES, NORMAL]}
    assert make("llama-bpe", **changes).encode("xyz") == [tokens.index("xyz")]
    assert len(make("gpt-2", **changes).encode("xyz")) == 3


def test_types_decide_what_is_found_in_text() -> None:
    tokenizer = make()
    assert tokenizer.encode_template("<|user|>") == [258]
    assert 258 not in tokenizer.encode("<|user|>")  # a role, whatever its type
    word = make(tokens=["word" if name == "<|user|>" else name for name in NAMES])
    assert word.encode("word") == word.encode_template("word") == [258]
    assert tokenizer.encode_template("<s>ab</s>") == [256, 260, 257]
    assert not {256, 257} & set(tokenizer.encode("<s>ab</s>"))
    assert 259 not in tokenizer.encode_template("[PAD259]")
    assert tokenizer.decode([259]) == "[PAD259]"


def test_a_silent_file_begins_texts_as_its_readers_do() -> None:
    assert [make(pre).adds_bos for pre in ("gpt-2", "llama-bpe")] == [False, True]
    adding = make(add_bos=True)
    assert adding.encode_prompt("ab") == [256, 260]
    assert adding.encode("ab") == [260]
    again = Tokenizer.parse(adding.to_json(), "saved alone")
    assert (again.adds_bos, again.bos_id) == (True, 256)
    assert make(stop_ids=[5]).stop_ids == {257, 5}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pre": "deepseek-v33"}, "'deepseek-v33' is not known here, did you mean `deepseek-v3`"),
        ({"model": "wordpiece"}, "tokenizer model 'wordpiece' is not known"),
        ({"token_types": TYPES[:-1]}, "265 tokens but 264 token types"),
        ({"token_types": [9, *TYPES[1:]]}, "unknown token type 9"),
        ({"tokens": [*NAMES[:-1], "ab"]}, "'ab' has 2 ids"),
        ({"merges": ["ab"]}, "merge 0 is 'ab'"),
        ({"merges": ["a c"]}, "'ac' is not in the vocabulary"),
        ({"eos_id": 300}, "eos_id 300 is outside"),
        ({"eos_id": None, "tokens": [*NAMES[:257], "<end>", *NAMES[258:]]}, "no end-of-text token"),
        ({"model": "llama"}, "265 tokens but 0 scores"),
        ({"model": "llama", "scores": [0.0] * 265}, "byte token <0x00> is missing"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        make(**changes)


def published(pre_tokenizer: Any, normalizer: Any = None, **model: Any) -> Tokenizer:
    """As a tokenizer.json spells it, which need not be as `tokenizer_from_vocabulary` does."""
    inner = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(ALPHABET)}, [], **model))
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner, "published")


def byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def test_other_spellings_of_the_same_splitting_are_known() -> None:
    assert vocabulary_of(published(byte_level())).pre == "gpt-2"
    assert vocabulary_of(published(byte_level(), normalizers.NFC())).pre == "olmo"
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert vocabulary_of(published(pre_tokenizers.Sequence([digits, byte_level()]))).pre == "smollm"
    coder = [pre_tokenizers.Split(Regex(p), "isolated") for p in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")]
    asian = pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated")
    steps = pre_tokenizers.Sequence([*coder, asian, digits, byte_level(use_regex=False)])
    assert vocabulary_of(published(steps)).pre == "deepseek-coder"


def test_a_gap_in_the_ids_becomes_padding() -> None:
    inner = tokenizers.Tokenizer(models.BPE({char: i + i // 200 for i, char in enumerate(ALPHABET)}, []))
    inner.pre_tokenizer, inner.decoder = byte_level(), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = Tokenizer(inner, "gap")
    with pytest.raises(DataError, match="token id 200 is not in the vocabulary"):
        tokenizer.decode([200])
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.tokens[200], vocabulary.token_types[200]) == ("[PAD200]", UNUSED)


def test_what_gguf_cannot_say_is_refused() -> None:
    with pytest.raises(DataError, match="splits text in a way that GGUF has no name for"):
        vocabulary_of(Tokenizer.train(["some text"], 257, "finemoe"))
    with pytest.raises(DataError, match="splits text"):
        vocabulary_of(published(byte_level(), ignore_merges=True))
    with pytest.raises(DataError, match="splits text"):
        vocabulary_of(published(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    with pytest.raises(DataError, match="normalizer is Lowercase"):
        vocabulary_of(published(byte_level(), normalizers.Lowercase()))
    with pytest.raises(DataError, match="end_of_word_suffix is '_'"):
        vocabulary_of(published(byte_level(), end_of_word_suffix="_"))


def test_settings_name_the_tokens() -> None:
    vocabulary = vocabulary_of(make(add_bos=True))
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos) == (256, 257, True)
    named = Tokenizer.parse(make().to_json(), "x", TokenizerSettings({"eos_token": "<|user|>"}))
    assert vocabulary_of(named).eos_id == 258
