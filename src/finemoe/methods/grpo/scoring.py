"""What the policy, before its first step on a rollout, and the reference say of the tokens that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import CheckpointError
from finemoe.methods.grpo.batch import packed
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.objective import read
from finemoe.methods.grpo.rollout import Answer, Drawn, Routes, Scored
from finemoe.model.logprobs import logprobs_and_entropy
from finemoe.model.transformer import Transformer
from finemoe.training.method import Saved

_AT_ONCE = 8192
"""[tokens] That are read in one pass, or one answer."""


@final
class Policies:
    """The model that is trained, and the reference: a copy of it as the run began, or as it was renewed."""

    def __init__(
        self,
        config: GRPOConfig,
        model: Transformer,
        start_from: str | None,
        autocast: Callable[[], Any],
        vocab_size: int,
        *,
        begins: bool,
    ) -> None:
        """Copy `model` where there is to be a reference; where the run goes on, `restore` tells which.

        Args:
            config: of the method.
            model: that is trained.
            start_from: what the run began with.
            autocast: the precision of training.
            vocab_size: ids that can be drawn.
            begins: the run begins here, and `model` holds what it begins with.
        """
        self._config, self._model, self._autocast = config, model, autocast
        self._start_from, self._vocab_size = start_from, vocab_size
        self._renewed = False
        self._reference = _copy(model, model.state_dict()) if config.beta and begins else None
        self._mark = None if self._reference is None else fingerprint(self._reference)

    def state(self) -> Saved:
        """What a checkpoint has to keep: the reference where it is not what the run began with, and its hash."""
        tensors = self._reference.state_dict() if self._renewed and self._reference is not None else {}
        return Saved(tensors, {"reference_sha256": self._mark})

    def restore(self, saved: Saved) -> None:
        """The reference of a run that goes on: as it was saved, or opened again.

        Raises:
            CheckpointError: what the run began with is another model now, or is gone.
        """
        if not self._config.beta:
            return
        self._mark, self._renewed = saved.values["reference_sha256"], bool(saved.tensors)
        if self._renewed:
            self._reference = _copy(self._model, saved.tensors)
            return
        assert self._start_from is not None  # without one there would be no method on prompts
        self._reference = _copy(self._model, load_model(self._start_from).state_dict())
        if fingerprint(self._reference) != self._mark:
            raise CheckpointError(
                f"{self._start_from} holds another model than when this run began, whose reference it is: put it back"
            )

    def renew_reference(self) -> None:
        """The model as it is now is the reference (iterative GRPO, DeepSeekMath algorithm 1)."""
        self._reference, self._renewed = _copy(self._model, self._model.state_dict()), True

    def of_policy(self, drawn: Sequence[Drawn]) -> list[Tensor]:
        """[completion] of each: log-probabilities of the model as it is now, by the experts that it learns with."""
        answers = [Answer(one, 0, 0, 0.0, (0.0,) * len(one.completion)) for one in drawn]
        replay = [one.routes for one in drawn] if self._config.replay == "rollout" else None
        return self._read(self._model, answers, replay)[0]

    def scores(self, answers: Sequence[Answer]) -> list[Scored]:
        """Of every answer what the steps need; those that do not count have empty columns."""
        asks_policy = self._config.updates > 1
        found: list[Scored] = []
        for part in _passes(answers):
            routes: list[Routes] = [{} for _ in part]
            old: Sequence[Tensor | None] = [None] * len(part)
            reference = old
            if asks_policy:
                replay = [one.drawn.routes for one in part] if self._config.replay == "rollout" else None
                old, routes = self._read(self._model, part, replay)
            if self._reference is not None:
                reference, _ = self._read(self._reference, part, None)
            kept = routes if self._config.replay == "update" else [{} for _ in part]
            found += [Scored(*one) for one in zip(old, reference, kept, strict=True)]
        return found

    @torch.no_grad()
    def _read(
        self, model: Transformer, part: Sequence[Answer], replay: Sequence[Routes] | None
    ) -> tuple[list[Tensor], list[Routes]]:
        """Log-probabilities of each answer's tokens, and the experts of each of its tokens."""
        device = model.embedding.weight.device
        batch = packed(part, [Scored() for _ in part], replay).to(device)
        mode = model.training
        model.eval()
        try:
            with self._autocast():
                output = read(model, batch, batch.replay)
                hidden = output.hidden[0, batch.places] / self._config.temperature
                logprobs, _ = logprobs_and_entropy(model, hidden, batch.rows.targets[0, batch.places], self._vocab_size)
        finally:
            model.train(mode)
        counted = [len(one.drawn.completion) if one.counts else 0 for one in part]
        lengths = [len(one.drawn.prompt) + len(one.drawn.completion) - 1 for one in part]
        routes: list[dict[int, Tensor]] = [{} for _ in part]
        for layer, record in output.routing.items():
            if record.decision is None:
                continue
            for one, chosen in zip(routes, record.decision.expert_ids.cpu().short().split(lengths), strict=True):
                one[layer] = chosen
        return list(logprobs.cpu().split(counted)), list(routes)


def _passes(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    """Answers in order, about as many tokens at a time."""
    group: list[Answer] = []
    tokens = 0
    for one in answers:
        length = len(one.drawn.prompt) + len(one.drawn.completion)
        if group and tokens + length > _AT_ONCE:
            yield group
            group, tokens = [], 0
        group.append(one)
        tokens += length
    if group:
        yield group


def _copy(model: Transformer, tensors: Mapping[str, Tensor]) -> Transformer:
    """A model of the shape of `model`, on its device, with weights of its own that are never trained."""
    with torch.device("meta"):
        made = Transformer(model.config, model.kernels)
    made.to_empty(device=model.embedding.weight.device)
    made.load_state_dict({name: tensors[name] for name in made.state_dict()})
    return made.eval().requires_grad_(False)
