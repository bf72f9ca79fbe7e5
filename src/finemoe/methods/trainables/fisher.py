"""How much the loss hangs on each weight: squared gradients of a pass over some of the data, before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finemoe.core.errors import ConfigError, TrainingError
from finemoe.core.seeds import derive
from finemoe.data.batch import Batch
from finemoe.methods.setting import Setting
from finemoe.model.transformer import Transformer
from finemoe.training.method import Method

Per = Literal["batch", "example"]

_PIECE_TOKENS = 4096


@dataclass(frozen=True)
class Fisher:
    """What a pass over some of the data found."""

    values: Mapping[str, Tensor]
    """Squared gradients, summed: by parameter name, of its shape, float32."""
    load: Mapping[int, Tensor]
    """[experts] int64: assignments by layer index, on the CPU."""


def squared_gradients(
    model: Transformer, method: Method[Any], setting: Setting, names: Sequence[str], per: Per, sequences: int
) -> Fisher:
    """Go once through the first `sequences` positions of the data, but through no position twice; in train mode.

    Args:
        model: its weights, gradients and mode are as before when this ends.
        method: its data, and its objective as it is at the beginning of a run, balance losses and all.
        setting: of the run.
        names: of the parameters that are asked for.
        per: batch: gradients are those of the mean over as many positions as a step has, each tensor's clipped by
            itself to the gradient norm of the run, as in the released ChildTuningD.py. example: of one position at a
            time, as it is.
        sequences: [positions].

    Raises:
        ConfigError: the positions hold nothing to learn from.
        TrainingError: a gradient is not finite.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    values = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in parameters.items()}
    load: dict[int, Tensor] = {}
    count = min(sequences, method.data.sequences_per_epoch)
    size = _size(per, setting)
    seen = False
    with _only(model, parameters), _no_trace(model, derive(setting.seed, "child", "fisher")):
        for start in range(0, count, size):
            pieces = list(_pieces(method, setting, start, min(size, count - start), model.embedding.weight.device))
            if not _backward(model, method, pieces, load):
                continue
            seen = True
            for name, one in parameters.items():
                if one.grad is not None:
                    if per == "batch":
                        nn.utils.clip_grad_norm_(one, setting.max_gradient_norm)
                    values[name] += one.grad.float().square()
                one.grad = None
    if not seen:
        raise ConfigError(
            f"trainable.fisher_sequences {sequences}: the first {count} positions of the data hold nothing to learn "
            "from; raise it"
        )
    if bad := [name for name, value in values.items() if not value.isfinite().all()]:
        raise TrainingError(f"the Fisher information before the run is not finite: {', '.join(bad[:4])}")
    return Fisher(values, load)


def sequences_at_once(per: Per, sequences: int, setting: Setting) -> int:
    """[sequences] That go through the model together."""
    return min(sequences, _size(per, setting), _at_most(setting))


def _size(per: Per, setting: Setting) -> int:
    return setting.sequences_per_step if per == "batch" else 1


def _at_most(setting: Setting) -> int:
    return max(1, _PIECE_TOKENS // setting.data.sequence_length)


def _pieces(method: Method[Any], setting: Setting, start: int, count: int, device: torch.device) -> Iterator[Batch]:
    """A batch in pieces that fit where a micro-batch does."""
    size = _at_most(setting)
    for first in range(start, start + count, size):
        yield method.data.batch(first, min(size, start + count - first)).to(device)


def _backward(model: Transformer, method: Method[Any], pieces: Sequence[Batch], load: dict[int, Tensor]) -> bool:
    """Gradients of the loss that a step over `pieces` would have; False where there is nothing to count."""
    objective = method.objective
    counts: dict[str, float] = {}
    for piece in pieces:
        for name, count in objective.counts(piece).items():
            counts[name] = counts.get(name, 0.0) + count
    if not counts[objective.headline]:
        return False
    weights = objective.weights(0.0)
    for piece in pieces:
        result = objective.terms(model, piece)
        parts = [
            (value / counts[name]).float() * weights.get(name, 1.0)
            for name, value in result.sums.items()
            if counts[name]
        ]
        torch.stack(parts).sum().backward()
        for layer, record in result.routing.items():
            one = record.load.cpu()
            load[layer] = load[layer] + one if layer in load else one
    return True


@contextmanager
def _only(model: Transformer, wanted: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Compute no other gradients meanwhile; the trainer says afterwards what has one."""
    before = [(one, one.requires_grad) for one in model.parameters()]
    try:
        model.requires_grad_(False)
        for one in wanted.values():
            one.requires_grad_(True)
            one.grad = None
        yield
    finally:
        for one, required in before:
            one.requires_grad_(required)


@contextmanager
def _no_trace(model: Transformer, seed: int) -> Iterator[None]:
    """Train mode, with torch's default generators on a stream of their own."""
    was_training = model.training
    devices = [torch.cuda.current_device()] if model.embedding.weight.is_cuda else []
    model.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
