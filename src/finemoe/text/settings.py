"""What the files beside a tokenizer.json say about it: special tokens, whether texts begin with one, when to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finemoe.core.errors import DataError
from finemoe.text.files import parse_object, read_table

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
SAFE_CLASS = "PreTrainedTokenizerFast"

_READS_AS_IT_IS = (SAFE_CLASS, "TokenizersBackend")
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """Facts that tokenizer.json itself does not hold."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` ... and the token each is, by name."""
    add_bos_token: bool | None = None
    """Whether texts begin with `bos_token`; None: as tokenizer.json has it."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a generation, beside the end of a text."""

    @staticmethod
    def read(folder: Path) -> TokenizerSettings:
        """From tokenizer_config.json, special_tokens_map.json and generation_config.json in `folder`, where they exist.

        One that cannot be read is left out, with a warning.

        Raises:
            DataError: a value of the wrong type, or a link that leads out of the folder.
        """
        tables = {name: read_table(folder, name) for name in (TOKENIZER_CONFIG, GENERATION_CONFIG, "config.json")}
        config = with_older_tokens(folder, tables[TOKENIZER_CONFIG])
        generation = tables[GENERATION_CONFIG] if "eos_token_id" in tables[GENERATION_CONFIG] else tables["config.json"]
        return TokenizerSettings.of(config, generation, str(folder))

    @staticmethod
    def of(config: Mapping[str, Any], generation: Mapping[str, Any], origin: str) -> TokenizerSettings:
        """From the two tables themselves.

        Raises:
            DataError: a value of the wrong type; names `origin` and the field.
        """
        adds = config.get("add_bos_token")
        if adds is not None and not isinstance(adds, bool):
            raise DataError(f"{origin}: add_bos_token is {adds!r}, but must be true or false")
        eos = generation.get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise DataError(f"{origin}: eos_token_id is {eos!r}, but must be an id or a list of ids")
        return TokenizerSettings(special_tokens_of(config, origin), adds, tuple(i for i in ids if i >= 0))


def with_older_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, with the special tokens that it leaves out from the special_tokens_map.json of older repositories.

    Nothing else needs that file: what cannot be read in it is as if it were not there.
    """
    table: dict[str, Any] = {}
    with contextlib.suppress(DataError):  # a link that leads out of the folder
        table = read_table(folder, SPECIAL_TOKENS_MAP)
    return _with_tokens(table, config)


def with_tokens_of(older: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with the text of the special_tokens_map.json; None: there is none."""
    table: dict[str, Any] = {}
    with contextlib.suppress(DataError):
        table = {} if older is None else parse_object(older, SPECIAL_TOKENS_MAP)
    return _with_tokens(table, config)


def _with_tokens(table: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _SPECIAL_KEYS:
        with contextlib.suppress(DataError):
            found |= special_tokens_of({key: table.get(key)}, SPECIAL_TOKENS_MAP)
    return {**found, **{key: value for key, value in config.items() if key not in found or value is not None}}


def special_tokens_of(config: Mapping[str, Any], origin: str) -> dict[str, str]:
    """The named special tokens of a tokenizer_config.json, which holds each as text or as {"content": text}.

    Raises:
        DataError: one is neither.
    """
    found = {}
    for key in _SPECIAL_KEYS:
        value = config.get(key)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is None and value is None:
            continue
        if not isinstance(text, str):
            raise DataError(f'{origin}: {key} is {value!r}, but must be text or {{"content": text}}')
        found[key] = text
    return found


def class_problem(config: Mapping[str, Any]) -> str | None:
    """Why transformers may not read the tokenizer.json beside this tokenizer_config.json as it is; None: it will."""
    named = config.get("tokenizer_class")
    if named in _READS_AS_IT_IS:
        return None
    return (
        f"tokenizer_class is {named}: releases of transformers 5 put a splitting of their own over the vocabulary "
        f"of tokenizer.json, and may lose spaces; {SAFE_CLASS} reads the file as it is"
    )


def exported_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json to write: as given, but naming the class that reads tokenizer.json as it is.

    Published DeepSeek configurations name LlamaTokenizerFast. Releases of transformers 5 take that as an order to
    split at spaces as Llama 2 does, and ignore the splitting that tokenizer.json prescribes: spaces vanish without
    any error. A configuration that already names a safe class comes back unchanged.
    """
    return dict(config) if class_problem(config) is None else {**config, "tokenizer_class": SAFE_CLASS}
