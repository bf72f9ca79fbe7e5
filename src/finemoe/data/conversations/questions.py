"""Records as questions: what is asked, as messages and as tokens, and what would be right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finemoe.core.errors import DataError
from finemoe.data.conversations.encode import Item, encode_items
from finemoe.data.conversations.forms import Said
from finemoe.data.conversations.messages import FormError, Message
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
    """What a model reads."""
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
    found: list[Question | FormError | DataError] = []
    for text, item in zip(texts, encode_items(texts, "prompt", tokenizer, template), strict=True):
        if not isinstance(item, Item):
            found.append(item)
            continue
        record, asked = json.loads(text), item.said.question
        ids = tuple(item.segments[0].ids)
        if wording is not None:
            ids = tuple(tokenizer.encode_prompt(wording.replace("{prompt}", asked.messages[-1]["content"])))
        found.append(Question(record, asked.messages, asked.tools, ids, reference_of(record, item.said)))
    return found


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
