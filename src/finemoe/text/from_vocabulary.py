"""Tokenizers from bare vocabularies, as GGUF files hold them, and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from finemoe.core.errors import DataError
from finemoe.text import pretokenizers
from finemoe.text.decoding import BYTE_TOKEN, SPACE_MARK
from finemoe.text.scores import merges_from_scores, scores_from_merges
from finemoe.text.settings import TokenizerSettings
from finemoe.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of a GGUF file."""

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Values of `tokenizer.ggml.model`."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file holds it."""

    model: str
    """`gpt2`: byte-level, with `merges` and `pre`. `llama`: SentencePiece-like, with `scores`."""
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    add_space_prefix: bool = False


def tokenizer_from_vocabulary(
    tokens: Sequence[str],
    merges: Sequence[str],
    token_types: Sequence[int],
    pre: str,
    *,
    model: str = BYTE_LEVEL,
    scores: Sequence[float] = (),
    bos_id: int | None = None,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    add_bos: bool | None = None,
    add_space_prefix: bool = True,
    origin: str = "vocabulary",
) -> Tokenizer:
    """The tokenizer with this vocabulary.

    Args:
        tokens: by id, as spelt in the file.
        merges: "left right", the first first; empty for `llama`.
        token_types: one each of the constants above.
        pre: how text is split first, by its name in GGUF files; ignored for `llama`.
        model: `gpt2` or `llama`.
        scores: one each for `llama`: the higher, the earlier it is merged.
        bos_id: begins a text.
        eos_id: ends a text or a turn.
        stop_ids: others that end a generation.
        add_bos: whether texts begin with `bos_id`; None: as the model's readers assume when the file is silent.
        add_space_prefix: for `llama`, whether a space is put before a text.
        origin: names it in errors.

    Raises:
        DataError: an unknown model or `pre`, lists that do not belong together, or a vocabulary that cannot be
            expressed exactly; names what and why.
    """
    _check(tokens, token_types, {"bos_id": bos_id, "eos_id": eos_id}, origin)
    if model == BYTE_LEVEL:
        inner, begins = _byte_level(tokens, merges, pre, origin), pretokenizers.splitting_of(pre).begins
    elif model == SENTENCEPIECE:
        inner, begins = _sentencepiece(tokens, scores, token_types, add_space_prefix, origin), True
    else:
        raise DataError(f"{origin}: the tokenizer model {model!r} is not known; known: {BYTE_LEVEL}, {SENTENCEPIECE}")
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    inner.add_tokens(
        [
            AddedToken(token, special=kinds[kind], normalized=False)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind in kinds
        ]
    )
    adds = (begins if add_bos is None else add_bos) and bos_id is not None
    if adds and bos_id is not None:
        bos = tokens[bos_id]
        inner.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
        )
    named = {key: tokens[i] for key, i in (("bos_token", bos_id), ("eos_token", eos_id)) if i is not None}
    return Tokenizer(inner, origin, TokenizerSettings(named, adds, tuple(stop_ids)))


