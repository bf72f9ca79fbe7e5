"""Sample: a model answers prompts, what passes a check is kept, and another model learns it with the method `sft`.

This is how DeepSeek-R1's small models came about (2501.12948 section 2.4). Answers are written in the order of the
prompts, and a hidden file beside them says how far they are: what was interrupted goes on where it stopped, and comes
to the same answers. (An engine rounds by what runs beside a request: once in some thousand lines the last digit of a
`logprob` is another.) `rejection.py` draws in the same way, and keeps by rewards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.language_model import LanguageModel, Weights, open_language_model
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.logs import logger, progress
from finemoe.data.conversations.forms import NO_FORM, known_forms
from finemoe.data.conversations.prepare import reasons
from finemoe.data.conversations.questions import Question, encode_questions
from finemoe.data.conversations.wording import put
from finemoe.data.corpora import CorpusConfig, FilesCorpus, read_corpus
from finemoe.data.documents.document import Document, Skipped, SkipReport
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Request, engine_for
from finemoe.generation.sequence import Sequence as Completed
from finemoe.methods.distillation.checking import Keep, why_not
from finemoe.methods.distillation.journal import Journal
from finemoe.text.chat import ChatTemplate

TOO_LONG = "longer than the cache"
"""Why a completion is left out that could not be drawn."""
Prompts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | CorpusConfig
_HELD_OUT = 0.05  # of a corpus that holds nothing out by itself, as of [data]
_AHEAD = 64
"""[completions] Submitted at once: twice what an engine runs, so that it is never idle."""


@dataclass(frozen=True)
class Asked:
    """A prompt, as a record has it."""

    name: str
    """Of the record: file and number."""
    question: Question
    repetition: int
    """How many completions of the same ids were asked for before it."""


@dataclass(frozen=True)
class Choice:
    """Which completions of a prompt are kept, and why others are not."""

    kept: Mapping[int, Mapping[str, Any]]
    """By number, in order, with what is said of each beside where it comes from."""
    left_out: Counter[str]
    verdicts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of completions that rewards judged: how many got which, by reward."""


class Choose(Protocol):
    """What decides which completions are kept."""

    def recall(self, lines: Iterable[str]) -> None:
        """What was kept before it was interrupted: told once, before the first choice."""
        ...

    def __call__(self, asked: Asked, completions: Sequence[Completed | None]) -> Choice:
        """Of the completions of one prompt; None stands for one that there was no room for."""
        ...


@dataclass(frozen=True)
class Sampled:
    """What came of it, counted over all that the file holds."""

    path: Path
    prompts: int
    drawn: int
    kept: int
    left_out: dict[str, int]
    """Completions by the reason."""
    skipped: dict[str, str]
    """Records that hold no prompt, by name, and why."""
    verdicts: dict[str, dict[str, int]] = field(default_factory=dict)
    """How many completions got which verdict, by reward; of those that were judged."""

    def to_dict(self) -> dict[str, Any]:
        """What `finemoe sample --json` prints."""
        return {
            "path": str(self.path),
            "prompts": self.prompts,
            "drawn": self.drawn,
            "kept": self.kept,
            "left_out": self.left_out,
            "skipped": self.skipped,
            **({"verdicts": self.verdicts} if self.verdicts else {}),
        }


