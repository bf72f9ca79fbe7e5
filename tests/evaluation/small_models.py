"""A small model and tasks made up for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.evaluation.task import Answer, Generate, Generated, Item, Judged, LogLikelihood, Rolling, Scored
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, small_config

VOCAB = 300
TEXT = "the cat sat on the mat and the dog sat on the log. " * 20
WORDS = ("cat", "dog", "mat", "log")
DENSE = {"feed_forward": {"kind": "dense", "ffn_hidden_size": 24}, "leading": None}


def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], VOCAB)


def opened(kind: str = "moe", reach: int = 24, seed: int = 0, own: bool = True) -> LanguageModel:
    changes = DENSE if kind == "dense" else {}
    model = build(small_config(vocab_size=VOCAB, **changes), seed).eval()
    return LanguageModel(model, tokenizer(), Path(f"{kind}-{seed}"), own=own, reach=reach)


@dataclass(frozen=True)
class MadeUp:
    """Every kind of request, and a judge that is right as often as chance has it."""

    name: str = "madeup"
    title: str = "Made up"
    metric: str = "accuracy"
    shots: int = 0
    chance: float | None = 0.25
    count: int = 8
    words: str = "the "
    kinds: tuple[str, ...] = ("options", "text", "write")
    samples: int = 1

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        made = [self._item(number) for number in range(self.count)][:limit]
        return made, 2

    def _item(self, number: int) -> Item:
        kind = self.kinds[number % len(self.kinds)]
        context = self.words * (1 + 5 * number)
        if kind == "options":
            requests = [LogLikelihood(context.strip(), " " + word) for word in WORDS]
        elif kind == "text":
            requests = [Rolling(context + "cat sat on a log. " * number)]
        else:
            heat = 0.9 if self.samples > 1 else 0.0
            requests = [Generate(context, (".", "zz"), 6 + number, samples=self.samples, temperature=heat)]
        return Item(f"{kind}-{number}", tuple(requests), {"gold": number % 4}, kind)

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        first = answers[0]
        if isinstance(first, Generated):
            return Judged({"accuracy": float(len(first.texts[0]) % 2), "length": float(len(first.texts[0]))})
        values = [answer.logprob for answer in answers if isinstance(answer, Scored)]
        best = max(range(len(values)), key=lambda index: values[index])
        return Judged({"accuracy": float(best == item.facts["gold"]), "logprob": values[0]}, weight=1.0)

    def with_words(self, words: str) -> MadeUp:
        return replace(self, words=words)
