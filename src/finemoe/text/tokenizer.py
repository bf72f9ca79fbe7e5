"""Byte-level BPE: text to ids and back, without loss.

Training and encoding are done by the `tokenizers` library. What this module adds is the guarantee: only
byte-level tokenizers are accepted, ordinary text never turns into a special token, decoding works on bytes
(so that streaming and whole decoding cannot disagree), and `self_test` proves the round trip before anything
is trained on it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from finemoe.core.errors import DataError

# The library warns, and then stops using its threads, when a process that used them forks. Say what is wanted
# instead: threads in this process, none in a forked child, where they would wait for threads that do not
# exist.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

END_OF_TEXT = "<|end_of_text|>"
FILE_NAME = "tokenizer.json"
MIN_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
TRAINER_VERSION = 1  # raise it when a change below alters what training produces

# How other published byte-level tokenizers call the token that ends a document, in order of preference.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>", "</s>")

# The GPT-4 pattern with digits one by one (numbers stay comparable) and marks kept with their letters. Runs
# of blanks stay whole up to the last one, so that an indentation can become a single token.
_PATTERN = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_AWKWARD = (
    "",
    " ",
    "plain text\n",
    "def f(x):\n\tif x:\n        return  x**2   \n\n\n",
    "one\r\ntwo\rthree\n\r\n",
    "\x00\x01\x7f\x00",
    "👩‍👩‍👧‍👦 🇺🇳 🏳️‍🌈",
    "床前明月光，疑是地上霜。",
    "e\u0301 \u0301 \u20dd\u0338",
    "3.14159265358979323846264338327950288 0x7fffffffffffffff",
    "\u2028\u2029\u0085\ufeff\u200b\ufffd\ufffe",
    "العربية עברית हिन्दी ไทย",
)


def _byte_of_char() -> dict[str, int]:
    """The byte behind each printable character of a byte-level vocabulary: GPT-2's table, read backwards."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in set(printable))})
    return table


@final
class Tokenizer:
    """A byte-level BPE tokenizer. Make one with `train` or `load`; it never changes afterwards."""

    def __init__(self, inner: tokenizers.Tokenizer, origin: str) -> None:
        """Wrap `inner`; `origin` names it in errors.

        Raises:
            DataError: when it is not byte-level, or has no token that ends a text.
        """
        self._json = inner.to_str()
        decoder = json.loads(self._json).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise DataError(
                f"{origin}: decoder is {decoder.get('type')!r}, but only byte-level BPE tokenizers give "
                "every text back unchanged: use one of those, or leave `tokenizer` out and have one trained"
            )
        inner.encode_special_tokens = True  # "<|end_of_text|>" inside a document is text
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        end_of_text = next((vocabulary[name] for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        if end_of_text is None:
            raise DataError(f"{origin}: no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)}")
        self.end_of_text_id: int = end_of_text
        self.vocab_size: int = max(vocabulary.values()) + 1

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train on `texts`. Equal texts give an equal tokenizer.

        The vocabulary comes out smaller than `vocab_size` when the texts have too few distinct pairs.

        Raises:
            DataError: when `vocab_size` has no room for the 256 bytes and the end-of-text token.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(f"vocab_size {vocab_size} is too small: bytes alone need {MIN_VOCAB_SIZE}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return Tokenizer(inner, "the trained tokenizer")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder.

        Raises:
            DataError: when there is none, it is not a tokenizer, or not a byte-level one.
        """
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer {file}: cannot be read: {error}") from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {file}: not a tokenizer.json: {error}") from error
        return Tokenizer(inner, f"tokenizer {file}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` to `path`, or into it when `path` is a folder: all of it or nothing."""
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as out:
                out.write(self._json)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. No special token is added, none is recognised in the text."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def token_bytes(self) -> Mapping[int, bytes]:
        """The bytes each id stands for; special tokens stand for their name."""
        byte_of = _byte_of_char()
        table = {}
        for token, token_id in self._inner.get_vocab(with_added_tokens=True).items():
            known = all(char in byte_of for char in token)
            table[token_id] = bytes(byte_of[char] for char in token) if known else token.encode()
        for token_id, added in self._inner.get_added_tokens_decoder().items():
            table[token_id] = added.content.encode()
        return table

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: for an id outside the vocabulary.
        """
        return b"".join(self._bytes(token_id) for token_id in ids).decode("utf-8", errors="replace")

    def decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self)

    def _bytes(self, token_id: int) -> bytes:
        try:
            return self.token_bytes[token_id]
        except KeyError:
            raise DataError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}") from None

    def self_test(self, samples: Iterable[str] = ()) -> None:
        """Encode and decode built-in awkward texts and `samples`.

        Raises:
            DataError: names the first text that does not come back, or that yields the end-of-text token.
        """
        end_of_text = self.token_bytes[self.end_of_text_id].decode()
        for text in (*_AWKWARD, f"literal {end_of_text} in a text{end_of_text}", *samples):
            ids = self.encode(text)
            back = self.decode(ids)
            if back != text:
                at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), -1)
                at = at if at >= 0 else min(len(text), len(back))
                near = slice(max(0, at - 20), at + 20)
                raise DataError(
                    f"the tokenizer does not give this text back: {text[near]!r} came back as {back[near]!r}"
                    ": use a byte-level tokenizer without normalisation"
                )
            if self.end_of_text_id in ids:
                raise DataError(f"the tokenizer ends a document in the middle of ordinary text: {text[:60]!r}")


@final
class StreamDecoder:
    """Turns ids into text as they come; what it returns, joined, is what `Tokenizer.decode` returns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is still missing bytes."""
        return self._utf8.decode(self._tokenizer._bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)