def sample(
    model: str | os.PathLike[str] | LanguageModel,
    prompts: Prompts,
    out: str | os.PathLike[str],
    *,
    n: int = 1,
    keep: Keep = "all",
    best_of: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 512,
    seed: int = 0,
    weights: Weights = "auto",
    quiet: bool = False,
) -> Sampled:
    """Have `model` answer prompts, and write what is worth learning as conversations.

    Args:
        model: a run, a checkpoint, an imported or Hugging Face folder, a GGUF file, or what was opened of one.
        prompts: files, folders or patterns of records in any form of a conversation, or a corpus whose records to
            train on are asked; their answers are left out.
        out: a .jsonl file; where it was begun with the same settings, it is gone on with.
        n: completions of each prompt.
        keep: which of them, see `Keep`.
        best_of: at most so many of each prompt, those of the highest mean log-probability of a token; None: all.
        temperature, top_k, top_p, max_new_tokens, seed: as in `SamplingConfig`.
        weights: what they are in memory.
        quiet: no progress on stderr.

    Raises:
        ConfigError: settings that cannot be, or other ones than `out` was begun with.
        DataError: no prompt, or no record that has an answer to compare with.
        RunError: `out` cannot be written, or somebody else is writing it.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    if keep not in ("all", "ended", "answer"):
        raise ConfigError(f"keep: {keep!r} is none of all, ended, answer")
    drawing = Drawing.of(model, prompts, out, n=n, best_of=best_of, given=given, weights=weights)
    if keep == "answer" and not any(one.question.references for one in drawing.asked):
        raise DataError(
            'keep "answer" compares with the answer of the record, and no record has one: add a field `answer`, or use '
            '"ended"'
        )
    return drawing.write(ByCheck(keep, best_of), {"keep": keep, "best_of": best_of}, quiet=quiet)


@final
@dataclass(frozen=True)
class Drawing:
    """Completions that are to be drawn, and the file for those that are kept."""

    opened: LanguageModel
    asked: Sequence[Asked]
    skipped: Mapping[str, str]
    path: Path
    n: int
    given: Mapping[str, Any]
    """How they are drawn, by the names that the caller has for it."""
    sampling: SamplingConfig
    wording: str | None = None
    """How prompts are put to a model that knows no chat."""

    @staticmethod
    def of(
        model: str | os.PathLike[str] | LanguageModel,
        prompts: Prompts,
        out: str | os.PathLike[str],
        *,
        n: int,
        best_of: int | None,
        given: Mapping[str, Any],
        weights: Weights,
        wording: str | None = None,
    ) -> Drawing:
        """Check the settings, then open the model and read the prompts: as of `sample`.

        Raises:
            ConfigError: settings that cannot be.
            DataError: no prompt.
        """
        sampling, path = parse(SamplingConfig, given, "sample"), Path(out)
        _check(n, best_of, path)
        opened = model if isinstance(model, LanguageModel) else open_language_model(model, weights)
        asked, skipped = read_prompts(prompts, opened, n, wording)
        return Drawing(opened, asked, skipped, path, n, given, sampling, wording)

    def write(self, choose: Choose, facts: Mapping[str, Any], *, quiet: bool) -> Sampled:
        """Draw, choose and write, from the beginning or from where it was interrupted.

        Args:
            choose: what decides.
            facts: JSON-able, what the choice follows from: with others, nothing is gone on with.
            quiet: no progress on stderr.

        Raises:
            ConfigError: the file was begun otherwise.
            RunError: it cannot be written, or somebody else is writing it.
        """
        digest = hashlib.sha256(repr(self.asked).encode("utf-8", "replace")).hexdigest()
        own = {"model": fingerprint(self.opened.model), "prompts": digest, "n": self.n}
        with ExitStack() as held:
            journal = held.enter_context(Journal.open(self.path, {**own, **facts, **self.given}))
            done = journal.prompts
            if done and not quiet:
                logger.info("%s: goes on behind the first %d of %d prompts", self.path, done, len(self.asked))
            if done:
                choose.recall(held.enter_context(self.path.open(encoding="utf-8")))
            left = self.asked[done:]
            shown = nullcontext(lambda _: None) if quiet else progress("sampling", len(left) * self.n, "completions")
            advance = held.enter_context(shown)
            for one, completions in _answered(self.opened, left, self.sampling, self.n, advance):
                choice = choose(one, completions)
                lines = [self._line(one, number, completions[number], more) for number, more in choice.kept.items()]
                counts = {"drawn": len(completions), "kept": len(lines), "left_out": dict(choice.left_out)}
                journal.add(lines, {**counts, "verdicts": choice.verdicts} if choice.verdicts else counts)
            found = journal.drawn, journal.kept, dict(journal.left_out)
            verdicts = {name: dict(counts) for name, counts in journal.verdicts.items()}
            return Sampled(self.path, len(self.asked), *found, dict(self.skipped), verdicts)

    def _line(self, asked: Asked, number: int, one: Completed | None, more: Mapping[str, Any]) -> str:
        """A conversation as the method `sft` reads it, and where it comes from; of a model that knows no chat also the
        text that prompt and completion are together, which a base model reads."""
        assert one is not None
        assert one.text is not None
        question = asked.question
        record: dict[str, Any] = {"messages": [*question.messages, {"role": "assistant", "content": one.text.text}]}
        if self.wording is not None:
            record["text"] = put(self.wording, question.text) + one.text.text
        if question.tools:
            record["tools"] = list(question.tools)
        record["origin"] = {
            "model": str(self.opened.source),
            "prompt": asked.name,
            "completion": number,
            "seed": self.given["seed"],
            "temperature": self.given["temperature"],
            "tokens": len(one.completion),
            **more,
            "finish_reason": one.finish_reason,
        }
        return json.dumps(record, ensure_ascii=False)


@final
@dataclass(frozen=True)
class ByCheck:
    """Keeps what passes a check; of that, the most probable."""

    keep: Keep
    best_of: int | None

    def recall(self, lines: Iterable[str]) -> None:
        """Nothing: a prompt knows nothing of the others."""

    def __call__(self, asked: Asked, completions: Sequence[Completed | None]) -> Choice:
        """As in `Choose`."""
        reasons: Counter[str] = Counter()
        kept: list[int] = []
        for number, one in enumerate(completions):
            if one is None or one.text is None:
                reasons[TOO_LONG] += 1
                continue
            why = why_not(self.keep, one.text.text, one.finish_reason == "stop", asked.question.references)
            if why is None:
                kept.append(number)
            else:
                reasons[why] += 1
        if self.best_of is not None and len(kept) > self.best_of:
            reasons["others are more probable"] += len(kept) - self.best_of
            kept = sorted(sorted(kept, key=lambda number: -_mean(completions[number]))[: self.best_of])
        return Choice({number: {"logprob": round(_mean(completions[number]), 4)} for number in kept}, reasons)


def _check(n: int, best_of: int | None, path: Path) -> None:
    if n < 1:
        raise ConfigError(f"n: {n} completions of a prompt cannot be drawn; ask for 1 or more")
    if best_of is not None and not 0 < best_of < n:
        raise ConfigError(f"best_of: {best_of} of {n} completions leaves no choice: give 1 to {n - 1}, or raise n")
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"out: {path} must end in .jsonl, by which a corpus of records is known")


def read_prompts(
    prompts: Prompts, opened: LanguageModel, n: int, wording: str | None = None
) -> tuple[list[Asked], dict[str, str]]:
    """The prompts, in the order of the files; and the records that hold none.

    `wording`: as of `encode_questions`.

    Raises:
        DataError: nothing that can be asked.
    """
    report, tokenizer = SkipReport(), opened.tokenizer
    template = opened.template
    if template is None:
        template = ChatTemplate.plain(tokenizer.end_of_text)
        if wording is None:
            logger.info("the model has no chat template: it is asked by the plain one, User: and Assistant:")
    asked: list[Asked] = []
    skipped: dict[str, str] = {}
    seen: Counter[tuple[int, ...]] = Counter()
    where, documents = _documents(prompts, report)
    for document in documents:
        (found,) = encode_questions([document.text], tokenizer, template, wording)
        if not isinstance(found, Question):
            skipped[document.name] = str(found)
            continue
        asked.append(Asked(document.name, found, n * seen[found.ids]))
        seen[found.ids] += 1
    skipped |= {one.name: one.reason for one in report.skipped}
    why = reasons([Skipped(name, reason) for name, reason in skipped.items()])
    if not asked:
        known = f". {known_forms()}" if NO_FORM in why else ""
        raise DataError(f"{where}: no record holds a prompt" + (f" ({why}){known}" if why else ""))
    if skipped:
        left = (
            "1 record holds no prompt and is" if len(skipped) == 1 else f"{len(skipped)} records hold no prompt and are"
        )
        logger.warning("%s left out; %s", left, why)
    return asked, skipped


def _documents(prompts: Prompts, report: SkipReport) -> tuple[str, Iterator[Document]]:
    """Records whole, and what errors call them."""
    if not isinstance(prompts, (str, os.PathLike, Sequence)):
        found = (one.document for one in read_corpus(prompts, _HELD_OUT, report, whole=True) if one.side == "train")
        return f"corpus of kind {prompts.kind}", found
    paths = [prompts] if isinstance(prompts, (str, os.PathLike)) else list(prompts)
    names = tuple(str(one) for one in paths)
    return ", ".join(names), FilesCorpus(paths=names).documents(report, whole=True)


@final
@dataclass
class _Waiting:
    """A prompt whose completions are being drawn."""

    asked: Asked
    done: dict[int, Completed | None] = field(default_factory=dict)
    """By number; None: there was no room for it."""


def _answered(
    opened: LanguageModel, asked: Sequence[Asked], sampling: SamplingConfig, n: int, advance: Callable[[int], None]
) -> Iterator[tuple[Asked, list[Completed | None]]]:
    """All completions of each prompt, in the order of the prompts."""
    engine, coming = engine_for(opened), iter(asked)
    waiting: deque[_Waiting] = deque()
    owner: dict[int, tuple[_Waiting, int]] = {}
    ended = False
    while not ended or waiting:
        while not ended and len(owner) < _AHEAD:
            one = next(coming, None)
            if one is None:
                ended = True
                break
            waiting.append(_Waiting(one))
            _submit(engine, waiting[-1], sampling, n, owner)
        for event in engine.step():
            if event.finish_reason is not None:
                place, number = owner.pop(event.sequence.id)
                place.done[number] = event.sequence
                advance(1)
        while waiting and len(waiting[0].done) == n:
            first = waiting.popleft()
            yield first.asked, [first.done[number] for number in range(n)]


def _submit(
    engine: Engine, place: _Waiting, sampling: SamplingConfig, n: int, owner: dict[int, tuple[_Waiting, int]]
) -> None:
    """All completions of one prompt, which is read once for them."""
    parent = None
    for number in range(n):
        repetition = place.asked.repetition + number
        request = Request(place.asked.question.ids, sampling, repetition=repetition, parent=parent, continues=False)
        try:
            id = engine.submit(request)
        except DataError as error:  # longer than the cache: the others can be answered all the same
            logger.warning("%s: %s", place.asked.name, error)
            place.done |= dict.fromkeys(range(n))
            return
        parent = id if parent is None else parent
        owner[id] = place, number


def _mean(one: Completed | None) -> float:
    """Log-probability of a token of it, on the mean."""
    return sum(one.logprobs) / len(one.logprobs) if one is not None else 0.0
