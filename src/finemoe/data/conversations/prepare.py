"""From records to conversations as tokens: read, told apart by form, rendered by the model's template, split, cached.

A conversation is split as a document is: by the hash of its name, or as the corpus says, so that all of it is on one
side. Which form records are in is found out and said; what is in none is skipped, counted, and too much of it is an
error that shows the first few.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from finemoe.core.errors import DataError
from finemoe.core.logs import logger, progress
from finemoe.data.cache import DamagedError, open_or_build
from finemoe.data.config import DataConfig
from finemoe.data.conversations.forms import Conversation, FormError, Kind, Message, Said, read
from finemoe.data.conversations.store import FORMAT_VERSION, Stored, Writing
from finemoe.data.corpora import Side, SplitDocument, read_corpus
from finemoe.data.documents.document import SkipReport
from finemoe.text.chat import ChatTemplate
from finemoe.text.control import encode_chat
from finemoe.text.tokenizer import Tokenizer
from finemoe.text.turns import Turns, encode_turns

SIDES: tuple[Side, ...] = ("train", "validation")
_REPORT = "report.json"
_HOPELESS = 32  # so many records in a row that cannot be used, from the first on, end the reading


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
    cache = Path(config.cache_dir or os.environ.get("FINEMOE_CACHE") or "~/.cache/finemoe").expanduser()
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
        {**report, "corpus_sha256": corpus, "tokenizer_sha256": tokenizer.fingerprint()},
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
    skips, forms = SkipReport(), Counter[str]()
    writing: dict[Side, Writing] = {side: Writing() for side in SIDES}
    counts: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
    failed_first = 0
    with progress("reading conversations", None, "conversations") as advance:
        for item in read_corpus(config.corpus, config.validation_share, skips, whole=True):
            advance(1)
            try:
                said, segments = encoded(item, want, tokenizer, template)
            except (FormError, DataError) as error:
                skips.kept -= 1
                skips.skip(item.document.name, str(error))
                failed_first += not forms
                if failed_first == _HOPELESS:
                    break
                continue
            forms[said.form] += 1
            margin = said.pair.margin if said.pair is not None else None
            writing[item.side].add(segments, _asked(said), margin)
            counts[item.side]["items"] += 1
            counts[item.side]["tokens"] += sum(len(one.ids) for one in segments)
            counts[item.side]["trained_tokens"] += sum(sum(one.trained) for one in segments)
    _require(skips, forms, counts, config, want)
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
        "template": template.origin,
        "vocab_size": tokenizer.vocab_size,
    }
    (folder / _REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def _require(
    skips: SkipReport, forms: Counter[str], counts: Mapping[str, Counter[str]], config: DataConfig, want: Kind
) -> None:
    """Refuse what cannot be trained on."""
    seen = skips.kept + skips.num_skipped + skips.duplicates
    first = "; ".join(f"{one.name}: {one.reason}" for one in skips.skipped[:2])
    if not forms:
        if not seen:
            raise DataError(f"corpus of kind `{config.corpus.kind}` holds no records: check its paths")
        raise DataError(f"no record can be used as a {want}: {first}")
    if skips.num_skipped > config.max_skipped_share * seen:
        raise DataError(
            f"{skips.num_skipped} of {seen} records cannot be used as a {want} ({first}): mend or remove them, or "
            f"raise `max_skipped_share` from {config.max_skipped_share:g}"
        )
    for side in SIDES:
        if not counts[side]["items"]:
            share = f"raise `data.validation_share` from {config.validation_share:g}"
            fix = f"add more, {share}, or name `validation_paths`" if side == "validation" else "add more"
            raise DataError(f"none of the {sum(forms.values())} records is on the {side} side of the split: {fix}")


def encoded(
    item: SplitDocument, want: Kind, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[Said, tuple[Turns, ...]]:
    """What a record says, and its segments as tokens: two of a pair, which begin with the same prompt.

    Raises:
        FormError: it is in no known form, or cannot be used as what is wanted.
        DataError: the template cannot render it.
    """
    said = read(_record(item.document.text))
    return said, _ENCODERS[want](said, tokenizer, template)


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise FormError("it is a text, and not a record with fields: use JSON Lines, JSON, CSV or Parquet") from error
    if not isinstance(record, dict):
        raise FormError(f"it is {type(record).__name__}, and not a record with fields")
    return record


def _one(messages: Sequence[Message], tools: Sequence[Any], tokenizer: Tokenizer, template: ChatTemplate) -> Turns:
    return encode_turns(template, tokenizer, messages, tools=tools or None)


def _conversation(said: Said, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Turns, ...]:
    if said.pair is not None:
        said = Said(said.form, Conversation((*said.pair.prompt.messages, *said.pair.chosen), said.pair.prompt.tools))
    if said.conversation is None or said.kind != "conversation":
        raise FormError(f"it is in the form `{said.form}`, which holds a question and no answer to learn")
    turns = _one(said.conversation.messages, said.conversation.tools, tokenizer, template)
    if not any(turns.trained):
        raise FormError("nothing in it is to be learnt: no message of the assistant, or `train` is false in all")
    return (turns,)


def _pair(said: Said, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Turns, ...]:
    pair = said.pair
    if pair is None:
        raise FormError(f"it is in the form `{said.form}`, which holds one answer: a pair has `chosen` and `rejected`")
    prompt = tuple(_context(message) for message in pair.prompt.messages)
    both = [_one((*prompt, *answer), pair.prompt.tools, tokenizer, template) for answer in (pair.chosen, pair.rejected)]
    first = [next((n for n, learnt in enumerate(turns.trained) if learnt), None) for turns in both]
    if first[0] is None or first[1] is None:
        raise FormError("an answer of the pair is empty")
    if both[0].ids[: first[0]] != both[1].ids[: first[1]]:
        raise FormError("the template writes the prompt otherwise before the better answer than before the worse")
    return tuple(both)


def _prompt(said: Said, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Turns, ...]:
    conversation = said.pair.prompt if said.pair is not None else said.conversation
    assert conversation is not None
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise FormError("nothing is asked in it")
    _, ids = encode_chat(template, tokenizer, messages, tools=conversation.tools or None)
    return (Turns(tuple(ids), (False,) * len(ids)),)


def _context(message: Message) -> Message:
    """A message that is read and not learnt."""
    return {**message, "train": False} if message["role"] == "assistant" else message


_ENCODERS: Mapping[Kind, Callable[[Said, Tokenizer, ChatTemplate], tuple[Turns, ...]]] = {
    "conversation": _conversation,
    "pair": _pair,
    "prompt": _prompt,
}


def _asked(said: Said) -> str:
    """What is asked, up to the first answer: two items that ask the same are no independent test of each other."""
    conversation = said.pair.prompt if said.pair is not None else said.conversation
    assert conversation is not None
    before: list[Any] = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        before.append([message["role"], message["content"]])
    return json.dumps(before)


def overlap(prepared: PreparedConversations) -> int:
    """Items held out whose question is among those trained on too."""
    train, held = (prepared.sides[side].asked for side in SIDES)
    return int(np.isin(held, train).sum())


def _say(prepared: PreparedConversations, want: Kind) -> None:
    report, names = prepared.report, {"conversation": "conversations", "pair": "pairs", "prompt": "prompts"}
    forms = ", ".join(f"{name} ({count:,})" for name, count in report["forms"].items())
    items, tokens, trained = (report[name] for name in ("items", "tokens", "trained_tokens"))
    share = f", of which {trained['train'] / tokens['train']:.0%} are trained" if trained["train"] else ""
    logger.info(
        "%s: %s + %s to train and validate on, %.2f M tokens%s; form: %s; template: %s",
        names[want], f"{items['train']:,}", f"{items['validation']:,}", tokens["train"] / 1e6, share, forms,
        report["template"],
    )  # fmt: skip
    if same := overlap(prepared):
        logger.warning(
            "%d of the %d held out ask what is asked in training too: their figures flatter", same, items["validation"]
        )
