"""A first recipe for somebody's own files: every choice follows from what was measured, and says why."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finemoe.charts.numbers import count, duration
from finemoe.core import memory
from finemoe.core.environment import usable_cores
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.logs import logger
from finemoe.data.survey import Survey, survey
from finemoe.model.config import expand
from finemoe.model.presets import PRESETS, resolve
from finemoe.model.size import ModelSize, measure
from finemoe.runs.config import DEFAULT_LEARNING_RATE, resolve_run
from finemoe.runs.planning.check import Check, check
from finemoe.text import Tokenizer

CANDIDATES = ("tiny-lite", "mini-lite", "small-lite")
"""Presets to choose from, the smallest first; transformers and llama.cpp run what becomes of them."""

_LEAST_BYTES = 2_000
_USUALLY_SKIPPED = 0.01  # as much goes without a word in the recipe
_VOCABULARIES = ((30e3, 320), (300e3, 512), (2e6, 1024), (50e6, 2048), (500e6, 4096), (float("inf"), 8192))
"""Up to so many bytes of text, so large a vocabulary."""
_PASSES = 4  # Muennighoff et al. (2305.16264): up to four readings of a text are worth nearly as much as new text
_TOKENS_A_PARAMETER = 20  # Hoffmann et al. (2203.15556)
_MINUTES, _MOST_MINUTES = 30, 60
_STEPS, _LEAST_STEPS = 500, 200
_MEASURED_STEPS = 4
_LEAST_TOKENS_A_STEP, _MOST_TOKENS_A_STEP = 256, 8192
_RATE_EXPONENT = 0.437  # from 0.004 at a hidden size of 64 to the papers' 1.08e-3 at 1280


@dataclass(frozen=True)
class Choice:
    """A key of the recipe with its value and the reason."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Starter:
    """A recipe that trains as it stands."""

    choices: tuple[Choice, ...]
    survey: Survey = field(repr=False)

    @cached_property
    def text(self) -> str:
        """The recipe in TOML, a comment above each choice."""
        return "\n".join(_written(self.choices, self.survey)) + "\n"

    @property
    def tables(self) -> dict[str, Any]:
        """The same as a mapping, which `finemoe.train` takes."""
        return tomllib.loads(self.text)

    def save(self, path: str | Path) -> None:
        """Write it to a new file.

        Raises:
            ConfigError: there is something of that name; it stays as it is.
        """
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(self.text)
        except FileExistsError:
            raise ConfigError(f"{path} is there already and stays as it is; choose another name") from None

    def __str__(self) -> str:
        """The recipe."""
        return self.text


