"""From a data configuration to batches: read, split, tokenise, cache, serve.

    corpus --scan--> hash, report --tokenizer (trained or loaded), self-test--> token folder in the cache -->
    Loader

The corpus is read once to hash it, every time; that is what makes a stale cache impossible. Training a
tokenizer and tokenising read it again, but only when the cache does not hold their results for that hash.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from finemoe.core.errors import DataError
from finemoe.core.logs import logger, progress
from finemoe.core.reading import reason_of
from finemoe.data.batch import TokenBatch
from finemoe.data.cache import DamagedError, open_or_build
from finemoe.data.config import DataConfig
from finemoe.data.corpora import CorpusConfig, Side, parts_of
from finemoe.data.documents.document import SkipReport, falls_within
from finemoe.data.loader import Loader, TokenShards, TokenSource, pack
from finemoe.data.scan import SIDES, Scan, scan_corpus
from finemoe.data.shards import FORMAT_VERSION, TokenFolder, TokenWriter, open_tokens
from finemoe.text import Tokenizer, alterations, require_faithful
from finemoe.text.tokenizer import TRAINER_VERSION

_FINGERPRINT = "fingerprint.txt"
_SAMPLE_CHARS = 4096  # the tokenizer's sample is drawn in pieces of this size
_COUNT_BLOCK = 1 << 24


@final
@dataclass(frozen=True)
class PreparedData:
    """A corpus, ready to train on."""

    config: DataConfig
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards
    report: dict[str, Any]
    """What was read and left out, as JSON: documents, bytes and tokens of each side, domains, skips."""

    def train_loader(self, seed: int) -> Loader:
        """The loader for a run with this data seed."""
        return Loader(
            self.train,
            sequence_length=self.config.sequence_length,
            packing=self.config.packing,
            end_of_text_id=self.tokenizer.end_of_text_id,
            seed=seed,
        )

    def require_batch(self, num_sequences: int) -> None:
        """Check that one batch does not hold the whole corpus.

        Raises:
            DataError: when the training side has fewer than `num_sequences` sequences.
        """
        length = self.config.sequence_length
        available = sum(source.num_windows(length) for source in self.train.sources)
        if available < num_sequences:
            raise DataError(
                f"the corpus has {available} training sequences of {length} tokens, one batch takes "
                f"{num_sequences}: add text, or lower the batch or `sequence_length`"
            )

    def token_frequencies(self) -> NDArray[np.int64]:
        """How often each id occurs in the training tokens: `[vocab]`."""
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for source in self.train.sources:
            for start in range(0, len(source.tokens), _COUNT_BLOCK):
                block = source.tokens[start : start + _COUNT_BLOCK]
                counts += np.bincount(block, minlength=len(counts))
        return counts

    @cached_property
    def validation_bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token that validation predicts; end-of-text tokens stand for none.

        Raises:
            DataError: it predicts nothing.
        """
        sizes = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for token_id, content in self.tokenizer.token_bytes.items():
            sizes[token_id] = len(content)
        sizes[self.tokenizer.end_of_text_id] = 0
        num_bytes = num_targets = 0.0
        for source, chosen in self._validation_windows():
            for start in range(0, len(chosen), 64):
                windows = source.windows(chosen[start : start + 64], self.config.sequence_length)
                batch = pack(windows, self.config.packing, self.tokenizer.end_of_text_id)
                weights = batch.weights.numpy()
                # Bytes of the text as it was written, whatever the tokenizer makes of it.
                num_bytes += float((sizes[batch.targets.numpy()] * weights).sum()) * source.bytes_per_byte
                num_targets += float(weights.sum())
        if not num_bytes:
            raise DataError(
                "the validation documents hold no text to measure the loss on, once they are cut into sequences of "
                f"{self.config.sequence_length}: name others, or raise `validation_share`"
            )
        return num_bytes / num_targets

    def validation_batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """The validation sequences, always the same in the same order; the last batch may be smaller."""
        length = self.config.sequence_length
        windows = np.concatenate([source.windows(chosen, length) for source, chosen in self._validation_windows()])
        for start in range(0, len(windows), batch_size):
            yield pack(windows[start : start + batch_size], self.config.packing, self.tokenizer.end_of_text_id)

    def _validation_windows(self) -> Iterator[tuple[TokenSource, NDArray[np.int64]]]:
        """Windows spread evenly over each source, as many of each as its weight asks for."""
        length = self.config.sequence_length
        sources = [source for source in self.validation.sources if source.num_windows(length)]
        budget = max(1, self.config.max_validation_tokens // length)
        total_weight = sum(source.weight for source in sources)
        for source in sources:
            available = source.num_windows(length)
            count = min(available, max(1, int(budget * source.weight / total_weight)))
            yield source, np.arange(count, dtype=np.int64) * available // count


def prepare(config: DataConfig) -> PreparedData:
    """Read the corpus, train or load the tokenizer, tokenise; all but the reading comes from the cache if it
    can.

    Raises:
        DataError: an empty or too small corpus, too much that cannot be read, a tokenizer that loses too much text.
    """
    scan = scan_corpus(config.corpus, config.validation_share, config.max_skipped_share, config.sequence_length)
    cache = config.cache
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else _trained_tokenizer(config, scan, cache)
    alterations(tokenizer, scan.samples).require(config.max_altered_share)  # before a large corpus is tokenised
    asked = (config.control_tokens,) if config.control_tokens != "text" else ()
    folder = cache / "tokens" / _key(FORMAT_VERSION, scan.digest(), tokenizer.fingerprint(), *asked)
    found = open_or_build(folder, open_tokens, lambda fresh: _tokenise(config, scan, tokenizer, fresh))
    found.altered.require(config.max_altered_share)
    if (sentence := found.altered.sentence()) is not None:
        logger.warning("%s", sentence)
    train, validation = (_shards(config.corpus, side, found) for side in SIDES)
    report = {
        **scan.report(),
        "tokens": {"train": train.num_tokens, "validation": validation.num_tokens},
        "altered_by_tokenizer": found.altered.as_json(),
        "tokenizer_sha256": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "control_tokens": {"read_as": config.control_tokens, "documents": found.control_tokens},
    }
    prepared = PreparedData(config, tokenizer, train, validation, report)
    _check_lengths(prepared)
    _say_control_tokens(**report["control_tokens"])
    logger.info(
        "corpus: %s, %s + %s tokens to train and validate on, vocabulary of %d",
        _documents(scan),
        *(_millions(report["tokens"][side]) for side in SIDES),
        tokenizer.vocab_size,
    )
    return prepared


def _millions(tokens: int) -> str:
    """In millions where there are some, so that a few thousand do not read as none."""
    return f"{tokens / 1e6:.2f} M" if tokens >= 100_000 else f"{tokens:,}"


def _documents(scan: Scan) -> str:
    """How many on each side; of those that are cut in two, how many there are."""
    if scan.tails:
        return "1 document" if scan.skips.kept == 1 else f"{scan.skips.kept} documents"
    return " + ".join(str(scan.totals[side].documents) for side in SIDES) + " documents"


def _trained_tokenizer(config: DataConfig, scan: Scan, cache: Path) -> Tokenizer:
    """The tokenizer trained on this corpus, from the cache if it was trained before."""
    named = (config.splitting,) if config.splitting != "finemoe" else ()  # what is cached keeps its place
    key = _key(TRAINER_VERSION, scan.digest(), config.vocab_size, config.tokenizer_sample_bytes, *named)

    def build(fresh: Path) -> None:
        started = time.perf_counter()
        tokenizer = Tokenizer.train(_tokenizer_sample(config, scan), config.vocab_size, config.splitting)
        require_faithful(tokenizer, scan.samples)
        tokenizer.save(fresh)
        (fresh / _FINGERPRINT).write_text(tokenizer.fingerprint(), encoding="utf-8")
        logger.info("trained a tokenizer of %d in %.1f s", tokenizer.vocab_size, time.perf_counter() - started)

    tokenizer = open_or_build(cache / "tokenizers" / key, _open_tokenizer, build)
    if tokenizer.vocab_size < config.vocab_size:
        logger.warning(
            "the corpus has only enough distinct text for a vocabulary of %d, not %d",
            tokenizer.vocab_size,
            config.vocab_size,
        )
    return tokenizer


def _open_tokenizer(folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(folder)
        recorded = (folder / _FINGERPRINT).read_text(encoding="utf-8")
    except (DataError, OSError, UnicodeDecodeError) as error:
        raise DamagedError(str(error) if isinstance(error, DataError) else f"{folder}: {reason_of(error)}") from error
    if tokenizer.fingerprint() != recorded:
        raise DamagedError(f"{folder}: the tokenizer does not have its recorded hash")
    return tokenizer


def _tokenizer_sample(config: DataConfig, scan: Scan) -> Iterator[str]:
    """Pieces drawn evenly from the training documents, about `tokenizer_sample_bytes` of them, or all."""
    share = config.tokenizer_sample_bytes / scan.totals["train"].num_bytes
    for item in Scan(SkipReport(quiet=True), tails=scan.tails).read(config.corpus, config.validation_share):
        document = item.document
        if item.side != "train":
            continue
        if share >= 1:
            yield document.text
            continue
        for start in range(0, len(document.text), _SAMPLE_CHARS):
            if falls_within(share, "tokenizer", f"{document.name}@{start}"):
                yield document.text[start : start + _SAMPLE_CHARS]


def _tokenise(config: DataConfig, scan: Scan, tokenizer: Tokenizer, folder: Path) -> None:
    """Write every document of the corpus as tokens into `folder`."""
    names = [_stream(part, side) for part in range(len(parts_of(config.corpus))) for side in SIDES]
    again = Scan(SkipReport(quiet=True), tails=scan.tails)
    with (
        TokenWriter(folder, names, tokenizer, special=config.control_tokens == "tokens") as writer,
        progress("tokenising", scan.skips.kept, "documents") as advance,
    ):
        for item in again.read(config.corpus, config.validation_share):
            writer.add(_stream(item.part, item.side), item.document.text)
            advance(1)
        writer.finish()
    if again.digest() != scan.digest():
        raise DataError("the corpus changed while it was being read: start again when nothing writes to it")


def _shards(corpus: CorpusConfig, side: Side, found: TokenFolder) -> TokenShards:
    parts = parts_of(corpus)
    names = [f"{i}-{part.corpus.kind}" for i, part in enumerate(parts)] if len(parts) > 1 else [parts[0].corpus.kind]
    return TokenShards(
        tuple(
            TokenSource(name, part.weight, found.streams[_stream(i, side)], found.bytes_per_byte[_stream(i, side)])
            for i, (name, part) in enumerate(zip(names, parts, strict=True))
        )
    )


def _say_control_tokens(read_as: str, documents: dict[str, int]) -> None:
    """What becomes of control tokens that documents spell out, which may be quotations or turns written by hand."""
    if not documents:
        return
    shown = ", ".join(f"{name} in {number}" for name, number in list(documents.items())[:4])
    more = f" and {len(documents) - 4} others" if len(documents) > 4 else ""
    other = "tokens" if read_as == "text" else "text"
    logger.warning(
        "documents spell out control tokens of the tokenizer (%s%s), which are read as %s; "
        'data.control_tokens = "%s" reads them as %s',
        shown,
        more,
        "the text that they are" if read_as == "text" else "those tokens",
        other,
        "those tokens" if read_as == "text" else "the text that they are",
    )


def _check_lengths(prepared: PreparedData) -> None:
    """Refuse now what a run would stumble over later."""
    prepared.train_loader(seed=0)  # refuses a source without a single sequence
    length = prepared.config.sequence_length
    short = [source.name for source in prepared.validation.sources if not source.num_windows(length)]
    if len(short) == len(prepared.validation.sources):
        raise DataError(
            f"{prepared.validation.num_tokens} validation tokens are fewer than one sequence of {length} + 1; there "
            f"are {prepared.train.num_tokens} to train on: raise `validation_share` from "
            f"{prepared.config.validation_share:g}, add text, or lower `sequence_length`"
        )
    if short:
        logger.warning("too little text to validate on in: %s", ", ".join(short))


def _stream(part: int, side: Side) -> str:
    return f"{part}-{side}"


def _key(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