def _check(tokens: Sequence[str], token_types: Sequence[int], ids: Mapping[str, int | None], origin: str) -> None:
    if len(tokens) != len(token_types):
        raise DataError(f"{origin}: {len(tokens)} tokens but {len(token_types)} token types")
    unknown = sorted({kind for kind in token_types if not NORMAL <= kind <= BYTE})
    if unknown:
        raise DataError(f"{origin}: unknown token type {unknown[0]}; known: {NORMAL} to {BYTE}")
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise DataError(f"{origin}: the token {twice[0]!r} has {tokens.count(twice[0])} ids, so it has no place in BPE")
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise DataError(f"{origin}: {name} {token_id} is outside the vocabulary of {len(tokens)}")


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str, origin: str) -> tokenizers.Tokenizer:
    splitting = pretokenizers.splitting_of(pre)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = []
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise DataError(f"{origin}: merge {rank} is {merge!r}, but must be two tokens with a space between them")
        absent = next((token for token in (left, right, left + right) if token not in vocabulary), None)
        if absent is not None:
            raise DataError(f"{origin}: merge {rank} is {merge!r}, but {absent!r} is not in the vocabulary")
        pairs.append((left, right))
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splitting.whole_words))
    inner.pre_tokenizer = pretokenizers.build(splitting)
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], token_types: Sequence[int], space_first: bool, origin: str
) -> tokenizers.Tokenizer:
    if len(scores) != len(tokens):
        raise DataError(f"{origin}: {len(tokens)} tokens but {len(scores)} scores")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    absent = next((f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary), None)
    if absent is not None:
        raise DataError(f"{origin}: the byte token {absent} is missing, so some texts have no tokens")
    normal = {token: score for token, score, kind in zip(tokens, scores, token_types, strict=True) if kind == NORMAL}
    unknown = next((token for token, kind in zip(tokens, token_types, strict=True) if kind == UNKNOWN), None)
    pairs = merges_from_scores(normal, origin)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    spaces = normalizers.Replace(" ", SPACE_MARK)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), spaces]) if space_first else spaces
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_first else steps)
    return inner


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What a GGUF file needs to hold for `tokenizer`.

    Raises:
        DataError: GGUF cannot express it; says what stands in the way.
    """
    facts = json.loads(tokenizer.to_json())
    model = facts["model"]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    odd = next((key for key in plain if model.get(key)), None)
    if model.get("type", "BPE") != "BPE" or odd is not None:
        what = f"its {odd} is {model[odd]!r}" if odd is not None else f"its model is {model['type']}"
        raise DataError(f"the tokenizer cannot be written to GGUF: {what}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _listed(tokenizer, model["vocab"])
    bare = Vocabulary(
        BYTE_LEVEL, "", tokens, types, bos_id=tokenizer.bos_id, eos_id=_eos_id(tokenizer), add_bos=tokenizer.adds_bos
    )
    if tokenizer.byte_level:
        pre = pretokenizers.name_of(
            facts["pre_tokenizer"], bool(model.get("ignore_merges")), _composes(facts["normalizer"])
        )
        return replace(bare, pre=pre, merges=tuple(merges))
    space_first = _space_prefix(facts)
    if not model.get("byte_fallback"):
        raise DataError("the tokenizer cannot be written to GGUF: it has no byte fallback")
    types = tuple(map(partial(_sentencepiece_type, model.get("unk_token")), tokens, types))
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    found = scores_from_merges(normal, [_pair(merge) for merge in model["merges"]])
    scores = tuple(found.get(token, 0.0) for token in tokens)
    return replace(
        bare, model=SENTENCEPIECE, pre="default", token_types=types, scores=scores, add_space_prefix=space_first
    )


def _sentencepiece_type(unknown: str | None, token: str, kind: int) -> int:
    if token == unknown:
        return UNKNOWN
    return BYTE if kind == NORMAL and BYTE_TOKEN.fullmatch(token) else kind


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _eos_id(tokenizer: Tokenizer) -> int:
    eos = tokenizer.id_of(tokenizer.settings.special_tokens.get("eos_token"))
    return tokenizer.end_of_text_id if eos is None else eos


def _listed(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and types by id; an id without a token is a padding."""
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for token, token_id in vocabulary.items():
        tokens[token_id], types[token_id] = token, UNUSED if token == f"[PAD{token_id}]" else NORMAL
    for token_id, (name, special) in tokenizer.added_tokens.items():
        tokens[token_id], types[token_id] = name, CONTROL if special else USER_DEFINED
    return tuple(tokens), tuple(types)


def _composes(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether the normalizer is NFC and nothing else; False for none.

    Raises:
        DataError: it is another, which a GGUF file cannot say.
    """
    steps = normalizer.get("normalizers", [normalizer]) if normalizer is not None else []
    kinds = [step["type"] for step in steps]
    if kinds not in ([], ["NFC"]):
        raise DataError(f"the tokenizer cannot be written to GGUF: its normalizer is {' + '.join(kinds)}")
    return bool(kinds)


def _space_prefix(facts: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before a text.

    Raises:
        DataError: it treats spaces in another way than GGUF's readers do.
    """
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    normalizer, splitting = facts["normalizer"], facts["pre_tokenizer"]
    if splitting is None and normalizer in (spaces, {"type": "Sequence", "normalizers": [spaces]}):
        return False
    if splitting is None and normalizer == {"type": "Sequence", "normalizers": [prepend, spaces]}:
        return True
    plain = {"type": "Metaspace", "replacement": SPACE_MARK, "split": False}
    if normalizer is None and splitting in [{**plain, "prepend_scheme": scheme} for scheme in ("always", "never")]:
        return splitting["prepend_scheme"] == "always"
    raise DataError("the tokenizer cannot be written to GGUF: it splits or spaces text in a way no reader of GGUF does")
