"""Token streams on disk: a folder of raw `.bin` files with a `meta.json` that says what they must be.

Streams are memory-mapped, so that a corpus need not fit in memory, and verified whenever they are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from finemoe.core.reading import decode_json, reason_of, require_numbers
from finemoe.data.cache import DamagedError
from finemoe.data.loader import TokenArray
from finemoe.text import Alterations, Tokenizer
from finemoe.text.control import spellings

FORMAT_VERSION = 3
META = "meta.json"
_DTYPES = ("<u2", "<u4")  # for vocabularies of up to 65,536 ids, and for larger ones
_BLOCK_CHARS = 1 << 20  # texts are tokenised in blocks of about this size, two at a time: bounds memory, fills cores
_BLOCK_TEXTS = 4096


class TokenWriter:
    """Writes documents as tokens, to one named stream each, into a folder.

    Every document is followed by the end-of-text id. Ids are uint16 where the vocabulary allows, else uint32.
    One block is tokenised, by the library's own threads, while the one before is written and the next is collected.
    """

    def __init__(self, folder: Path, names: Iterable[str], tokenizer: Tokenizer, *, special: bool = False) -> None:
        """`special`: control tokens that a document spells out become those tokens, else they stay text."""
        self._folder = folder
        self._tokenizer = tokenizer
        self._special = special
        self._encode = partial(tokenizer.encode_batch, special=special)
        self._spelling: Counter[str] = Counter()  # documents that spell out a control token, by its name
        self._dtype = np.dtype(_DTYPES[0] if tokenizer.vocab_size <= 1 << 16 else _DTYPES[1])
        self._texts: list[str] = []
        self._places: list[tuple[str, bool]] = []  # the stream of each text, and whether a document ends with it
        self._block_chars = 0
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        for name in names:
            self._files[name] = self._stack.enter_context((folder / _bin(name)).open("wb"))
        self._hashes = {name: hashlib.sha256() for name in self._files}
        self._counts = dict.fromkeys(self._files, 0)
        self._bytes = {name: [0, 0] for name in self._files}  # of the texts, and of what their tokens stand for
        self._altered = Alterations()
        self._encoder = self._stack.enter_context(ThreadPoolExecutor(1, "tokenise"))
        self._encoding: tuple[list[str], list[tuple[str, bool]], Future[list[list[int]]]] | None = None

    def add(self, name: str, text: str) -> None:
        """Append a document to the stream `name`."""
        self._spelling.update(set(spellings(self._tokenizer, text)))
        pieces = list(_pieces(text))
        for index, piece in enumerate(pieces):
            self._texts.append(piece)
            self._places.append((name, index == len(pieces) - 1))
            self._block_chars += len(piece)
            if self._block_chars >= _BLOCK_CHARS or len(self._texts) >= _BLOCK_TEXTS:
                self._encode_block()

    def finish(self) -> None:
        """Write what is left, and `meta.json`."""
        self._encode_block()
        self._write_block()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        streams = {
            name: {
                "tokens": self._counts[name],
                "sha256": self._hashes[name].hexdigest(),
                "text_bytes": self._bytes[name][0],
                "token_bytes": self._bytes[name][1],
            }
            for name in self._files
        }
        meta = {
            "format": FORMAT_VERSION,
            "tokenizer_sha256": self._tokenizer.fingerprint(),
            "vocab_size": self._tokenizer.vocab_size,
            "dtype": self._dtype.str,
            "control_tokens": dict(self._spelling.most_common()),
            "streams": streams,
            "altered": self._altered.as_json(),
        }
        with open(self._folder / META, "w", encoding="utf-8") as out:
            json.dump({**meta, "sha256": _digest(meta)}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _encode_block(self) -> None:
        """Send off the block that was collected, and write the one before meanwhile."""
        encoding = self._texts, self._places, self._encoder.submit(self._encode, self._texts)
        self._texts, self._places, self._block_chars = [], [], 0
        self._write_block()
        self._encoding = encoding

    def _write_block(self) -> None:
        """Wait for the block that was sent off, and write it."""
        if self._encoding is None:
            return
        texts, places, encoded = self._encoding
        self._encoding = None
        block: dict[str, list[int]] = {}
        for text, (name, ends), ids in zip(texts, places, encoded.result(), strict=True):
            for index, size in enumerate(self._altered.add(self._tokenizer, text, ids, ends, self._special)):
                self._bytes[name][index] += size
            stream = block.setdefault(name, [])
            stream += ids
            if ends:
                stream.append(self._tokenizer.end_of_text_id)
        for name, ids in block.items():
            data = np.fromiter(ids, self._dtype, len(ids)).tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)
            self._counts[name] += len(ids)


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of bounded size, cut after a line end where there is one.

    An encoding takes a hundred times the memory of its text; a file of a gigabyte must not be encoded in one
    go.
    """
    start = 0
    while len(text) - start > _BLOCK_CHARS:
        cut = text.rfind("\n", start, start + _BLOCK_CHARS) + 1 or start + _BLOCK_CHARS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _bin(name: str) -> str:
    return f"{name}.bin"


@dataclass(frozen=True)
class TokenFolder:
    """What a token folder holds."""

    streams: dict[str, TokenArray]
    """Memory-mapped, by name."""
    bytes_per_byte: dict[str, float]
    """Bytes of a stream's texts for each byte that its tokens stand for: 1 where the tokenizer changes nothing."""
    altered: Alterations
    """What the tokenizer changed of the texts."""
    control_tokens: dict[str, int]
    """Those that documents spell out, and how many documents do."""


def open_streams(folder: Path) -> dict[str, TokenArray]:
    """The streams of a token folder alone; as `open_tokens`."""
    return open_tokens(folder).streams


def open_tokens(folder: Path) -> TokenFolder:
    """Open a token folder.

    Raises:
        DamagedError: when version, size or checksum is not as recorded.
    """
    try:
        meta = decode_json((folder / META).read_bytes())
        if meta["format"] != FORMAT_VERSION:
            raise ValueError(f"format {meta['format']} instead of {FORMAT_VERSION}")
        if meta.pop("sha256") != _digest(meta):
            raise ValueError(f"{META} does not have its recorded checksum")
        dtype = np.dtype(meta["dtype"])
        if dtype.str not in _DTYPES:
            raise ValueError(f"its tokens are {dtype.str!r}, not one of {', '.join(_DTYPES)}")
        table = meta["streams"]
        streams = {name: _open_stream(folder / _bin(name), dtype, facts) for name, facts in table.items()}
        ratios = {name: (facts["text_bytes"] or 1) / (facts["token_bytes"] or 1) for name, facts in table.items()}
        altered, spelt = Alterations.from_json(meta["altered"]), dict(meta.get("control_tokens", {}))
        require_numbers(spelt, tuple(spelt))
        return TokenFolder(streams, ratios, altered, spelt)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, SyntaxError) as error:
        raise DamagedError(f"{folder}: {reason_of(error)}") from error


def _digest(meta: dict[str, Any]) -> str:
    """Of everything else in `meta.json`: a changed count or name would be believed."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _open_stream(path: Path, dtype: np.dtype[Any], facts: dict[str, Any]) -> TokenArray:
    expected = facts["tokens"] * dtype.itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {expected}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != facts["sha256"]:
        raise ValueError(f"{path.name} does not have its recorded checksum")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if expected else np.empty(0, dtype=dtype)
