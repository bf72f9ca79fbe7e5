"""What the policy, before its first step on a rollout, and the reference say of the tokens that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from finemoe.checkpoint.open import load_model
from finemoe.methods.grpo.batch import packed
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.objective import read
from finemoe.methods.grpo.rollout import Answer, Routes, Scored
from finemoe.model.logprobs import token_logprobs
from finemoe.model.transformer import Transformer

_AT_ONCE = 32
"""[answers] That are read in one pass."""


@final
class Policies:
    """The model that is trained, and the reference: a copy of it as the run began, or as it was renewed."""

    def __init__(
        self,
        config: GRPOConfig,
        model: Transformer,
        start_from: str | None,
        autocast: Callable[[], Any],
        *,
        begins: bool,
    ) -> None:
        """Copy `model` where there is to be a reference; where the run goes on, open it again.

        Args:
            config: of the method.
            model: that is trained.
            start_from: what the run began with.
            autocast: the precision of training.
            begins: the run begins here, and `model` holds what it begins with.
        """
        self._config, self._model, self._autocast = config, model, autocast
        self._renewed = False
        self._reference: Transformer | None = None
        if config.beta:
            first = model if begins or start_from is None else load_model(start_from)
            self._reference = _copy(model, first.state_dict())

    def renew_reference(self) -> None:
        """The model as it is now is the reference (iterative GRPO, DeepSeekMath algorithm 1)."""
        assert self._reference is not None
        self.put_reference(self._model.state_dict())

    @torch.no_grad()
    def put_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights by name."""
        assert self._reference is not None
        for name, one in self._reference.state_dict().items():
            one.copy_(tensors[name])
        self._renewed = True

    def reference_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep of it: nothing while it is what the run began with."""
        return self._reference.state_dict() if self._renewed and self._reference is not None else {}

    def scores(self, answers: Sequence[Answer]) -> list[Scored]:
        """Of every answer what the steps need; those that do not count have empty columns."""
        asks_policy = self._config.updates > 1
        found: list[Scored] = []
        for start in range(0, len(answers), _AT_ONCE):
            part = answers[start : start + _AT_ONCE]
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
                logprobs, _ = token_logprobs(model, hidden, batch.rows.targets[0, batch.places])
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


def _copy(model: Transformer, tensors: Mapping[str, Tensor]) -> Transformer:
    """A model of the shape of `model`, on its device, with weights of its own that are never trained."""
    with torch.device("meta"):
        made = Transformer(model.config, model.kernels)
    made.to_empty(device=model.embedding.weight.device)
    made.load_state_dict({name: tensors[name] for name in made.state_dict()})
    return made.eval().requires_grad_(False)