def new_recipe(paths: str | Path | Sequence[str | Path], *, quiet: bool = False) -> Starter:
    """A commented recipe for texts of one's own. Nothing is asked: files and machine are looked at and measured.

    Args:
        paths: files, folders or globs.
        quiet: show no progress.

    Raises:
        DataError: nothing there is text, or too little of it.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise DataError("no file was given: name files, folders or globs that hold your text")
    found = survey([str(path) for path in given], quiet)
    if found.text_bytes < _LEAST_BYTES:
        raise DataError(
            f"{', '.join(map(str, given))}: {found.text_bytes} bytes of text are too little to learn anything from; "
            f"{_LEAST_BYTES:,} are the least, and a million is where it becomes interesting"
        )
    starter = Starter(tuple(_choices(found, quiet)), found)
    resolve_run({"name": "starter", **starter.tables}, "the recipe that was made")  # never hand out what is refused
    return starter


def _choices(found: Survey, quiet: bool) -> Iterator[Choice]:
    vocabulary = next(size for most, size in _VOCABULARIES if found.text_bytes <= most)
    tokenizer = Tokenizer.train(found.sample, vocabulary)
    vocabulary = min(vocabulary, tokenizer.vocab_size)  # little text has fewer different pieces than wanted
    pieces = found.sample[:: max(1, len(found.sample) // 200)]
    bytes_per_token = sum(len(p.encode()) for p in pieces) / sum(len(tokenizer.encode(p)) for p in pieces)
    tokens = int(found.text_bytes / bytes_per_token)
    length, length_reason = _length(found, tokens, bytes_per_token)
    share = min(0.5, max(0.05, 2.5 * length / tokens))
    training = int(tokens * (1 - share))
    plan = _Plan(found, vocabulary, length, training)
    first = plan.measured(CANDIDATES[0], quiet)
    preset, preset_reason = plan.preset(first)
    last = first if preset == CANDIDATES[0] else plan.measured(preset, quiet)
    documents = "One document" if found.documents == 1 else f"{found.documents:,} documents"
    yield Choice("name", _name(found.paths[0]), "What the run is called; its folder is runs/NAME-DATE.")
    yield Choice("model.preset", preset, preset_reason)
    yield Choice(
        "model.vocab_size",
        vocabulary,
        f"Ids of the tokenizer that is trained on your text: a token then stands for {bytes_per_token:.2f} bytes "
        f"and occurs {count(tokens / vocabulary)} times on average"
        + ("; fewer would be better, but single bytes alone take 257." if tokens < 50 * vocabulary else "."),
    )
    yield Choice("data.sequence_length", length, length_reason)
    yield Choice(
        "data.validation_share",
        round(share, 3),
        "This share of the text is held out and never trained on: the loss on it says what was learned.",
    )
    yield Choice("data.corpus.kind", "files", f"{documents}, {_bytes(found.text_bytes)} of text.")
    yield Choice("data.corpus.paths", list(found.paths), "Relative to the folder that you start `finemoe` in.")
    if found.text_field is not None:
        yield Choice("data.corpus.text_field", found.text_field, _field_reason(found))
    if found.skipped > _USUALLY_SKIPPED * (found.documents + found.duplicates + found.skipped):
        yield _tolerance(found)
    yield from plan.training_choices(last)
    hidden = PRESETS[preset].model["hidden_size"]
    rate = float(f"{DEFAULT_LEARNING_RATE * (64 / hidden) ** _RATE_EXPONENT:.2g}")
    yield Choice(
        "optimizer.learning_rate",
        rate,
        f"Peak of the schedule, for a hidden size of {hidden}: 0.004 was best at 64, and larger models want less.",
    )


def _field_reason(found: Survey) -> str:
    """Why this field, and how to have the others that hold text: a question is worth little without its answer."""
    said = "The field that holds most of the text in your records."
    plain = [name for name in found.texts if not set(name) & set("{}")]
    if len(found.texts) < 2 or len(plain) != len(found.texts):
        return said
    joined = json.dumps("\n".join(f"{{{name}}}" for name in plain), ensure_ascii=False)
    others = " and ".join(name for name in plain if name != found.text_field)
    return f"{said} To train on {others} as well, write\ntemplate = {joined}\nin place of this line."


def _length(found: Survey, tokens: int, bytes_per_token: float) -> tuple[int, str]:
    """Sequence length and why: as long as most documents, within what little text and a small machine allow."""
    long = found.long_bytes / bytes_per_token
    wanted = next((size for size in (32, 64, 128, 256, 512) if size >= long), 512)
    room = max(32, 2 ** max(5, int(tokens / 200).bit_length() - 1))  # two hundred sequences to learn from
    length = min(wanted, room, 256 if tokens < 5_000_000 else 512)
    if length < wanted and length == room:
        why = "longer sequences would leave too few of them, as there is little text"
    elif long <= length:
        why = f"nine of ten documents are shorter than {int(long) + 1} tokens"
    else:
        half = count(found.median_bytes / bytes_per_token)
        why = f"documents are longer (half of them above {half} tokens), and are cut"
        if found.documents == 1:
            why = f"the document is longer ({half} tokens), and is cut"
    return length, f"Tokens of a sequence, how far the model looks back: {why}."


@dataclass(frozen=True)
class _Plan:
    """What the choices of the model and of its training depend on."""

    found: Survey
    vocabulary: int
    length: int
    tokens: int
    """To train on, once."""

    def size(self, preset: str) -> ModelSize:
        """Parameters and FLOPs of a preset with this vocabulary."""
        return measure(expand(resolve({"preset": preset, "vocab_size": self.vocabulary}, preset)), self.length)

    def measured(self, preset: str, quiet: bool) -> Check:
        """A few steps of it on the sample, in a cache of their own."""
        with tempfile.TemporaryDirectory(prefix="finemoe-") as folder:
            names = {side: str(Path(folder) / f"{side}.jsonl") for side in ("train", "validation")}
            pieces = list(dict.fromkeys(self.found.sample))
            held_out = pieces[:: max(2, min(20, len(pieces) // 8))]
            rest = [piece for piece in pieces if piece not in set(held_out)]
            for name, texts in zip(names.values(), (rest, held_out), strict=True):
                Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            raw = {
                "name": preset,
                "model": {"preset": preset, "vocab_size": self.vocabulary},
                "data": {
                    "corpus": {"kind": "files", "paths": [names["train"]], "validation_paths": [names["validation"]]},
                    "sequence_length": self.length,
                    "max_validation_tokens": self.length,
                    "cache_dir": folder,
                },
                "training": {"steps": _MEASURED_STEPS, "tokens_per_step": self.tokens_per_step(None)},
            }
            with _whispering():  # what is said of the sample would be taken for what is true of the text
                made = check(raw, out=Path(folder) / "run", quiet=quiet, steps=_MEASURED_STEPS)
        if made.tokens_per_second is None:
            raise DataError(f"{preset} cannot be tried on this text: {'; '.join(made.refused)}")
        return made

    def preset(self, first: Check) -> tuple[str, str]:
        """The largest that the text can fill and the machine can train within an hour."""
        speed = first.tokens_per_second or 1.0
        flops = speed * self.size(CANDIDATES[0]).training_flops_per_token
        chosen, why = CANDIDATES[0], "the smallest; "
        for name in CANDIDATES[1:]:
            size = self.size(name)
            worth = _TOKENS_A_PARAMETER * size.active_parameters_without_embedding
            seconds = worth * size.training_flops_per_token / flops
            if worth > _PASSES * self.tokens:
                why += f"{name} wants {count(worth)} tokens, and {_PASSES} readings of this text are "
                why += count(_PASSES * self.tokens)
                break
            if seconds > 60 * _MOST_MINUTES:
                why += f"{name} would take {duration(seconds)} here to see the {count(worth)} tokens it is worth"
                break
            chosen, why = name, "the largest that text and machine are enough for; "
        size = self.size(chosen)
        about = f"{count(size.total_parameters)} parameters, {count(size.active_parameters)} active for each token"
        return chosen, f"A mixture of experts: {about}. {why[:1].upper() + why[1:].rstrip('; ')}."

    def budget(self, speed: float | None) -> int:
        """Tokens of the run, before they are made whole steps."""
        enough = _PASSES * self.tokens
        return enough if speed is None else min(enough, int(60 * _MINUTES * speed))

    def tokens_per_step(self, speed: float | None) -> int:
        """A power of two, for some hundred steps; never more than half of the text."""
        step = self.length
        wanted = max(_LEAST_TOKENS_A_STEP, self.budget(speed) // _STEPS)
        while 2 * step <= min(_MOST_TOKENS_A_STEP, wanted, self.tokens // 4):
            step *= 2
        return step

    def training_choices(self, last: Check) -> Iterator[Choice]:
        """Length of the run, batch, pieces and threads."""
        speed = last.tokens_per_second or 1.0
        budget, step = self.budget(speed), self.tokens_per_step(speed)
        tokens = max(budget // step, _LEAST_STEPS) * step
        if tokens > budget:
            why = (
                f"{_LEAST_STEPS} steps, the least that shows anything: {tokens / self.tokens:.1f} readings of the text"
            )
        elif budget == _PASSES * self.tokens:
            why = f"{_PASSES} readings of the text; more would teach little that is new (2305.16264)"
        else:
            why = f"what half an hour is enough for; the text has {count(self.tokens)} to train on"
        time = f"About {duration(tokens / speed)} at the {count(speed)} tokens/s that were measured just now"
        yield Choice("training.tokens", tokens, f"Length of the run: {why}. {time}.")
        why = f"Tokens read before each update of the weights, which makes {tokens // step:,} updates. "
        why += "Small models gain more from many updates than from large ones."
        yield Choice("training.tokens_per_step", step, why)
        micro, reason = self._micro_batch(step, last)
        yield Choice("training.micro_batch_tokens", micro, reason)
        cores, why = usable_cores()
        limited = cores if "group" in why or "given" in why else 0
        yield Choice("training.threads", limited, f"{'' if limited else '0 is all there are. '}Cores: {why}.")

    def _micro_batch(self, step: int, last: Check) -> tuple[int, str]:
        """What of a step is in memory at once: all of it, unless half of what is free would be full."""
        available, used = memory.available_bytes(), last.memory_bytes or 0
        measured_at = self.tokens_per_step(None)
        micro = step
        while available is not None and micro > self.length and used * micro / measured_at > available / 2:
            micro //= 2
        there = f", and {_bytes(available)} are free" if available is not None else ""
        return micro, f"Of a step, in memory at once. {_bytes(used)} were in use at {measured_at} tokens{there}."


@contextmanager
def _whispering() -> Iterator[None]:
    """Without the routine messages of a run."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _written(choices: Sequence[Choice], found: Survey) -> Iterator[str]:
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in found.suffixes.items())
    yield f"# A first recipe for {', '.join(found.paths)}"
    yield f"# ({kinds}; {_bytes(found.disk_bytes)} on disk, {_bytes(found.text_bytes)} of text)."
    if found.num_set_aside:
        more = found.num_set_aside - len(found.set_aside)
        named = ", ".join(found.set_aside) + (f" and {more:,} more" if more else "")
        yield from _comment(f"Left out, as no text of the corpus: {named}.")
    if found.skipped:
        yield f"# Left out as they could not be read as text, files or records: {found.skipped:,}."
    if found.duplicates:
        yield f"# Left out as they have the text of another, documents: {found.duplicates:,}."
    if found.empty:
        yield f"# Left out as there is nothing in them, documents: {found.empty:,}."
    yield "#"
    yield "# finemoe train THIS --check      what it will take, without training"
    yield "# finemoe train THIS              train"
    yield "# finemoe recipe keys             every other key there is"
    tables: dict[str, list[Choice]] = {}
    for choice in choices:
        tables.setdefault(choice.key.rpartition(".")[0], []).append(choice)
    for table, inside in tables.items():
        yield ""
        if table:
            yield f"[{table}]"
        for choice in inside:
            yield from _comment(choice.reason)
            yield f"{choice.key.rpartition('.')[2]} = {_toml(choice.value)}"


