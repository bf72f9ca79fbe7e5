"""Ask a model the items of a task, and keep every answer, so that what was interrupted goes on where it stopped.

An answer is kept under a hash of everything it depends on: the weights, the tokenizer, how they are used, and the
request to the character. So a changed prompt, set or model finds nothing, and an answer that is found is the one that
would be computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.weights.shapes import parameter_shapes
from finemoe.checkpoint.weights.small import may_be_small
from finemoe.core.errors import ConfigError
from finemoe.core.files import make_folder, writing
from finemoe.core.logs import JsonLines, logger, progress, read_json_lines
from finemoe.core.reading import damage_of
from finemoe.evaluation.answering import generate
from finemoe.evaluation.task import (
    Answer,
    Generate,
    Generated,
    Item,
    Judged,
    LogLikelihood,
    Request,
    Rolling,
    Scored,
    Task,
)
from finemoe.generation.scoring import (
    Windows,
    WindowScore,
    continuation_windows,
    reach_of,
    score,
    text_windows,
)
from finemoe.model.quantised.blocks import format_of, is_quantised
from finemoe.model.transformer import Transformer
from finemoe.text.fill_in_the_middle import middle_marks

_FORMAT = 1
"""Raise it when answers to the same request change: the old ones are then no longer found."""
_FIRST = b'{"key"'
"""What a file of answers begins with, even one that was torn at its first line."""
_SCORED, _GENERATED = TypeAdapter(Scored), TypeAdapter(Generated)
_SAMPLE = 4096
"""Numbers of each tensor that go into the fingerprint as they are."""


@dataclass(frozen=True)
class Settings:
    """How items are asked."""

    batch: int = 16
    """Rows in one pass of scoring; what comes out does not depend on it."""
    limit: int | None = None
    """Items of each task; None: all."""
    shots: int | None = None
    """Worked examples; None: as many as the task has."""
    seed: int = 0
    """Of sampled completions and of the bootstrap."""


@dataclass(frozen=True)
class Asked:
    """What became of one task."""

    task: Task
    items: tuple[Item, ...]
    judged: tuple[Judged, ...]
    skipped: int
    """Records that could not be read."""
    truncated: int
    """Items of which a context was cut from the left."""
    unfinished: int
    """Completions that were cut off at the most tokens allowed."""
    prompts: str
    """A hash of every request, to the character."""
    shots: int
    """Worked examples that were wanted; an item's own facts say how many it has."""
    tokens: int
    """Read and written by the model now: what several requests share is read once, kept answers cost none."""
    seconds: float
    """From reading the data to the last verdict."""
    answering: float
    """Seconds of those in which the model worked."""
    reused: int
    """Requests whose answers were kept."""

    @property
    def outcomes(self) -> dict[str, int]:
        """How many items came to what end."""
        return dict(Counter(judged.outcome for judged in self.judged))


@dataclass
class Answers:
    """Answers by key, kept in a file where there is one."""

    path: Path | None = None
    known: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file: JsonLines | None = None
        if self.path is None:
            return
        with writing(self.path):
            make_folder(self.path.parent)
        if self.path.exists():  # before it is opened: that cuts a last line that has no end, whoever wrote it
            self.known |= _kept(self.path)
        with writing(self.path):
            self._file = JsonLines(self.path)

    def keep(self, key: str, answer: Answer, **about: Any) -> None:
        """Remember an answer; `about` is for people who read the file.

        Raises:
            RunError: the disk is full or the folder unwritable; the answers before it are kept.
        """
        self.known[key] = answer
        if self._file is not None and self.path is not None:
            with writing(self.path):
                self._file.write({"key": key, **about, "answer": asdict(answer)})

    def close(self) -> None:
        """Close the file.

        Raises:
            RunError: the disk is full.
        """
        if self._file is not None and self.path is not None:
            with writing(self.path):
                self._file.close()


