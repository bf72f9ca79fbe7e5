"""Pipeline: the micro-batches of a step through stages on several ranks, by torch's own schedules (decision 0019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.model.transformer import Transformer
from finemoe.parallel.passes import HasTerms, Passes
from finemoe.parallel.stage_module import StageModule, Step
from finemoe.parallel.stages import V_SHAPED, Cut

_SCHEDULES: Mapping[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


@final
class Pipeline:
    """`parallel.passes.Execute` of the stages that this rank holds; all ranks of the pipeline call it together."""

    def __init__(
        self, model: Transformer, cut: Cut, group: distributed.ProcessGroup, dtype: torch.dtype | None = None
    ) -> None:
        """Take part.

        Args:
            model: what `keep_only` left of it here, on the device where it trains.
            cut: the same on every rank.
            group: the ranks of the pipeline, in order.
            dtype: of hidden states between stages; None: the weights'.
        """
        self.model = model
        self.cut = cut
        self.group = group
        self.rank = distributed.get_rank(group)
        first = next(model.parameters())
        self._device, self._weights, self._dtype = first.device, first.dtype, dtype or first.dtype
        self._modules = [StageModule(model, stage, cut.shares_embedding) for stage in cut.held_by(self.rank)]
        self._made: tuple[tuple[int, int], Any] | None = None
        self._ends = self._group_of_ends()

    def __call__(
        self,
        objective: HasTerms,
        batches: Sequence[Any],
        counts: Mapping[str, float],
        weights: Mapping[str, float],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Passes:
        """As in `Execute`; what is returned is of the whole model, on every rank.

        Raises:
            ConfigError: weights have hooks that the schedule would pass by; the objective runs the model twice, or asks
                for what a stage does not have.
        """
        if self._made is None:
            self._refuse_hooks()
        length = max(batch.num_tokens for batch in batches)
        schedule = self._schedule(len(batches), length)
        step = Step(objective, batches, counts, weights, autocast, length)
        numbers = torch.arange(len(batches))
        for module in self._modules:
            module.step = step
        try:
            schedule.step(
                *([numbers] if self.rank == 0 else []),
                index=numbers,
                target=numbers if self.rank == self.cut.last_rank else None,
                return_outputs=False,
            )
        except RuntimeError as error:
            if isinstance(error.__cause__, FinemoeError):  # torch wraps what a stage raises
                raise error.__cause__ from None
            raise
        finally:
            for module in self._modules:
                module.step = None
        self._sum_doubled()
        return self._everybodys(step)

    def counted(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that count here in a norm over the pipeline: of copies on two ranks, the first rank's."""
        copies = self.cut.doubled if self.rank == self.cut.last_rank else frozenset()
        return {name: parameter for name, parameter in parameters.items() if name not in copies}

    def norm(self, own: Tensor) -> Tensor:
        """Scalar: the norm of all gradients of the pipeline, from the norm of those that are `counted` on each rank."""
        squares = own.detach().to(self._device, torch.float64).square()
        distributed.all_reduce(squares, group=self.group)
        return squares.sqrt().to(self._weights)  # the same everywhere, where `own` is of no gradients too

    def _schedule(self, micro_batches: int, length: int) -> Any:
        """For so many micro-batches of at most `length` tokens; made anew where either changes."""
        if self._made is not None and self._made[0] == (micro_batches, length):
            return self._made[1]
        states = torch.empty(length, self.model.config.hidden_size, dtype=self._dtype, device="meta")
        number, loss = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
        states.requires_grad_()
        stages = [
            PipelineStage(
                module,
                module.stage.index,
                len(self.cut.stages),
                self._device,
                # Told, and not found out by a pass of its own, which would leave gradients and loads behind.
                input_args=number if module.stage.is_first else states,
                output_args=loss if module.stage.is_last else states,
                group=self.group,
            )
            for module in self._modules
        ]
        held: Any = stages[0] if self.cut.schedule == "1f1b" else stages
        # Gradients are sums: the loss is divided by counts of the whole step already.
        schedule = _SCHEDULES[self.cut.schedule](held, micro_batches, loss_fn=_as_it_is, scale_grads=False)
        self._made = ((micro_batches, length), schedule)
        return schedule

    def _refuse_hooks(self) -> None:
        """A stand-in takes gradients with a hook, which has to see all of them. All ranks refuse, or none."""
        past = self.cut.schedule in V_SHAPED
        hooked = [
            name
            for name, parameter in self.model.named_parameters()
            if (past or name in self.cut.doubled)
            if parameter._post_accumulate_grad_hooks or parameter._backward_hooks
        ]
        everybody: list[list[str]] = [[] for _ in range(self.cut.processes)]
        distributed.all_gather_object(everybody, hooked, group=self.group)
        if names := [name for names in everybody for name in names]:
            why = "computes gradients of weights past their hooks" if past else "has a copy of it on two ranks"
            raise ConfigError(
                f'{names[0]} is trained through a stand-in, and parallel.schedule = "{self.cut.schedule}" {why}: '
                + ('take schedule = "1f1b"' if past else "leave it out of what is trained")
            )

    def _group_of_ends(self) -> Any:
        """The two ranks that have a copy of the embedding each; None where no rank shares one with another."""
        ends = (0, self.cut.last_rank)
        if not self.cut.doubled or self.rank not in ends:
            return None
        if self.cut.processes == 2:
            return self.group
        ranks = [distributed.get_global_rank(self.group, rank) for rank in ends]
        return distributed.new_group(ranks, use_local_synchronization=True)

    def _sum_doubled(self) -> None:
        """Copies on the first and the last rank have the gradient of their own uses: both get the sum of them."""
        weight = self.model.embedding.weight if self._ends is not None else None
        if weight is None or not weight.requires_grad:
            return
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradient = weight.grad
        distributed.all_reduce(gradient.to_local() if isinstance(gradient, DTensor) else gradient, group=self._ends)

    def _everybodys(self, step: Step) -> Passes:
        """Terms, loads and dropped assignments of all stages, on every rank; rows that arrived here."""
        terms: dict[int, dict[str, float]] = {}
        for stage, micro_batches in step.parts.items():
            terms[stage] = {}
            for name, value in ((name, value) for parts in micro_batches for name, value in parts.items()):
                terms[stage][name] = terms[stage].get(name, 0.0) + value.item()
        load: dict[int, Tensor] = {}
        arrived: dict[int, int] = {}
        dropped = 0
        for layer, record in ((layer, record) for routing in step.routing for layer, record in routing.items()):
            load[layer] = load[layer] + record.load if layer in load else record.load
            arrived[layer] = arrived.get(layer, 0) + (record.arrived or 0)
            dropped += int(record.dropped)
        own = (terms, {layer: one.tolist() for layer, one in load.items()}, dropped)
        everybody: list[Any] = [None] * self.cut.processes
        distributed.all_gather_object(everybody, own, group=self.group)
        by_stage = {stage: values for terms, _, _ in everybody for stage, values in terms.items()}
        order = sorted(by_stage)
        names = dict.fromkeys(name for stage in reversed(order) for name in by_stage[stage])  # the headline first
        loads = {layer: one for _, load, _ in everybody for layer, one in load.items()}
        return Passes(
            {name: sum(by_stage[stage].get(name, 0.0) for stage in order) for name in names},
            {layer: torch.tensor(loads[layer], device=self._device) for layer in sorted(loads)},
            sum(dropped for _, _, dropped in everybody),
            arrived,
        )


def _as_it_is(loss: Tensor, number: Tensor) -> Tensor:
    """The last stage returns its loss."""
    return loss
