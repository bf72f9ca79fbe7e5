"""Labelled text for an analysis: by domain, as windows of tokens, and what a model makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finemoe.checkpoint.language_model import LanguageModel, training_data
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.logs import logger, progress
from finemoe.data import DataConfig, FilesCorpus, StdlibCorpus, TokenBatch, held_out
from finemoe.data.documents.document import Document, SkipReport, unique
from finemoe.data.loader import pack
from finemoe.model.logprobs import token_logprobs
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.transformer import ModelOutput, Transformer

MOST_DOMAINS = 12
"""Domains that a corpus's own labels may make; the rest, by size, are one domain `other`."""
_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class ReadAs:
    """A corpus whose records or encoding are not the usual ones."""

    corpus: str
    """As `read_passages` takes it."""
    options: Mapping[str, str]
    """`text_field`, `template`, `encoding` of a FilesCorpus."""


@dataclass(frozen=True)
class Passages:
    """The text of one domain, cut into windows that do not overlap."""

    domain: str
    windows: NDArray[np.int32]
    """[windows, length + 1] ids: inputs and, shifted by one, targets. The last window is filled up with `first_id`."""
    num_targets: int
    """Targets that are text; those after them, in the last window, are filling."""

    @property
    def length(self) -> int:
        """Tokens of a window that the model reads."""
        return self.windows.shape[1] - 1


@dataclass(frozen=True)
class Observed:
    """A batch of one domain and what the model made of it."""

    domain: str
    batch: TokenBatch
    """Weight 0 marks filling: leave those tokens out of every count. `RoutingRecord.load` has them in."""
    output: ModelOutput
    losses: Tensor
    """[batch, seq] float32 nats of each target; of filling too, so multiply by `batch.weights`."""


