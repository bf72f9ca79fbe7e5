"""Tokenizers: text to ids and back.

Training and encoding are done by the `tokenizers` library. What this module adds: ordinary text never turns into a
control token unless asked to (`text.control_names` says which those are), and decoding works on bytes (so that
streaming and whole decoding cannot disagree). What a tokenizer changes of a corpus is counted while it is tokenised, by
`alterations`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from finemoe.core.errors import DataError
from finemoe.core.files import write_text
from finemoe.text import pretokenizers
from finemoe.text.control_names import controls
from finemoe.text.decoding import Decoding, bytes_of_tokens, decoding_of
from finemoe.text.files import TOKENIZER_LIMIT, parse_object, read_beside, read_bounded
from finemoe.text.settings import TokenizerSettings

# The library warns, and then stops using its threads, when a process that used them forks. Say what is wanted
# instead: threads in this process, none in a forked child, where they would wait for threads that do not
# exist.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

END_OF_TEXT = "<|end_of_text|>"
FILE_NAME = "tokenizer.json"
MIN_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
TRAINER_VERSION = 1  # raise it when a change below alters what training produces

# How published tokenizers call the tokens that end and begin a document, in order of preference.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>", "</s>")
_BEGIN_OF_TEXT_NAMES = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>")

_PROBE = "A text, 12 números\n\t 床前 🙂"
_MOST_IDS = 2**24  # the library keeps tables by id; published vocabularies have up to 2^18


@final
class Tokenizer:
    """A byte-level or SentencePiece-like tokenizer. Make one with `train` or `load`; it never changes afterwards."""

    def __init__(self, inner: tokenizers.Tokenizer, origin: str, settings: TokenizerSettings | None = None) -> None:
        """Wrap `inner`; `origin` names it in errors, `settings` are what the files beside it say.

        Raises:
            DataError: when its tokens have no known spelling, or none of them ends a text.
        """
        self._json = inner.to_str()
        self._decoding: Decoding = decoding_of(json.loads(self._json).get("decoder"), origin)
        inner.no_truncation()
        inner.no_padding()
        self.settings: TokenizerSettings = settings or TokenizerSettings()
        added = dict(sorted(inner.get_added_tokens_decoder().items()))
        self.added_tokens: Mapping[int, tuple[str, bool]] = {
            token_id: (token.content, bool(token.special)) for token_id, token in added.items()
        }
        """Tokens found in a text before it is split: id to name, and whether it is special."""
        self.control_tokens: Mapping[str, int] = self._find_control_tokens()
        """Those that no text becomes unless it is asked to, by name."""
        unmarked = [token for token in added.values() if token.content in self.control_tokens and not token.special]
        inner.add_special_tokens([_marked_special(token) for token in unmarked])
        inner.encode_special_tokens = True  # "<|end_of_text|>" inside a document is text
        self._inner = inner
        self._unmarked: int = len(unmarked)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.end_of_text_id: int = self._find_end_of_text(origin)
        self.bos_id: int | None = self._find_bos()

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, splitting: str = "qwen2") -> Tokenizer:
        """Train on `texts`, split first by that one of `pretokenizers.TRAINED`. Equal texts give an equal tokenizer.

        The vocabulary comes out smaller than `vocab_size` when the texts have too few distinct pairs.

        Raises:
            DataError: when `vocab_size` has no room for the 256 bytes and the end-of-text token.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(f"vocab_size {vocab_size} is too small: bytes alone need {MIN_VOCAB_SIZE}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pretokenizers.build(pretokenizers.TRAINED[splitting])
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
        """Read a `tokenizer.json`, or the one in a folder, with the configurations that lie beside it.

        Raises:
            DataError: when there is none, it is not a tokenizer, or not of a known family.
        """
        file = Path(path)
        if file.is_dir():
            text = read_beside(file, FILE_NAME, TOKENIZER_LIMIT, "tokenizer")
            file = file / FILE_NAME
        else:
            text = None
        text = read_bounded(file, TOKENIZER_LIMIT, "tokenizer") if text is None else text
        return Tokenizer.parse(text, f"tokenizer {file}", TokenizerSettings.read(file.parent))

    @staticmethod
    def parse(text: str, origin: str, settings: TokenizerSettings | None = None) -> Tokenizer:
        """The tokenizer that is `text`, the content of a tokenizer.json.

        Raises:
            DataError: it is not one, or not of a known family.
        """
        _check_ids(parse_object(text, f"{origin}: not a tokenizer.json"), origin)
        try:
            inner = tokenizers.Tokenizer.from_str(text)
            inner.encode(_PROBE)  # some contradictions only show at work
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and a panic is not even that
            raise DataError(f"{origin}: not a tokenizer.json: {error}") from error
        return Tokenizer(inner, origin, settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` to `path`, or into it when `path` is a folder: all of it or nothing."""
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        write_text(file, self._json)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._json

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True)
        if self._unmarked:  # texts that spell these had other ids before 0.2
            canonical += "control tokens without the flag are text"
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def byte_level(self) -> bool:
        """Whether every byte has a token, so that every text comes back unless it is normalised first."""
        return self._decoding.byte_level

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: of the text, of the turn, and those of generation_config.json."""
        eos = self.id_of(self.settings.special_tokens.get("eos_token"))
        ids = {self.end_of_text_id, *self.settings.stop_ids} | ({eos} if eos is not None else set())
        return frozenset(ids)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a text that the model continues begins with `bos_id`."""
        if self.bos_id is None:
            return False
        if self.settings.add_bos_token is not None:
            return self.settings.add_bos_token
        return self.prefix == [self.bos_id]

    @cached_property
    def prefix(self) -> list[int]:
        """What tokenizer.json itself has put before a text that is encoded with special tokens."""
        bare, full = (self._inner.encode("a", add_special_tokens=added).ids for added in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        found: list[int] = full[:at]
        return found

    def id_of(self, token: str | None) -> int | None:
        """The id of `token` as the vocabulary spells it; None: it has none."""
        found: int | None = None if token is None else self._inner.token_to_id(token)
        return found

    @property
    def end_of_text(self) -> str:
        """The name of the token that ends a text."""
        return str(self._inner.id_to_token(self.end_of_text_id))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`; none is added. Control tokens that it spells out are text, unless `special`."""
        if special:
            return self.encode_template(text)
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        inner = self._recognising if special else self._inner
        return [encoding.ids for encoding in inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text that the model continues: `encode`, after the beginning token where there is one.

        With `special` a text that spells the beginning token itself gets no second one.
        """
        ids = self.encode(text, special=special)
        if not self.adds_bos or self.bos_id is None or (special and ids[:1] == [self.bos_id]):
            return ids
        return [self.bos_id, *ids]

    def encode_template(self, text: str) -> list[int]:
        """The ids of a rendered chat template: every added token is recognised by name, none is added."""
        ids: list[int] = self._recognising.encode(text, add_special_tokens=False).ids
        return ids

    def encode_piece(self, text: str, *, first: bool) -> list[int]:
        """`encode` for what stands between two control tokens of a longer text, or before the `first` of them."""
        ids: list[int] = (self._inner if first else self._continuing).encode(text, add_special_tokens=False).ids
        return ids

    def recognised(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """The control tokens that `text` spells out: the id of each, and where in `text` it begins and ends."""
        known = set(self.control_tokens.values())
        found = self._recognising.encode(text, add_special_tokens=False)
        return [pair for pair in zip(found.ids, found.offsets, strict=True) if pair[0] in known]

    @cached_property
    def control_openings(self) -> Mapping[str, tuple[str, ...]]:
        """Names of control tokens by their first two characters, most of which few texts have."""
        found: dict[str, tuple[str, ...]] = {}
        for name in self.control_tokens:
            found[name[:2]] = (*found.get(name[:2], ()), name)
        return found

    @cached_property
    def token_bytes(self) -> Mapping[int, bytes]:
        """The bytes each id stands for; added tokens stand for their name."""
        return bytes_of_tokens(self._inner, self._decoding)

    @cached_property
    def longest_token(self) -> int:
        """[bytes] Of the longest token."""
        return max(map(len, self.token_bytes.values()))

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids of this vocabulary stand for, with the space that some families put before a text."""
        return b"".join(map(self.token_bytes.__getitem__, ids))

    @property
    def puts_space_first(self) -> bool:
        """Whether encoding puts a space before a text, which decoding takes away."""
        return self._decoding.drops_first_space

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: tokens of this vocabulary.
            continues: they follow other text, so that a space they begin with is kept whatever the family.

        Raises:
            DataError: for an id outside the vocabulary.
        """
        stream = self.decoder(continues)
        return "".join([*map(stream.push, ids), stream.finish()])

    def decoder(self, continues: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one at a time; `continues` as in `decode`."""
        return StreamDecoder(self, drop_space=self._decoding.drops_first_space and not continues)

    @cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """The same tokenizer with its special tokens recognised: a second one, as the switch is its state."""
        inner = tokenizers.Tokenizer.from_str(self._json)
        inner.no_truncation()
        inner.no_padding()
        return inner

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The same tokenizer where only the beginning of a text has a space put before it: without that space."""
        splitting = json.loads(self._json).get("pre_tokenizer") or {}
        if splitting.get("type") != "Metaspace" or splitting.get("prepend_scheme") != "first":
            return self._inner
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        inner.encode_special_tokens = True
        inner.pre_tokenizer = pre_tokenizers.Metaspace(
            splitting["replacement"], prepend_scheme="never", split=splitting.get("split", True)
        )
        return inner

    def _find_control_tokens(self) -> dict[str, int]:
        """By what tokenizer.json and the files beside it say of a token, and by how it is spelt."""
        named, stops = set(self.settings.special_tokens.values()), self.settings.stop_ids
        return {
            name: token_id
            for token_id, (name, special) in self.added_tokens.items()
            if controls(name, special) or name in named or token_id in stops
        }

    def _find_bos(self) -> int | None:
        named = self.id_of(self.settings.special_tokens.get("bos_token"))
        if named is not None:
            return named
        prefix = self.prefix
        if len(prefix) == 1:
            return prefix[0]
        added = {name: token_id for token_id, (name, _) in self.added_tokens.items()}
        return next((added[name] for name in _BEGIN_OF_TEXT_NAMES if name in added), None)

    def _find_end_of_text(self, origin: str) -> int:
        """A known name among the added tokens, else the configured end, else a known name anywhere."""
        added = {name: token_id for token_id, (name, _) in self.added_tokens.items()}
        eos = self.settings.special_tokens.get("eos_token")
        names = [eos, *_END_OF_TEXT_NAMES] if eos in _END_OF_TEXT_NAMES else [*_END_OF_TEXT_NAMES]
        candidates = [added.get(name) for name in names if name is not None]
        candidates += [self.id_of(name) for name in (eos, *_END_OF_TEXT_NAMES)]
        candidates += [i for i in self.settings.stop_ids if i < self.vocab_size]
        found = next((token_id for token_id in candidates if token_id is not None), None)
        if found is None:
            raise DataError(f"{origin}: no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)}")
        return found

    def _bytes(self, token_id: int) -> bytes:
        try:
            return self.token_bytes[token_id]
        except KeyError:
            raise DataError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}") from None


def _marked_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _check_ids(facts: Mapping[str, Any], origin: str) -> None:
    """Refuse an id that would make the library, which then ends the process, run out of memory."""
    model, added = facts.get("model"), facts.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else []
    ids += [token.get("id") for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    odd = next((i for i in ids if isinstance(i, int) and not 0 <= i < _MOST_IDS), None)
    if odd is not None:
        raise DataError(f"{origin}: the id {odd} is outside of what any vocabulary has (0 to {_MOST_IDS - 1})")


@final
class StreamDecoder:
    """Turns ids into text as they come; what it returns, joined, is what `Tokenizer.decode` returns."""

    def __init__(self, tokenizer: Tokenizer, drop_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is still missing bytes."""
        content = self._tokenizer._bytes(token_id)
        if self._drop_space and content:
            self._drop_space = False
            content = content.removeprefix(b" ")
        return self._utf8.decode(content)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)