def fingerprint(opened: LanguageModel) -> str:
    """A hash of the weights, the tokenizer and how they are used.

    Of each tensor: shape, type, some numbers as they are, and the sum of all bit patterns, which does not depend on the
    order of adding. Reads the weights once.
    """
    found = hashlib.sha256()
    for name, tensor in opened.model.state_dict().items():
        flat = tensor.detach().contiguous().view(-1)
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        some = bits[:: max(1, len(bits) // _SAMPLE)].cpu()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
        found.update(some.numpy().tobytes())
    how = [_FORMAT, opened.model.config.model_dump_json(), opened.own, opened.reach, opened.tokenizer.fingerprint()]
    found.update(json.dumps(how).encode())
    return found.hexdigest()


def ask(
    opened: LanguageModel,
    task: Task,
    source: Path | None,
    settings: Settings,
    answers: Answers | None = None,
    *,
    model_key: str = "",
    quiet: bool = False,
    loaded: tuple[Sequence[Item], int] | None = None,
) -> Asked:
    """Put a task's items to a model and judge what it answers.

    Args:
        opened: the model.
        task: what to ask.
        source: its data; None: the hub.
        settings: how.
        answers: kept ones, of this and other models; None keeps nothing.
        model_key: `fingerprint(opened)`, needed with `answers`.
        quiet: no progress on stderr.
        loaded: what `task.items` gave for these settings, where it was called before.

    Raises:
        ConfigError: a task that this model cannot be asked.
        DataError: no data.
    """
    started = time.monotonic()
    items, skipped = loaded or task.items(source, settings.shots, settings.limit)
    _check_ids(task, items)
    keys = [[request_key(model_key, request, settings.seed) for request in item.requests] for item in items]
    answers = answers or Answers()
    missing: dict[str, tuple[Item, Request]] = {}
    for item, own in zip(items, keys, strict=True):
        missing |= {key: (item, r) for key, r in zip(own, item.requests, strict=True) if key not in answers.known}
    total = len({key for own in keys for key in own})
    began = time.monotonic()
    tokens = _fetch(opened, missing, settings, answers, task.name, quiet)
    answering = time.monotonic() - began
    given = [[answers.known[key] for key in own] for own in keys]
    judged = []
    with _bar(f"{task.name}: judging", len(items), "items", quiet) as advance:
        for item, own_answers in zip(items, given, strict=True):
            judged.append(task.judge(item, own_answers))
            advance(1)
    return Asked(
        task,
        tuple(items),
        tuple(judged),
        skipped,
        truncated=sum(any(answer.truncated for answer in own) for own in given),
        unfinished=sum(answer.unfinished for own in given for answer in own if isinstance(answer, Generated)),
        prompts=prompts_hash(items),
        shots=task.shots if settings.shots is None else settings.shots,
        tokens=tokens,
        seconds=time.monotonic() - started,
        answering=answering,
        reused=total - len(missing),
    )


def require_middle(opened: LanguageModel, task: str, items: Sequence[Item]) -> None:
    """Say before the work begins what the model cannot be asked.

    Raises:
        ConfigError: a gap to fill, and a tokenizer without the tokens for it.
    """
    if any(isinstance(request, Generate) and request.suffix is not None for i in items for request in i.requests):
        try:
            middle_marks(opened.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{task}: {error}") from error


def _fetch(
    opened: LanguageModel,
    missing: Mapping[str, tuple[Item, Request]],
    settings: Settings,
    answers: Answers,
    task: str,
    quiet: bool,
) -> int:
    """Have the model answer what is missing, and keep it; how many tokens that took."""
    tokens = 0
    requests = {key: request for key, (_, request) in missing.items()}
    with _bar(task, len(missing), "requests", quiet) as advance:
        try:
            for settled, count in answer_all(opened, requests, settings):
                for key, answer in settled:
                    answers.keep(key, answer, task=task, item=missing[key][0].id)
                tokens += count
                advance(len(settled))
        except ConfigError as error:
            raise ConfigError(f"{task}: {error}") from error
    return tokens


def _bar(description: str, total: int, unit: str, quiet: bool) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None) if quiet else progress(description, total, unit)


def request_key(model_key: str, request: Request, seed: int) -> str:
    """The hash under which the answer to a request is kept."""
    drawn = seed if isinstance(request, Generate) and request.temperature > 0 else None
    parts = [model_key, type(request).__name__, asdict(request), drawn]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prompts_hash(items: Sequence[Item]) -> str:
    """A hash of all that is sent to the model."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps([item.id, *(request_key("", request, 0) for request in item.requests)]).encode())
    return found.hexdigest()[:16]


def answer_all(
    opened: LanguageModel, requests: Mapping[str, Request], settings: Settings
) -> Iterator[tuple[list[tuple[str, Answer]], int]]:
    """Key and answer of the requests that a pass settles, and the tokens that it read and wrote, pass by pass.

    Raises:
        ConfigError: a request that this model cannot answer.
    """
    writing = {key: request for key, request in requests.items() if isinstance(request, Generate)}
    windows = {key: _windows(opened, r) for key, r in requests.items() if not isinstance(r, Generate)}
    yield from _score(opened, windows, settings.batch)
    for key, answer, count in generate(opened, writing, settings.seed):
        yield [(key, answer)], count


def _windows(opened: LanguageModel, request: LogLikelihood | Rolling) -> Windows:
    if isinstance(request, LogLikelihood):
        return continuation_windows(opened, request.context, request.continuation)
    return text_windows(opened, request.text)


def _score(
    opened: LanguageModel, asked: Mapping[str, Windows], batch: int
) -> Iterator[tuple[list[tuple[str, Answer]], int]]:
    flat = [(key, number) for key, windows in asked.items() for number in range(len(windows.windows))]
    found: dict[str, dict[int, WindowScore]] = {key: {} for key in asked}
    yield [(key, _scored(windows, {})) for key, windows in asked.items() if not windows.windows], 0
    for settled, read in score(opened.model, [asked[key].windows[number] for key, number in flat], batch):
        done: list[tuple[str, Answer]] = []
        for index, result in settled:
            key, number = flat[index]
            found[key][number] = result
            if len(found[key]) == len(asked[key].windows):
                done.append((key, _scored(asked[key], found.pop(key))))
        yield done, read


def _scored(windows: Windows, scores: Mapping[int, WindowScore]) -> Scored:
    # In the order of the text, whatever the order of the passes: sums of floats depend on it.
    total = sum(scores[number].logprob for number in sorted(scores))
    greedy = all(result.greedy for result in scores.values())
    return Scored(float(total), windows.num_targets, greedy, windows.truncated)


def _check_ids(task: Task, items: Sequence[Item]) -> None:
    """Ids pair the items of two models; a task that repeats one is a defect of ours."""
    repeated = [id for id, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{task.name}: the id {repeated[0]!r} stands for more than one item")


def _kept(path: Path) -> dict[str, Answer]:
    """The answers in a file; a line that is damaged is left out, so that its question is asked again.

    Raises:
        RunError: the file holds something else.
    """
    damaged: list[int] = []
    with damage_of(path, "name another folder, or remove it"):
        with open(path, "rb") as file:
            start = file.read(len(_FIRST))
        if not _FIRST.startswith(start):
            raise ValueError(f"it is no file of kept answers, for it begins with {start.decode('utf-8', 'replace')!r}")
        records = read_json_lines(path, _from_record, damaged.append)
        known = dict(map(_from_record, records))
        if damaged and not known:
            raise ValueError("it is no file of kept answers, for no line of it holds one")
    if damaged:
        logger.warning("%s: %d damaged lines are left out, and asked again", path, len(damaged))
    return known


def _from_record(record: Mapping[str, Any]) -> tuple[str, Answer]:
    """A kept answer and its key.

    Raises:
        ValueError: it is none.
    """
    key, kept = record.get("key"), record.get("answer")
    if not isinstance(key, str) or not isinstance(kept, dict):
        raise ValueError("a line has a key and an answer")
    reader: TypeAdapter[Any] = _SCORED if "logprob" in kept else _GENERATED
    try:
        return key, reader.validate_python(kept)
    except ValidationError as error:
        raise ValueError("an answer has other fields") from error


def describe_model(opened: LanguageModel, key: str) -> dict[str, Any]:
    """What a result says of the model it is about."""
    from finemoe.generation.steady import steady

    weight = opened.model.head_weight
    return {
        "path": str(opened.source),
        "fingerprint": key[:16],
        "parameters": sum(map(math.prod, parameter_shapes(opened.model.config).values())),
        "dtype": _stored_as(opened.model),
        "device": weight.device.type,
        "reach": reach_of(opened),
        "first_token": opened.first_id,
        "batch_invariant": steady(opened.model),
    }


def _stored_as(model: Transformer) -> str:
    """What the large products are: float32, Q8_0 ..., or mixed; words in and out, which may be wider, set aside."""
    kinds = {
        format_of(one).name if is_quantised(one) else str(one.dtype).removeprefix("torch.")
        for name, one in model.state_dict().items()
        if may_be_small(name) and not name.startswith(("embedding.", "head."))
    }
    return kinds.pop() if len(kinds) == 1 else "mixed"
