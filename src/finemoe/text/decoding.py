"""From token to bytes, for the two families of vocabularies: byte-level, and SentencePiece with byte fallback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from finemoe.core.errors import DataError

SPACE_MARK = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Decoding:
    """How the tokens of a vocabulary are spelt."""

    byte_level: bool
    """Each character of a token is one byte, by GPT-2's table. Else tokens are text, with `▁` for a space."""
    byte_tokens: bool = False
    """`<0x41>` stands for one byte."""
    drops_first_space: bool = False
    """Encoding puts a space before the text, so decoding a whole text takes one away."""


def decoding_of(decoder: Mapping[str, Any] | None, origin: str) -> Decoding:
    """Read the `decoder` of a tokenizer.json.

    Raises:
        DataError: it belongs to neither family; names `origin`.
    """
    steps = list(_steps(decoder))
    kinds = [str(step.get("type")) for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return Decoding(byte_level=True)
    if steps and all(_is_sentencepiece(step) for step in steps):
        return Decoding(
            byte_level=False,
            byte_tokens="ByteFallback" in kinds,
            drops_first_space=any(_drops_first_space(step) for step in steps),
        )
    raise DataError(
        f"{origin}: decoder is {' + '.join(kinds) or None!r}, but only byte-level BPE and SentencePiece-like "
        "tokenizers can be decoded here: to train, use a byte-level one, or leave `tokenizer` out and have one trained"
    )


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    kind = step.get("type")
    if kind == "Replace":
        return step["pattern"] == {"String": SPACE_MARK} and step["content"] == " "
    if kind == "Strip":
        return step["content"] == " " and step["start"] <= 1 and step["stop"] == 0
    if kind == "Metaspace":
        return step["replacement"] == SPACE_MARK
    return kind in ("ByteFallback", "Fuse")


def _drops_first_space(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step.get("type") == "Strip" and step["start"] == 1


def byte_of_char() -> dict[str, int]:
    """The byte behind each printable character of a byte-level vocabulary: GPT-2's table, read backwards."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in set(printable))})
    return table


def bytes_of_tokens(inner: tokenizers.Tokenizer, decoding: Decoding) -> dict[int, bytes]:
    """The bytes each id stands for; added tokens stand for their name."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    if decoding.byte_level:
        byte_of = byte_of_char()
        table = {}
        for token, token_id in vocabulary.items():
            known = all(char in byte_of for char in token)
            table[token_id] = bytes(byte_of[char] for char in token) if known else token.encode()
    else:
        table = {token_id: _sentencepiece_bytes(token, decoding) for token, token_id in vocabulary.items()}
    for token_id, added in inner.get_added_tokens_decoder().items():
        table[token_id] = added.content.encode()
    return table


def _sentencepiece_bytes(token: str, decoding: Decoding) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token) if decoding.byte_tokens else None
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
