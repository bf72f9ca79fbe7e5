"""Sample: a model answers prompts, what passes a check is kept, and another model learns it with the method `sft`.

This is how DeepSeek-R1's small models came about (2501.12948 section 2.4), and rejection sampling in general. Answers
are written in the order of the prompts, and a hidden file beside them says how far they are: what was interrupted goes
on where it stopped, and comes to the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.language_model import Dtype, LanguageModel, open_language_model
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.logs import logger, progress
from finemoe.data.conversations.encode import Item, encode_items
from finemoe.data.conversations.forms import NO_FORM, Said, known_forms
from finemoe.data.conversations.messages import Message
from finemoe.data.conversations.prepare import reasons
from finemoe.data.corpora import FilesCorpus
from finemoe.data.documents.document import Skipped, SkipReport
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Request, engine_for
from finemoe.generation.sequence import Sequence as Completed
from finemoe.methods.distillation.checking import Keep, reference_of, why_not
from finemoe.methods.distillation.journal import Journal
from finemoe.text.chat import ChatTemplate

_AHEAD = 64
"""[completions] Submitted at once: twice what an engine runs, so that it is never idle."""


@dataclass(frozen=True)
class Asked:
    """A prompt, as a record has it."""

    name: str
    """Of the record: file and number."""
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    ids: tuple[int, ...]
    references: tuple[str, ...]
    """What would be right."""
    repetition: int
    """How many completions of the same ids were asked for before it."""


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

    def to_dict(self) -> dict[str, Any]:
        """What `finemoe sample --json` prints."""
        return {
            "path": str(self.path),
            "prompts": self.prompts,
            "drawn": self.drawn,
            "kept": self.kept,
            "left_out": self.left_out,
            "skipped": self.skipped,
        }


def sample(
    model: str | os.PathLike[str] | LanguageModel,
    prompts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
    dtype: Dtype = "fp32",
    quiet: bool = False,
) -> Sampled:
    """Have `model` answer prompts, and write what is worth learning as conversations.

    Args:
        model: a run, a checkpoint, an imported or Hugging Face folder, a GGUF file, or what was opened of one.
        prompts: files, folders or patterns of records in any form of a conversation; their answers are left out.
        out: a .jsonl file; where it was begun with the same settings, it is gone on with.
        n: completions of each prompt.
        keep: which of them, see `Keep`.
        best_of: at most so many of each prompt, those of the highest mean log-probability of a token; None: all.
        temperature, top_k, top_p, max_new_tokens, seed: as in `SamplingConfig`.
        dtype: of the weights in memory.
        quiet: no progress on stderr.

    Raises:
        ConfigError: settings that cannot be, or other ones than `out` was begun with.
        DataError: no prompt, or no record that has an answer to compare with.
        RunError: `out` cannot be written, or somebody else is writing it.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    sampling, path = parse(SamplingConfig, given, "sample"), Path(out)
    _check(n, keep, best_of, path)
    opened = model if isinstance(model, LanguageModel) else open_language_model(model, dtype)
    paths = [prompts] if isinstance(prompts, (str, os.PathLike)) else list(prompts)
    asked, skipped = read_prompts([str(one) for one in paths], opened, n)
    if keep == "answer" and not any(one.references for one in asked):
        raise DataError(
            'keep "answer" compares with the answer of the record, and no record has one: add a field `answer`, or use '
            '"ended"'
        )
    digest = hashlib.sha256(repr(asked).encode("utf-8", "replace")).hexdigest()
    facts = {"model": fingerprint(opened.model), "prompts": digest, "n": n, "keep": keep, "best_of": best_of}
    with ExitStack() as held:
        journal = held.enter_context(Journal.open(path, {**facts, **given}))
        done = journal.prompts
        if done and not quiet:
            logger.info("%s: goes on behind the first %d of %d prompts", path, done, len(asked))
        left = (len(asked) - done) * n
        shown = nullcontext(lambda _: None) if quiet else progress("sampling", left, "completions")
        advance = held.enter_context(shown)
        for one, completions in _answered(opened, asked[done:], sampling, n, advance):
            kept, reasons = _chosen(one, completions, keep, best_of)
            lines = [_line(one, number, completions[number], opened, given) for number in kept]
            journal.add(lines, {"drawn": len(completions), "kept": len(kept), "left_out": dict(reasons)})
        return Sampled(path, len(asked), journal.drawn, journal.kept, dict(journal.left_out), skipped)


