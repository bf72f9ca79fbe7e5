"""From records to conversations as tokens: read, told apart by form, rendered by the model's template, split, cached.

A conversation is split as a document is: by the hash of its name, or as the corpus says, so that all of it is on one
side. Which form records are in is found out and said; what is in none is skipped, counted, and too much of it is an
error that shows the first few.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from finemoe.core.errors import DataError
from finemoe.core.logs import logger, progress
from finemoe.data.cache import DamagedError, open_or_build
from finemoe.data.config import DataConfig
from finemoe.data.conversations.encode import Item, asked_in, encode_items
from finemoe.data.conversations.forms import NO_FORM, Kind, known_forms
from finemoe.data.conversations.store import FORMAT_VERSION, Stored, Writing
from finemoe.data.corpora import Side, SplitDocument, read_corpus
from finemoe.data.documents.document import Skipped, SkipReport
from finemoe.text.chat import ChatTemplate
from finemoe.text.tokenizer import Tokenizer

SIDES: tuple[Side, ...] = ("train", "validation")
_REPORT = "report.json"
_CHUNK = 64  # records that are rendered together


@final
@dataclass(frozen=True)
class PreparedConversations:
    """Both sides of the split as tokens, and what was read and left out."""

    config: DataConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    sides: Mapping[Side, Stored]
    report: dict[str, Any]
    """As JSON: items, tokens and forms of each side, what was skipped and why."""


def prepare_conversations(
    config: DataConfig, want: Kind, tokenizer: Tokenizer, template: ChatTemplate
) -> PreparedConversations:
    """Read the corpus as records, tokenise them; the tokens come from the cache where the same was read before.

    Args:
        config: what to read, and how it is split.
        want: conversations to learn; pairs to prefer one of; or prompts to answer. A conversation does for a prompt,
            and the better half of a pair for a conversation.
        tokenizer: the model's.
        template: the model's.

    Raises:
        DataError: nothing can be used, or too much cannot; or a side of the split is empty.
    """
    digest = hashlib.sha256()
    for item in read_corpus(config.corpus, config.validation_share, SkipReport(quiet=True), whole=True):
        digest.update(repr((item.side, item.document.name, item.document.text)).encode("utf-8", "replace"))
    corpus = digest.hexdigest()
    cache = config.cache
    sources = sorted(template.sources.items()), sorted(template.special_tokens.items())
    facts = (FORMAT_VERSION, corpus, want, tokenizer.fingerprint(), sources, config.max_skipped_share)
    stops = (tokenizer.stop_ids, tokenizer.end_of_text_id)
    folder = cache / "conversations" / hashlib.sha256(repr((facts, stops)).encode()).hexdigest()[:32]
    report, *sides = open_or_build(folder, _open, lambda fresh: _build(fresh, config, want, tokenizer, template))
    prepared = PreparedConversations(
        config,
        tokenizer,
        template,
        dict(zip(SIDES, sides, strict=True)),
        {**report, "template": template.origin, "corpus_sha256": corpus, "tokenizer_sha256": tokenizer.fingerprint()},
    )
    _say(prepared, want)
    return prepared


def _open(folder: Path) -> tuple[Any, ...]:
    try:
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder}: {error}") from error
    return report, *(Stored.open(folder / side) for side in SIDES)


def _build(folder: Path, config: DataConfig, want: Kind, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    skips, unusable, forms = SkipReport(), SkipReport(quiet=True), Counter[str]()
    writing: dict[Side, Writing] = {side: Writing() for side in SIDES}
    counts: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
    with progress("reading conversations", None, "conversations") as advance:
        for items in _chunks(read_corpus(config.corpus, config.validation_share, skips, whole=True)):
            texts = [item.document.text for item in items]
            for item, found in zip(items, encode_items(texts, want, tokenizer, template), strict=True):
                if not isinstance(found, Item):
                    skips.kept -= 1
                    unusable.skip(item.document.name, str(found))
                    continue
                forms[found.said.form] += 1
                margin = found.said.pair.margin if found.said.pair is not None else None
                writing[item.side].add(found.segments, asked_in(found.said), margin)
                counts[item.side]["items"] += 1
                counts[item.side]["tokens"] += sum(len(one.ids) for one in found.segments)
                counts[item.side]["trained_tokens"] += sum(sum(one.trained) for one in found.segments)
            advance(len(items))
            if not forms:
                break  # not one of so many can be used: the others are no better
    skips.num_skipped += unusable.num_skipped
    skips.skipped += unusable.skipped
    _require(skips, forms, counts, config, want)
    if unusable.num_skipped:
        left = "1 record" if unusable.num_skipped == 1 else f"{unusable.num_skipped:,} records"
        logger.warning("%s left out, of %s: %s", left, f"{sum(forms.values()):,}", reasons(unusable.skipped))
    for side in SIDES:
        (folder / side).mkdir()
        writing[side].close(folder / side)
    report = {
        "kind": want,
        "forms": dict(forms.most_common()),
        **{name: {side: counts[side][name] for side in SIDES} for name in ("items", "tokens", "trained_tokens")},
        "documents_read": sum(forms.values()),
        "duplicates": skips.duplicates,
        "num_skipped": skips.num_skipped,
        "skipped": [{"name": one.name, "reason": one.reason} for one in skips.skipped],
        "num_set_aside": skips.num_set_aside,
        "vocab_size": tokenizer.vocab_size,
    }
    (folder / _REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def _chunks(items: Iterable[SplitDocument]) -> Iterator[list[SplitDocument]]:
    chunk: list[SplitDocument] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _require(
    skips: SkipReport, forms: Counter[str], counts: Mapping[str, Counter[str]], config: DataConfig, want: Kind
) -> None:
    """Refuse what cannot be trained on."""
    seen = skips.kept + skips.num_skipped + skips.duplicates
    first = reasons(skips.skipped)
    known = f". {known_forms()}" if NO_FORM in first else ""
    if not forms:
        if not seen:
            raise DataError(f"corpus of kind `{config.corpus.kind}` holds no records: check its paths")
        which = "no record" if seen < _CHUNK else f"none of the first {seen} records"
        raise DataError(f"{which} can be used as a {want}: {first}{known}")
    if skips.num_skipped > config.max_skipped_share * seen:
        raise DataError(
            f"{skips.num_skipped} of {seen} records cannot be used as a {want} ({first}): mend or remove them, or "
            f"raise `max_skipped_share` from {config.max_skipped_share:g}{known}"
        )
    for side in SIDES:
        if not counts[side]["items"]:
            share = f"raise `data.validation_share` from {config.validation_share:g}"
            fix = f"add more, {share}, or name `validation_paths`" if side == "validation" else "add more"
            raise DataError(f"none of the {sum(forms.values())} records is on the {side} side of the split: {fix}")


def reasons(skipped: Sequence[Skipped]) -> str:
    """Why records were skipped: the first two reasons that differ, each with the first record of it."""
    first: dict[str, str] = {}
    for one in skipped:
        first.setdefault(one.reason, one.name)
    return "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:2])


def overlap(prepared: PreparedConversations) -> int:
    """Items held out whose question is among those trained on too."""
    train, held = (prepared.sides[side].asked for side in SIDES)
    return int(np.isin(held, train).sum())


def _say(prepared: PreparedConversations, want: Kind) -> None:
    report, names = prepared.report, {"conversation": "conversations", "pair": "pairs", "prompt": "prompts"}
    forms = ", ".join(f"{name} ({count:,})" for name, count in report["forms"].items())
    items, tokens, trained = (report[name] for name in ("items", "tokens", "trained_tokens"))
    what = "are the answers'" if want == "pair" else "are trained"  # a reward model learns the one token behind them
    share = f", of which {trained['train'] / tokens['train']:.0%} {what}" if trained["train"] else ""
    logger.info(
        "%s: %s + %s to train and validate on, %.2f M tokens%s; form: %s; template: %s",
        names[want], f"{items['train']:,}", f"{items['validation']:,}", tokens["train"] / 1e6, share, forms,
        report["template"],
    )  # fmt: skip
    if same := overlap(prepared):
        logger.warning(
            "%d of the %d held out ask what is asked in training too: their figures flatter", same, items["validation"]
        )
