"""Which of a model's completions are worth learning: those that end, and those that say what they should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from finemoe.text.answers import says

Keep = Literal["all", "ended", "answer"]
"""all: whatever is not empty; ended: what ended by itself; answer: of these, what says the record's own answer."""


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