def _check(n: int, keep: str, best_of: int | None, path: Path) -> None:
    if n < 1:
        raise ConfigError(f"n: {n} completions of a prompt cannot be drawn; ask for 1 or more")
    if keep not in ("all", "ended", "answer"):
        raise ConfigError(f"keep: {keep!r} is none of all, ended, answer")
    if best_of is not None and not 0 < best_of < n:
        raise ConfigError(f"best_of: {best_of} of {n} completions leaves no choice: give 1 to {n - 1}, or raise n")
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"out: {path} must end in .jsonl, by which a corpus of records is known")


def read_prompts(paths: Sequence[str], opened: LanguageModel, n: int) -> tuple[list[Asked], dict[str, str]]:
    """The prompts in `paths`, in the order of the files; and the records that hold none.

    Raises:
        DataError: nothing that can be asked.
    """
    report, tokenizer = SkipReport(), opened.tokenizer
    template = opened.template
    if template is None:
        template = ChatTemplate.plain(tokenizer.end_of_text)
        logger.info("the model has no chat template: it is asked by the plain one, User: and Assistant:")
    asked: list[Asked] = []
    skipped: dict[str, str] = {}
    seen: Counter[tuple[int, ...]] = Counter()
    for document in FilesCorpus(paths=tuple(paths)).documents(report, whole=True):
        (found,) = encode_items([document.text], "prompt", tokenizer, template)
        if not isinstance(found, Item):
            skipped[document.name] = str(found)
            continue
        messages, tools = _question(found.said)
        references = reference_of(json.loads(document.text), found.said)
        ids = tuple(found.segments[0].ids)
        asked.append(Asked(document.name, messages, tools, ids, references, n * seen[ids]))
        seen[ids] += 1
    skipped |= {one.name: one.reason for one in report.skipped}
    why = reasons([Skipped(name, reason) for name, reason in skipped.items()])
    if not asked:
        known = f". {known_forms()}" if NO_FORM in why else ""
        raise DataError(f"{', '.join(paths)}: no record holds a prompt" + (f" ({why}){known}" if why else ""))
    if skipped:
        left = (
            "1 record holds no prompt and is" if len(skipped) == 1 else f"{len(skipped)} records hold no prompt and are"
        )
        logger.warning("%s left out; %s", left, why)
    return asked, skipped


def _question(said: Said) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """What is asked: all messages up to the last answer."""
    conversation = said.pair.prompt if said.pair is not None else said.conversation
    assert conversation is not None
    messages = list(conversation.messages)
    while messages[-1]["role"] == "assistant":
        messages.pop()
    return tuple(messages), conversation.tools


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
        request = Request(place.asked.ids, sampling, repetition=repetition, parent=parent, continues=False)
        try:
            id = engine.submit(request)
        except DataError as error:  # longer than the cache: the others can be answered all the same
            logger.warning("%s: %s", place.asked.name, error)
            place.done |= dict.fromkeys(range(n))
            return
        parent = id if parent is None else parent
        owner[id] = place, number


def _chosen(
    asked: Asked, completions: Sequence[Completed | None], keep: Keep, best_of: int | None
) -> tuple[list[int], Counter[str]]:
    """Numbers of the completions that are kept, in order, and why others are not."""
    reasons: Counter[str] = Counter()
    kept: list[int] = []
    for number, one in enumerate(completions):
        if one is None or one.text is None:
            reasons["longer than the cache"] += 1
            continue
        why = why_not(keep, one.text.text, one.finish_reason == "stop", asked.references)
        if why is None:
            kept.append(number)
        else:
            reasons[why] += 1
    if best_of is not None and len(kept) > best_of:
        reasons["others are more probable"] += len(kept) - best_of
        kept = sorted(sorted(kept, key=lambda number: -_mean(completions[number]))[:best_of])
    return kept, reasons


def _mean(one: Completed | None) -> float:
    """Log-probability of a token of it, on the mean."""
    return sum(one.logprobs) / len(one.logprobs) if one is not None else 0.0


def _line(asked: Asked, number: int, one: Completed | None, opened: LanguageModel, given: dict[str, Any]) -> str:
    """A conversation as the method `sft` reads it, and where it comes from."""
    assert one is not None
    assert one.text is not None
    record: dict[str, Any] = {"messages": [*asked.messages, {"role": "assistant", "content": one.text.text}]}
    if asked.tools:
        record["tools"] = list(asked.tools)
    record["origin"] = {
        "model": str(opened.source),
        "prompt": asked.name,
        "completion": number,
        "seed": given["seed"],
        "temperature": given["temperature"],
        "tokens": len(one.completion),
        "logprob": round(_mean(one), 4),
        "finish_reason": one.finish_reason,
    }
    return json.dumps(record, ensure_ascii=False)
