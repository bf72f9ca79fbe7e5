"""How well text is predicted: bits per byte of any text, and the last word of LAMBADA's passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.data.corpora import FilesCorpus
from finemoe.data.documents.document import SkipReport
from finemoe.evaluation.forms.finding import TEST, DataForm, Hub
from finemoe.evaluation.forms.questions import Question, QuestionReader, spread
from finemoe.evaluation.records import Record, Unreadable, text_of
from finemoe.evaluation.task import Answer, Item, Judged, LogLikelihood, Rolling, Scored

_NOT_FINITE = Judged({}, "error", note="a log probability is missing or not finite")


@dataclass(frozen=True)
class TextTask:
    """Bits per byte of the documents at a path: fewer are better. Independent of the tokenizer."""

    name: str = "text"
    title: str = "Text"
    metric: str = "bits_per_byte"
    shots: int = 0
    chance: float | None = None
    reading: tuple[tuple[str, str], ...] = ()
    """`text_field`, `template` and `encoding` of the files, where they are not the usual ones."""

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        """A document an item, whole; its group is the domain (a folder's or file's name).

        With a `limit` a folder is still read to its end, as every domain has its share; a file is one domain.
        """
        if source is None:
            raise DataError(f"{self.name} needs a text: name a file or folder of yours by --data {self.name}=PATH")
        if shots:
            raise ConfigError(f"{self.name}: shots is {shots}, but a text has no worked examples: leave it out")
        if limit is not None and limit < 1:
            raise ConfigError(f"{self.name}: limit is {limit}: 1 or more")
        report = SkipReport()
        files = {"paths": [str(source)], **dict(self.reading)}
        documents = parse(FilesCorpus, files, f"{self.name} {source}").documents(report)
        written = (document for document in documents if document.text)
        wanted = spread(islice(written, limit if source.is_file() else None), lambda one: one.domain, limit)
        items = [
            Item(document.name, (Rolling(document.text),), {"bytes": len(document.text.encode())}, document.domain)
            for document in wanted
        ]
        report.kept = len(items)
        report.check(1.0)  # says what is no text; what could not be read is counted and judged here
        if report.lacking.records > len(items):
            advice = report.lacking.advice(len(items) + report.num_skipped, recipe=False)
            raise DataError(f"{source}: is it the right folder or file? {advice}")
        if not items:
            raise DataError(f"{source}: no text there ({report.num_skipped} files and records were skipped)")
        if report.num_skipped > len(items) and limit is None:
            raise DataError(
                f"{source}: {report.num_skipped} files and records have no text that can be read, {len(items)} have: "
                "is it the right folder? Name the file or folder that holds the texts"
            )
        return items, report.num_skipped

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """Weighed by bytes, so that the mean over documents is that of their concatenation."""
        scored = _scored(answers)
        if scored is None:
            return _NOT_FINITE
        size = item.facts["bytes"]
        scores = {"bits_per_byte": -scored.logprob / math.log(2) / size}
        return Judged(scores, weight=float(size))


@dataclass(frozen=True)
class LastWordTask:
    """LAMBADA: is the last word of the passage the most probable one?"""

    name: str
    title: str
    reader: QuestionReader
    metric: str = "accuracy"
    shots: int = 0
    chance: float | None = None

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        """A passage an item: its last word after the rest."""
        if shots:
            raise ConfigError(f"{self.name}: shots is {shots}, but a passage has no worked examples: leave it out")
        found, skipped = self.reader.questions(self.name, source, 0, limit)
        return [Item(q.id, (LogLikelihood(q.prompt, q.facts["word"]),)) for q, _ in found], skipped

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """`loss` is that of the word in nats; exp of its mean over the passages is the perplexity."""
        scored = _scored(answers)
        if scored is None:
            return _NOT_FINITE
        return Judged({"accuracy": float(scored.greedy), "loss": -scored.logprob})


def _scored(answers: Sequence[Answer]) -> Scored | None:
    """The one answer, if it is a finite one."""
    answer = answers[0] if len(answers) == 1 else None
    return answer if isinstance(answer, Scored) and math.isfinite(answer.logprob) else None


def _last_word(record: Record) -> Question:
    """What follows the last blank is the word; a blank leads it."""
    if "continuation" in record.value:
        context, word = text_of(record, "context"), " " + text_of(record, "continuation").removeprefix(" ")
    else:
        text = text_of(record, "text")
        context, blank, last = text.rpartition(" ")
        if not blank or not last:
            raise Unreadable("a passage of one word, or one that ends in a blank")
        word = " " + last
    return Question(record.name, context, context + word, facts={"word": word})


_LAMBADA = DataForm(
    (r"lambada",),
    (*TEST, "validation", "dev"),
    (),
    "JSON Lines {text}, {context, continuation}, rows of the hub",
    Hub("EleutherAI/lambada_openai", "default", "test"),
)

LANGUAGE: tuple[TextTask | LastWordTask, ...] = (
    TextTask(),
    LastWordTask("lambada", "LAMBADA", QuestionReader(_LAMBADA, _last_word)),
)
