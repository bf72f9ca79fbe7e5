"""Relay: a model in stages, run without gradients as if it were whole, for what measures it.

Every rank of the pipeline asks alike and gets the whole answer: states go from stage to stage, what comes out of the
last one goes to all. Nothing overlaps; measuring is rare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Self, final

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from finemoe.core.errors import ConfigError
from finemoe.model.backend import Backend
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.moe.decision import RoutingRecord
from finemoe.model.transformer import ModelOutput, Transformer
from finemoe.parallel.stages import Cut


@dataclass(frozen=True)
class _Placed:
    """Stands for the embedding where one asks on which device the model is."""

    weight: Tensor
    """Empty."""


@final
class Relay:
    """What a measurement may ask a `Transformer` for. Made anew for each: weights of the head are kept once fetched."""

    def __init__(
        self, model: Transformer, cut: Cut, group: distributed.ProcessGroup, dtype: torch.dtype | None = None
    ) -> None:
        """As of `Pipeline`; no message is sent yet."""
        self._model = model
        self._cut = cut
        self._group = group
        self._rank = distributed.get_rank(group)
        first = next(model.parameters())
        self._device, self._weights, self._dtype = first.device, first.dtype, dtype or first.dtype
        self._head: Tensor | None = None
        self.embedding = _Placed(torch.empty(0, device=self._device))

    def __getattr__(self, name: str) -> NoReturn:
        raise ConfigError(f"a model in a pipeline cannot be asked for {name} while it is measured")

    @property
    def training(self) -> bool:
        """As the model."""
        return self._model.training

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`."""
        self._model.train(mode)
        return self

    def eval(self) -> Self:
        """As `nn.Module.eval`."""
        return self.train(False)

    @property
    def config(self) -> ModelConfig:
        """Of the whole model."""
        return self._model.config

    @property
    def kernels(self) -> Kernels:
        """As the model's."""
        return self._model.kernels

    @property
    def backend(self) -> Backend:
        """As the model's."""
        return self._model.backend

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden], on every rank; all of them ask the first time."""
        if self._head is None:
            shape, own = (self.config.vocab_size, self.config.hidden_size), None
            if self._rank == self._cut.last_rank:
                weight = self._model.head_weight.detach()
                own = weight.full_tensor() if isinstance(weight, DTensor) else weight
            self._head = self._from_last(own, shape, self._weights)
        return self._head

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`."""
        return self.backend.linear(hidden, self.head_weight, None)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, *, mtp: bool = False, **settings: Any) -> ModelOutput:
        """`Transformer.forward`; routing records hold loads and what was dropped alone.

        Raises:
            ConfigError: a cache, recorded decisions or states are asked for, which stay where they are.
        """
        for name in ("cache", "groups", "record", "states", "start", "stop"):
            if settings.pop(name, None):
                raise ConfigError(f"a model in a pipeline cannot be measured with {name}")
        arrived: Tensor | None = None
        routing: dict[int, RoutingRecord] = {}
        output: ModelOutput | None = None
        for stage in self._cut.stages:
            rank = self._cut.rank_of(stage.index)
            if stage.index and rank != self._cut.rank_of(stage.index - 1):
                arrived = self._hand_on(arrived, self._cut.rank_of(stage.index - 1), rank, tokens)
            if rank == self._rank:
                start = None if arrived is None else (stage.first, arrived)
                stop = None if stage.is_last else stage.stop
                output = self._model(tokens, mtp=mtp and stage.is_last, start=start, stop=stop, **settings)
                arrived = output.hidden
                routing |= output.routing
        states = self._states_from_last(None if output is None else (output.hidden, *output.mtp_hidden))
        return ModelOutput(states[0], self._everybodys(routing), states[1:])

    def _hand_on(self, states: Tensor | None, sender: int, receiver: int, tokens: Tensor) -> Tensor | None:
        if self._rank == sender:
            assert states is not None
            distributed.send(states.to(self._dtype).contiguous(), group=self._group, group_dst=receiver)
        elif self._rank == receiver:
            states = torch.empty(*tokens.shape, self.config.hidden_size, dtype=self._dtype, device=self._device)
            distributed.recv(states, group=self._group, group_src=sender)
        return states

    def _states_from_last(self, own: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What the last stage gave; how many, and how long each is, it alone knows."""
        is_last = self._rank == self._cut.last_rank
        told: list[Any] = [[(one.shape, one.dtype) for one in own] if own is not None and is_last else None]
        distributed.broadcast_object_list(told, group=self._group, group_src=self._cut.last_rank)
        given = own if own is not None and is_last else (None,) * len(told[0])
        return tuple(self._from_last(one, *kind) for one, kind in zip(given, told[0], strict=True))

    def _from_last(self, own: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if own is None:
            own = torch.empty(*shape, dtype=dtype, device=self._device)
        own = own.contiguous()
        distributed.broadcast(own, group=self._group, group_src=self._cut.last_rank)
        return own

    def _everybodys(self, routing: dict[int, RoutingRecord]) -> dict[int, RoutingRecord]:
        own = {layer: (record.load.tolist(), int(record.dropped)) for layer, record in routing.items()}
        everybody: list[Any] = [None] * self._cut.processes
        distributed.all_gather_object(everybody, own, group=self._group)
        found = {layer: record for one in everybody for layer, record in one.items()}
        tensors = {layer: [torch.tensor(one, device=self._device) for one in found[layer]] for layer in sorted(found)}
        return {layer: RoutingRecord(load, dropped, {}, None) for layer, (load, dropped) in tensors.items()}
