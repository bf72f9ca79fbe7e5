"""Which of a model's completions are worth learning: those that end, and those that say what they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finemoe.data.conversations.forms import Said
from finemoe.text.answers import says

Keep = Literal["all", "ended", "answer"]
"""all: whatever is not empty; ended: what ended by itself; answer: of these, what says the record's own answer."""

_FIELDS = (
    "reference", "reference_answer", "expected_answer", "ground_truth", "gold", "target", "answer", "answers",
    "solution", "output",
)  # fmt: skip


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


def why_not(keep: Keep, text: str, ended: bool, references: Sequence[str]) -> str | None:
    """Why a completion is not kept, in words; None where it is."""
    if not text.strip():
        return "empty"
    if keep != "all" and not ended:
        return "did not end"
    if keep == "answer":
        if not references:
            return "the record has no answer to compare with"
        if not any(says(text, one) for one in references):
            return "another answer"
    return None
