"""Records as questions: what is asked, as messages and as tokens, and what would be right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finemoe.core.errors import DataError
from finemoe.data.conversations.encode import NOTHING_ASKED, Item, encode_items, record_in
from finemoe.data.conversations.forms import Said, read
from finemoe.data.conversations.messages import FormError, Message
from finemoe.data.conversations.wording import put
from finemoe.text.chat import ChatTemplate
from finemoe.text.tokenizer import Tokenizer

_FIELDS = (
    "reference", "reference_answer", "expected_answer", "ground_truth", "gold", "target", "answer", "answers",
    "solution", "output",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What a record asks."""

    record: Mapping[str, Any] = field(repr=False)
    """As it is."""
    messages: tuple[Message, ...]
    """Up to its last answer."""
    tools: tuple[dict[str, Any], ...]
    ids: tuple[int, ...]
    """What a model reads; of a question that was put to none, nothing."""
    references: tuple[str, ...]
    """What would be right; any of them."""

    @property
    def text(self) -> str:
        """The last that is said to the model."""
        return self.messages[-1]["content"]


def encode_questions(
    texts: Sequence[str], tokenizer: Tokenizer, template: ChatTemplate, wording: str | None = None
) -> list[Question | FormError | DataError]:
    """What records ask, each the JSON of an object; an error stands in the place of each that asks nothing.

    `wording`: how the last message is put to a model that knows no chat, with {prompt} in it; None: by `template`.
    """
    if wording is not None:
        return [_worded(text, tokenizer, wording) for text in texts]
    return [
        _question(json.loads(text), item.said, item.segments[0].ids) if isinstance(item, Item) else item
        for text, item in zip(texts, encode_items(texts, "prompt", tokenizer, template), strict=True)
    ]


def question_in(text: str) -> Question:
    """What a record asks, before anybody reads it: without ids.

    Raises:
        FormError: it asks nothing, or is no record.
    """
    record = record_in(text)
    said = read(record)
    if not said.question.messages:
        raise FormError(NOTHING_ASKED)
    return _question(record, said, ())


def worded(question: Question, tokenizer: Tokenizer, wording: str) -> Question:
    """It, with the ids that a model reads which knows no chat: those of its last message in `wording`."""
    return replace(question, ids=tuple(tokenizer.encode_prompt(put(wording, question.text))))


def _worded(text: str, tokenizer: Tokenizer, wording: str) -> Question | FormError:
    """A record without any template, which a model that knows no chat does not have."""
    try:
        return worded(question_in(text), tokenizer, wording)
    except FormError as error:
        return error


def _question(record: Mapping[str, Any], said: Said, ids: Sequence[int]) -> Question:
    asked = said.question
    return Question(record, asked.messages, asked.tools, tuple(ids), reference_of(record, said))


def reference_of(record: Mapping[str, Any], said: Said) -> tuple[str, ...]:
    """What a record holds to be right, in a field of its own or as its last answer; several where any of them is."""
    for name in _FIELDS:
        value = record.get(name)
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        found = tuple(str(one).strip() for one in values if isinstance(one, (str, int, float)) and str(one).strip())
        if found:
            return found
    last = said.pair.chosen[-1] if said.pair is not None else None
    if said.conversation is not None and said.conversation.messages[-1]["role"] == "assistant":
        last = said.conversation.messages[-1]
    return (last["content"].strip(),) if last is not None and last["content"].strip() else ()
