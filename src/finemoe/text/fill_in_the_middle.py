"""Fill-in-the-middle tokens: how tokenizers mark the gap that a model is to fill, and which ids those marks have."""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.core.errors import ConfigError
from finemoe.text.tokenizer import Tokenizer

SPELLINGS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
"""How tokenizers call what stands before the prefix, before the suffix, and before the middle."""


@dataclass(frozen=True)
class MiddleMarks:
    """Ids of the three marks. A prompt reads: begin, prefix, hole, suffix, end; the middle is written after it."""

    begin: int
    hole: int
    end: int


def middle_marks(tokenizer: Tokenizer) -> MiddleMarks:
    """The marks of `tokenizer`.

    Raises:
        ConfigError: it has none of the known ones.
    """
    for names in SPELLINGS:
        marks = [mark for name in names if (mark := tokenizer.id_of(name)) is not None]
        if len(marks) == len(names):
            return MiddleMarks(*marks)
    raise ConfigError(
        "the model's tokenizer has no fill-in-the-middle tokens "
        f"(such as {SPELLINGS[0][0]} or {SPELLINGS[1][0]}), so it was never taught to infill: "
        "leave such tasks out"
    )
