"""What a recipe trains on, as it is: samples with the tokens that are learnt, what was cut and left out, lengths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby, islice, takewhile
from typing import Any

import torch

from finemoe.core.errors import ConfigError
from finemoe.data.batch import PackedBatch, TokenBatch
from finemoe.runs.config import RunConfig, read_recipe, resolve_run
from finemoe.runs.start import build_method, in_steps
from finemoe.text.tokenizer import Tokenizer
from finemoe.training.method import Method, Prompt, TrainingData

KIND = "data"
_SURVEYED = 2048  # positions whose lengths are counted


def data_excerpts(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    *,
    samples: int = 4,
    skip: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Samples of what a run would train on, in its order, each as pieces of text that are learnt or only read.

    Args:
        recipe: path of a TOML recipe, its tables as a mapping, or a resolved configuration.
        samples: how many; a pair is one, and shown as two answers; of a model that answers itself, prompts.
        skip: so many of the first are passed over.
        overrides: `a.b=c`, for a path or a mapping.

    Returns:
        JSON-able: `samples` (number, part, tokens, learnt, pieces, of a prompt what is `right`), `report` (what was
        read and left out, as in data.json of a run), `notes`, and `lengths` in tokens of the first two thousand.

    Raises:
        ConfigError, DataError: the recipe or its data cannot work.
    """
    if samples < 1 or skip < 0:
        raise ConfigError(f"samples {samples} must be at least 1, and skip {skip} at least 0")
    config = recipe if isinstance(recipe, RunConfig) else resolve_run(*read_recipe(recipe, overrides))
    method = build_method(config)
    with closing(method):
        data: TrainingData[Any] = method.data
        config = in_steps(config, data)
        shown, lengths = _asked(method, samples, skip) if method.asks is not None else _read(data, samples, skip)
    if not shown:
        raise ConfigError(f"skip {skip} leaves nothing to show of the first {len(lengths):,}: give a smaller one")
    return {
        "kind": KIND,
        "name": config.name,
        "method": config.method.kind,
        "sequence_length": config.data.sequence_length,
        "steps": config.training.total_steps,
        "sequences_per_step": config.sequences_per_step,
        "sequences_per_epoch": data.sequences_per_epoch,
        "samples": shown,
        "lengths": lengths,
        "report": dict(data.report),
        "notes": list(method.notes),
    }


def _read(data: TrainingData[Any], samples: int, skip: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Samples of batches, and the lengths of the first two thousand."""
    size = min(data.sequences_per_epoch, _SURVEYED)
    before = takewhile(lambda sample: sample["number"] < skip + samples, _samples(data, size))
    shown = [sample for sample in before if sample["number"] >= skip]
    return shown, [sample["tokens"] for sample in _samples(data, size, pieces=False)]


def _asked(method: Method[Any], samples: int, skip: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The same of prompts, which the model will answer: nothing of them is learnt."""
    assert method.asks is not None
    asked = list(islice(method.asks(), _SURVEYED))
    shown = [_prompt(method.data.tokenizer, number, one) for number, one in enumerate(asked)][skip : skip + samples]
    return shown, [len(one.ids) for one in asked]


def _prompt(tokenizer: Tokenizer, number: int, one: Prompt) -> dict[str, Any]:
    pieces = _pieces(tokenizer, one.ids, [False] * len(one.ids))
    return {"number": number, "position": number, "part": None, "tokens": len(one.ids), "learnt": 0, "pieces": pieces,
            "right": list(one.right)}  # fmt: skip


def _samples(data: TrainingData[Any], positions: int, *, pieces: bool = True) -> Iterator[dict[str, Any]]:
    """Documents in the order of training, or rows where documents are one text; without `pieces` their sizes alone."""
    number = 0
    for position in range(positions):
        batch = data.batch(position, 1)
        pairs = _is_pairs(batch)
        parts = ("the better answer", "the worse answer") if pairs else (None, None)
        for place, (ids, learnt) in enumerate(_documents(batch)):
            found: dict[str, Any] = {"number": number, "position": position, "part": parts[place % 2]}
            found |= {"tokens": len(ids), "learnt": sum(learnt)}
            if pieces:
                found["pieces"] = _pieces(data.tokenizer, ids, learnt)
            yield found
            number += not pairs or place % 2  # both answers of a pair have its number


def _is_pairs(batch: Any) -> bool:
    return isinstance(batch, PackedBatch) and batch.num_documents == 2 * len(batch.items)


def _documents(batch: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of each document, or row, of a batch, and which of them are predicted with a weight."""
    rows: TokenBatch = batch.rows if isinstance(batch, PackedBatch) else batch
    for row in range(len(rows.tokens)):
        numbers = rows.documents[row] if isinstance(batch, PackedBatch) else torch.zeros_like(rows.tokens[row])
        for number in numbers.unique_consecutive().tolist():
            here = numbers == number
            ids = [*rows.tokens[row, here].tolist(), rows.targets[row, here][-1].item()]
            yield [int(one) for one in ids], [False, *(rows.weights[row, here] > 0).tolist()]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], learnt: Sequence[bool]) -> list[dict[str, Any]]:
    """Runs of tokens that are learnt, or not, as text."""
    pieces = []
    for on, run in groupby(zip(learnt, ids, strict=True), key=lambda pair: pair[0]):
        text = b"".join(tokenizer.token_bytes.get(token, b"") for _, token in run).decode("utf-8", "replace")
        pieces.append({"text": text, "learnt": on})
    return pieces
