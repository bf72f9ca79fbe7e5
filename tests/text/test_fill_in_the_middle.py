"""The marks of fill-in-the-middle prompts, by the names that published tokenizers have for them."""

from __future__ import annotations

import json

import pytest

from finemoe.core.errors import ConfigError
from finemoe.text.fill_in_the_middle import MiddleMarks, middle_marks
from finemoe.text.tokenizer import Tokenizer

PLAIN = Tokenizer.train(["def main():\n    return 1\n"] * 5, vocab_size=290)
FIRST = PLAIN.vocab_size


def with_marks(*names: str) -> Tokenizer:
    """`PLAIN` with these as further special tokens, after the others."""
    content = json.loads(PLAIN.to_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": FIRST + at, "content": name, **flags} for at, name in enumerate(names)]
    return Tokenizer.parse(json.dumps(content), "test")


@pytest.mark.parametrize(
    "names",
    [
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ],
)
def test_every_known_spelling_is_found_by_its_part(names: tuple[str, str, str]) -> None:
    assert middle_marks(with_marks(*names)) == MiddleMarks(FIRST, FIRST + 1, FIRST + 2)
    assert middle_marks(with_marks(*reversed(names))) == MiddleMarks(FIRST + 2, FIRST + 1, FIRST)


@pytest.mark.parametrize("names", [(), ("<fim_prefix>", "<fim_suffix>"), ("<fim_prefix>", "<|fim_suffix|>")])
def test_a_tokenizer_without_all_three_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no fill-in-the-middle tokens"):
        middle_marks(with_marks(*names))