def _comment(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield from textwrap.wrap(line, 96, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _toml(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:_}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _tolerance(found: Survey) -> Choice:
    """Else the recipe would be refused for what cannot be read."""
    seen = found.documents + found.duplicates + found.skipped
    share = math.ceil(100 * found.skipped / seen) / 100
    one = "1 of them is" if found.skipped == 1 else f"{found.skipped:,} of them are"
    return Choice(
        "data.max_skipped_share",
        share,
        f"Of {seen:,} documents {one} left out, as they cannot be read; the first is {found.first_skipped}. "
        f"Mend them, and take this line out: then more than {_USUALLY_SKIPPED:.0%} is refused.",
    )


def _name(path: str) -> str:
    stem = Path(path).expanduser().resolve().name.split(".")[0]
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "mine"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"


def describe(starter: Starter) -> Mapping[str, Any]:
    """The recipe and its reasons, as JSON."""
    about = starter.survey
    facts = (
        "suffixes",
        "disk_bytes",
        "documents",
        "text_bytes",
        "median_bytes",
        "text_field",
        "skipped",
        "duplicates",
        "empty",
        "num_set_aside",
    )
    return {
        "text": starter.text,
        "recipe": starter.tables,
        "choices": [{"key": one.key, "value": one.value, "reason": one.reason} for one in starter.choices],
        "files": {name: getattr(about, name) for name in facts},
    }