def read_passages(
    opened: LanguageModel,
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 16_384,
    length: int | None = None,
) -> list[Passages]:
    """Labelled text as windows for `opened`. Memory: 4 bytes a token.

    Args:
        opened: the model, whose tokenizer and way of joining documents are used.
        texts: each a document of the domain `text`.
        corpora: LABEL=PATH (one domain), PATH (its folders or files are the domains) or `stdlib`; PATH is a file, a
            folder or a glob. With neither texts nor corpora: the run's own held-out documents, or `stdlib` for a model
            that was not trained here. `ReadAs` says which field holds the text, or its encoding.
        tokens: most targets of each domain.
        length: tokens of a window; the model's own length, at most 512, when None.

    Raises:
        ConfigError: a length or number of tokens that cannot work.
        DataError: nothing to read, nothing that counts, or a text that is no Unicode.
    """
    if length is None:
        length = min(opened.reach or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    if length < 1 or tokens < 1:
        raise ConfigError(f"tokens {tokens} and length {length} must both be at least 1")
    if opened.reach is not None and length > opened.reach:
        logger.warning(
            "windows of %d tokens are longer than the %d that this model knows: losses rise towards their end",
            length, opened.reach,
        )  # fmt: skip
    documents = _documents(opened, texts, corpora)
    domains = _by_domain(documents, opened, tokens)
    # A window longer than the longest text would be filling alone, and its attention grows with its square.
    length = min(length, max([len(ids) - 1 for ids in domains.values()], default=length) or 1)
    passages = [_cut(name, ids, length, opened.first_id) for name, ids in domains.items() if _counts(opened, ids)]
    if not passages:
        alone = ", and of each document more than a token, as this model reads them apart" if opened.isolated else ""
        raise DataError(f"there is no text to read: give --text or --corpus something that has some{alone}")
    return passages


def batches(opened: LanguageModel, passages: Iterable[Passages], rows: int = 8) -> Iterator[tuple[str, TokenBatch]]:
    """The windows of each domain in order, at most `rows` at a time, on the model's device.

    Raises:
        ConfigError: batches of nothing.
    """
    if rows < 1:
        raise ConfigError(f"a batch of {rows} windows cannot be read: it takes at least 1")
    packing = "isolate" if opened.isolated else "concatenate"
    for passage in passages:
        length = passage.length
        for start in range(0, len(passage.windows), rows):
            windows = passage.windows[start : start + rows].astype(np.int64)
            batch = pack(windows, packing, opened.tokenizer.end_of_text_id)  # type: ignore[arg-type]
            place = torch.arange(start * length, (start + len(windows)) * length).view(len(windows), length)
            real = (place < passage.num_targets).to(batch.weights.dtype)
            kept = TokenBatch(batch.tokens, batch.targets, batch.weights * real, batch.positions, batch.documents)
            yield passage.domain, kept.to(opened.device)


@torch.no_grad()
def run_batch(
    opened: LanguageModel,
    batch: TokenBatch,
    *,
    constraint: Mapping[int, RoutingConstraint] | None = None,
    record: bool = False,
    states: bool = False,
    start: tuple[int, Tensor] | None = None,
) -> tuple[ModelOutput, Tensor]:
    """One forward pass as `Transformer.forward` takes it; the output, and the loss of each target `[batch, seq]`."""
    model: Transformer = opened.model
    documents = batch.documents if opened.isolated else None
    output = model(
        batch.tokens,
        positions=batch.positions,
        documents=documents,
        constraint=constraint,
        record=record,
        states=states,
        start=start,
    )
    return output, -token_logprobs(model, output.hidden, batch.targets)[0]


def observe(
    opened: LanguageModel,
    passages: Sequence[Passages],
    *,
    rows: int = 8,
    constraint: Mapping[int, RoutingConstraint] | None = None,
    record: bool = True,
    states: bool = False,
    description: str | None = "reading",
) -> Iterator[Observed]:
    """Run the model over every window, with progress on stderr unless `description` is None."""
    total = sum(len(passage.windows) for passage in passages)
    bar = nullcontext(lambda _: None) if description is None else progress(description, total, "windows")
    with bar as advance:
        for domain, batch in batches(opened, passages, rows):
            output, losses = run_batch(opened, batch, constraint=constraint, record=record, states=states)
            yield Observed(domain, batch, output, losses)
            advance(batch.num_sequences)


def require_experts(opened: LanguageModel) -> None:
    """Check that the model routes at all.

    Raises:
        ConfigError: it is dense.
    """
    if not any(layer < len(opened.model.blocks) for layer in opened.model.moe_layers):
        raise ConfigError(f"{opened.source}: this model is dense: there are no experts to look at")


def _documents(opened: LanguageModel, texts: Sequence[str], corpora: Sequence[str | ReadAs]) -> Iterator[Document]:
    report = SkipReport()
    if not texts and not corpora:
        yield from _own_documents(opened, report)
    for number, text in enumerate(texts, 1):
        _require_unicode(number, text)
        yield Document(f"text {number}", "text", text)
    seen: set[bytes] = set()
    for one in corpora:
        spec, options = (one.corpus, one.options) if isinstance(one, ReadAs) else (one, {})
        label, path = _label_and_path(spec)
        files = {"paths": [path], **options}
        corpus = StdlibCorpus() if path == "stdlib" else parse(FilesCorpus, files, f"--corpus {spec}")
        for document in unique(corpus.documents(report), seen, report):
            yield Document(document.name, label or document.domain, document.text)
    report.check(0.01)


def _require_unicode(number: int, text: str) -> None:
    """A shell hands over any bytes, and those that are no UTF-8 become half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text {number} is not valid Unicode: {error.reason}") from error


def _label_and_path(spec: str) -> tuple[str, str]:
    """The two parts of LABEL=PATH; no label where there is none, and where the whole is the name of something."""
    label, separator, path = spec.partition("=")
    if not separator or os.path.exists(spec):
        return "stdlib" if spec == "stdlib" else "", spec
    if not label or not path:
        raise ConfigError(f"--corpus {spec}: it takes LABEL=PATH, or a path alone")
    return label, path


def _own_documents(opened: LanguageModel, report: SkipReport) -> Iterator[Document]:
    config = _own_config(opened) if opened.own else DataConfig()
    if not opened.own:
        logger.info("no --corpus given: reading the standard library of this Python")
    yield from held_out(config.corpus, config.validation_share, config.sequence_length, report)


def _own_config(opened: LanguageModel) -> DataConfig:
    data = training_data(opened.source)
    if not data:
        raise DataError(f"{opened.source}: does not say what it was trained on: give --corpus")
    return parse(DataConfig, data, f"{opened.source}: data")


def _by_domain(documents: Iterable[Document], opened: LanguageModel, tokens: int) -> dict[str, list[int]]:
    """Ids by domain, the largest domain first, each beginning with `first_id` and at most `tokens` + 1 long."""
    found: dict[str, list[int]] = {}
    order: dict[str, int] = {}
    for document in documents:
        size = len(document.text)
        order[document.domain] = order.get(document.domain, 0) + size
        ids = found.setdefault(document.domain, [opened.first_id])
        if len(ids) <= tokens:
            beginning = _beginning(opened, document.text, tokens + 1 - len(ids))
            ids.extend([*beginning, opened.tokenizer.end_of_text_id])
    ranked = sorted(found, key=lambda name: (-order[name], name))
    kept = {name: found[name] for name in ranked[:MOST_DOMAINS]}
    if others := ranked[MOST_DOMAINS:]:
        logger.info("%d small domains are counted as one, `other`", len(others))
        joined = [i for name in others for i in found[name][1:]]
        kept["other"] = [opened.first_id, *kept.pop("other", [0])[1:], *joined]
    return {name: ids[: tokens + 1] for name, ids in kept.items()}


def _beginning(opened: LanguageModel, text: str, wanted: int) -> list[int]:
    """The ids of `text`, or at least `wanted` of a text much longer than that, which is not tokenised whole."""
    most = 16 * wanted
    while len(ids := opened.tokenizer.encode(text[:most])) < wanted and most < len(text):
        most *= 4  # blanks, lines of one sign: a token may have a hundred characters
    return ids


def _counts(opened: LanguageModel, ids: list[int]) -> bool:
    """Whether any target counts: where documents stand alone, the first token of each is not predicted."""
    return not opened.isolated or any(token != opened.tokenizer.end_of_text_id for token in ids[:-1])


def _cut(domain: str, ids: list[int], length: int, filling: int) -> Passages:
    targets = len(ids) - 1
    count = -(-targets // length)
    padded = np.full(count * length + 1, filling, dtype=np.int32)
    padded[: len(ids)] = ids
    views = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length]
    return Passages(domain, np.ascontiguousarray(views), targets)
