"""The tokenizer and the chat template that a GGUF file holds in its metadata, and the files they become."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from finemoe.core.encodings import decode_text
from finemoe.core.errors import CheckpointError, DataError, FinemoeError
from finemoe.text.chat import CHAT_TEMPLATE, DEFAULT, ChatTemplate
from finemoe.text.files import parse_object
from finemoe.text.from_vocabulary import (
    BYTE_LEVEL,
    NORMAL,
    UNUSED,
    Vocabulary,
    tokenizer_from_vocabulary,
    vocabulary_of,
)
from finemoe.text.settings import (
    GENERATION_CONFIG,
    SAFE_CLASS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TokenizerSettings,
    with_tokens_of,
)
from finemoe.text.tokenizer import FILE_NAME, Tokenizer

LISTS = ("tokens", "token_type", "merges", "scores")
"""Keys below `tokenizer.ggml.` that grow with the vocabulary."""

_PREFIX, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
    "mask_token": "mask_token_id",
}
_NEEDED = ("bos_token_id", "eos_token_id")
_STOPS = ("eot_token_id", "eom_token_id")
_NONE = ("none", "no_vocab")


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file holds a vocabulary at all."""
    return metadata.get(f"{_PREFIX}model", "none") not in _NONE


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a file; `where` names it in errors.

    Raises:
        CheckpointError: there is none, or a value is of the wrong type.
        DataError: it cannot be expressed exactly.
    """
    if not has_tokenizer(metadata):
        raise CheckpointError(f"{where}: holds no tokenizer")
    tokens = _list(metadata, "tokens", str, where)
    types = _list(metadata, "token_type", int, where) or [NORMAL] * len(tokens)
    flags = {key: _value(metadata, key, bool, where) for key in ("add_bos_token", "add_space_prefix")}
    if _value(metadata, "add_eos_token", bool, where):
        raise CheckpointError(f"{where}: {_PREFIX}add_eos_token is true: texts that end by themselves are not read")
    stops = [_value(metadata, key, int, where) for key in _STOPS]
    scores = _list(metadata, "scores", float, where)
    return tokenizer_from_vocabulary(
        tokens,
        _list(metadata, "merges", str, where),
        types,
        _value(metadata, "pre", str, where) or "default",
        model=_value(metadata, "model", str, where) or BYTE_LEVEL,
        scores=scores,
        bos_id=_value(metadata, "bos_token_id", int, where),
        eos_id=_value(metadata, "eos_token_id", int, where),
        stop_ids=[stop for stop in stops if stop is not None],
        add_bos=flags["add_bos_token"],
        add_space_prefix=flags["add_space_prefix"] is not False,
        origin=where,
    )


def _value(metadata: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = metadata.get(_PREFIX + key)
    if value is not None and type(value) is not kind:
        raise CheckpointError(f"{where}: {_PREFIX}{key} is {str(value)[:80]}, but must be {kind.__name__}")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    values = _value(metadata, key, list, where) or []
    if not all(type(value) is kind for value in values):
        raise CheckpointError(f"{where}: {_PREFIX}{key} must be a list of {kind.__name__} only")
    return values  # type: ignore[no-any-return]


def template_of(metadata: Mapping[str, Any], where: str) -> ChatTemplate | None:
    """The chat template of a file; None: it has none.

    Raises:
        CheckpointError: it is no text.
        DataError: it is too long.
    """
    sources = {}
    for key, source in metadata.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            if not isinstance(source, str):
                raise CheckpointError(f"{where}: {key} is {str(source)[:80]}, but must be a text")
            sources[key.removeprefix(_TEMPLATE).removeprefix(".") or DEFAULT] = source
    if not sources:
        return None
    for source in sources.values():
        ChatTemplate.of(source, origin=where)
    return ChatTemplate(sources, _special_tokens(metadata, where), where)


def _special_tokens(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    tokens, unusable = _list(metadata, "tokens", str, where), _unusable(metadata, where)
    named = {}
    for name, key in _SPECIAL.items():
        token_id = _value(metadata, key, int, where)
        if token_id is not None and key not in unusable:
            if not 0 <= token_id < len(tokens):
                raise CheckpointError(f"{where}: {_PREFIX}{key} is {token_id}, outside the {len(tokens)} tokens")
            named[name] = tokens[token_id]
    return named


def _unusable(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """Keys of special tokens that no text needs, such as a padding of -1 -> what they say; llama.cpp ignores them."""
    count, found = len(_list(metadata, "tokens", str, where)), {}
    for key in (key for key in _SPECIAL.values() if key not in _NEEDED):
        token_id = _value(metadata, key, int, where)
        if token_id is not None and not 0 <= token_id < count:
            found[key] = f"{_PREFIX}{key} is {token_id}, outside the {count} tokens"
    return found


def companions_of(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, bytes], list[str]]:
    """The files that lie beside the weights in other layouts, by name; and warnings of what cannot be expressed.

    A tokenizer or template that cannot be read is left out: the weights need neither.
    """
    files: dict[str, bytes] = {}
    warnings: list[str] = []
    template = None
    try:
        template = template_of(metadata, where)
    except FinemoeError as error:
        warnings.append(f"the chat template is left out: {error}")
    if template is not None and DEFAULT in template.sources:
        files[CHAT_TEMPLATE] = template.sources[DEFAULT].encode()
    if has_tokenizer(metadata):
        try:
            files |= _tokenizer_files(metadata, template, where)
            warnings += [f"{said}: left out, as in llama.cpp" for said in _unusable(metadata, where).values()]
        except FinemoeError as error:
            warnings.append(f"the tokenizer is left out, and the model runs on token ids alone: {error}")
    return files, warnings


def _tokenizer_files(metadata: Mapping[str, Any], template: ChatTemplate | None, where: str) -> dict[str, bytes]:
    tokenizer = tokenizer_of(metadata, where)
    config: dict[str, Any] = {"tokenizer_class": SAFE_CLASS, "add_bos_token": tokenizer.adds_bos}
    config |= _special_tokens(metadata, where)
    sources = {} if template is None else dict(template.sources)
    if sources.keys() - {DEFAULT}:
        config["chat_template"] = [{"name": name, "template": text} for name, text in sources.items()]
    ids = {name: _value(metadata, name, int, where) for name in ("bos_token_id", "eos_token_id")}
    if "padding_token_id" not in _unusable(metadata, where):
        ids["pad_token_id"] = _value(metadata, "padding_token_id", int, where)
    stops = [stop for key in ("eos_token_id", *_STOPS) if (stop := _value(metadata, key, int, where)) is not None]
    generation: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    if len(set(stops)) > 1:
        generation["eos_token_id"] = list(dict.fromkeys(stops))
    return {
        FILE_NAME: tokenizer.to_json().encode(),
        TOKENIZER_CONFIG: _json(config),
        GENERATION_CONFIG: _json(generation),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def metadata_of(
    files: Mapping[str, bytes], vocab_size: int, where: str, ends: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """What a file must say of the tokenizer and template in `files`, for a model of `vocab_size`; and notes.

    Args:
        files: the companions of a model, by name.
        vocab_size: rows of its embedding.
        where: names them in errors.
        ends: `eos_token_id` of its config.json, which counts where generation_config.json has none.

    Raises:
        CheckpointError: more tokens than the model has rows.
        DataError: GGUF cannot express the tokenizer.
    """
    config, generation = (
        parse_object(_text(files, name, where), f"{where}: {name}") if name in files else {}
        for name in (TOKENIZER_CONFIG, GENERATION_CONFIG)
    )
    if FILE_NAME not in files:
        return {f"{_PREFIX}model": "none"}, ["there is no tokenizer to write: programs must be given token ids"]
    older = None
    with contextlib.suppress(DataError):  # nothing else needs it
        older = _text(files, SPECIAL_TOKENS_MAP, where) if SPECIAL_TOKENS_MAP in files else None
    config = with_tokens_of(older, config)
    settings = TokenizerSettings.of(config, {"eos_token_id": ends, **generation}, where)
    tokenizer = Tokenizer.parse(_text(files, FILE_NAME, where), f"{where}: {FILE_NAME}", settings)
    vocabulary = vocabulary_of(tokenizer)
    missing = vocab_size - len(vocabulary.tokens)
    if missing < 0:
        raise CheckpointError(f"{where}: {len(vocabulary.tokens)} tokens, but the model has rows for {vocab_size} only")
    values = _vocabulary(vocabulary, missing)
    for name, key in _SPECIAL.items():
        token_id = tokenizer.id_of(settings.special_tokens.get(name))
        if token_id is not None:
            values.setdefault(_PREFIX + key, token_id)
    others = [stop for stop in settings.stop_ids if stop != vocabulary.eos_id and 0 <= stop < vocab_size]
    values |= {_PREFIX + key: stop for key, stop in zip(_STOPS, others, strict=False)}
    notes = [f"{missing} rows without a token get names like [PAD{vocab_size - 1}]"] if missing else []
    if unnamed := [str(stop) for stop in others[len(_STOPS) :]]:
        notes.append(f"of the tokens that end a generation GGUF names three; left out: {', '.join(unnamed)}")
    jinja = _text(files, CHAT_TEMPLATE, where) if CHAT_TEMPLATE in files else None
    template = ChatTemplate.from_config(config, where, jinja)
    if template is not None:
        named = {name: text for name, text in template.sources.items() if name != DEFAULT}
        values |= {f"{_TEMPLATE}.{name}": text for name, text in named.items()}
        if named:
            values["tokenizer.chat_templates"] = list(named)
        if DEFAULT in template.sources:
            values[_TEMPLATE] = template.sources[DEFAULT]
    return values, notes


def _text(files: Mapping[str, bytes], name: str, where: str) -> str:
    try:
        return decode_text(files[name])
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: {name} is not {error.encoding.upper()} text: {error.reason} at byte {error.start}"
        ) from error


def _vocabulary(vocabulary: Vocabulary, missing: int) -> dict[str, Any]:
    size = len(vocabulary.tokens)
    values: dict[str, Any] = {
        "model": vocabulary.model,
        "pre": vocabulary.pre,
        "tokens": [*vocabulary.tokens, *(f"[PAD{size + i}]" for i in range(missing))],
        "token_type": [*vocabulary.token_types, *[UNUSED] * missing],
        "add_bos_token": vocabulary.add_bos,
        "add_space_prefix": vocabulary.add_space_prefix,
    }
    if vocabulary.model == BYTE_LEVEL:
        values["merges"] = list(vocabulary.merges)
    else:
        values["scores"] = [*vocabulary.scores, *[float(-size)] * missing]
    for key, token_id in (("bos_token_id", vocabulary.bos_id), ("eos_token_id", vocabulary.eos_id)):
        if token_id is not None:
            values[key] = token_id
    return {_PREFIX + key: value for key, value in values.items()}
