"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): a few chosen experts move, and nothing else does.

Experts are stacked, so what is trained are rows of a stack. They are tensors of their own here: gradients that are
kept, and both moments of the optimizer, are as large as the chosen experts and not as the stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from finemoe.checkpoint.selection import ExpertSelection, read_selection, router_fingerprint
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.core.logs import logger
from finemoe.methods.setting import Held, Kept, Setting, TrainableConfig
from finemoe.model.transformer import Transformer
from finemoe.training.method import Group, Method, Prepare, Saved, Selected
from finemoe.training.optimizers import ROWS

_STACKS = ("gate_up_proj", "down_proj")


class ExpertsConfig(TrainableConfig):
    """The experts that a selection names."""

    kind: Literal["experts"] = "experts"
    selection: str
    """The file that `finemoe analyze relevance MODEL --out FILE` writes: the experts of each layer that a task
    needs."""

    @property
    def moves_routers(self) -> bool:
        """Routers stay as they are, and their biases too."""
        return False

    def held(self, shapes: Mapping[str, tuple[int, ...]], setting: Setting) -> Held:
        """Rows of stacks, which stand beside the stacks that the model computes with."""
        rows, largest = 0, 0
        for layer, chosen in read_selection(Path(self.selection), setting.model).experts.items():
            for stack in _STACKS if chosen else ():
                shape = shapes[f"blocks.{layer}.feed_forward.experts.{stack}"]
                rows += len(chosen) * math.prod(shape[1:])
                largest = max(largest, math.prod(shape))
        return Held(rows, largest, (Kept("the experts that move, a second time", 4 * rows, "a smaller selection"),))


@final
class ExpertRows:
    """The chosen experts as parameters of their own, which stand in for the stacks."""

    def __init__(self, experts: Mapping[int, tuple[int, ...]]) -> None:
        """`experts`: by layer."""
        self._experts = {layer: torch.tensor(chosen) for layer, chosen in experts.items() if chosen}
        self._rows: dict[str, tuple[nn.Parameter, nn.Parameter, Tensor]] = {}

    def select(self, name: str) -> Group | None:
        """The stacks of layers with a chosen expert."""
        return Group() if self._layer(name) in self._experts else None

    def __call__(self, model: Transformer, selected: list[Selected]) -> list[Selected]:
        """As in `training.method.StandIn`."""
        made = []
        for one in selected:
            layer = self._layer(one.name)
            if layer is None:
                continue
            ids = self._experts[layer].to(one.parameter.device)
            rows = nn.Parameter(one.parameter.detach()[ids].clone())
            self._rows[one.name] = (one.parameter, rows, ids)
            one.parameter.register_post_accumulate_grad_hook(_into_rows(rows, ids))
            made.append(Selected(one.name + ROWS, rows, one.group))
        return made

    @torch.no_grad()
    def after_update(self, model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        """Put the rows where the model computes with them."""
        for stack, rows, ids in self._rows.values():
            stack[ids] = rows

    def state(self) -> Saved:
        """The rows, and which experts they are."""
        tensors = {name: rows.detach() for name, (_, rows, _) in self._rows.items()}
        return Saved(tensors, {"experts": {str(layer): chosen.tolist() for layer, chosen in self._experts.items()}})

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """As saved; the stacks hold them already.

        Raises:
            CheckpointError: the selection names other experts now than those that were saved.
        """
        if saved.values["experts"] != self.state().values["experts"]:
            raise CheckpointError(
                "trainable.selection does not name the experts any more that this run began with, and their rows would "
                "be written over others: put the file back, or start a new run"
            )
        for name, (_, rows, _) in self._rows.items():
            rows.copy_(saved.tensors[name])

    def _layer(self, name: str) -> int | None:
        """The layer whose stack a parameter is."""
        parts = name.split(".")
        stack = len(parts) == 5 and parts[0] == "blocks" and parts[2:4] == ["feed_forward", "experts"]
        return int(parts[1]) if stack and parts[4] in _STACKS else None


def _into_rows(rows: nn.Parameter, ids: Tensor) -> Any:
    """Keep of a stack's gradient what belongs to the chosen experts, as soon as it is there."""

    def move(stack: Tensor) -> None:
        assert stack.grad is not None
        own = stack.grad[ids]
        rows.grad = own if rows.grad is None else rows.grad + own
        stack.grad = None

    return move


def compare(path: str, selection: ExpertSelection) -> Prepare:
    """Say where a run begins whose routers are not those that the selection was measured with."""

    def check(model: Transformer, begins: bool) -> None:
        if begins and router_fingerprint(model) != selection.router_sha256:
            logger.warning(
                "trainable.selection %s was measured on %s, whose routers differ from this model's: its experts may "
                "not be those that the task needs here; `finemoe analyze relevance` on start_from selects again",
                path,
                selection.source,
            )

    return check


def build(config: ExpertsConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` that moves nothing but the chosen experts.

    Raises:
        ConfigError: the selection cannot be read, or was made on a model of another shape.
    """
    if setting.start_from is None:
        raise ConfigError('trainable.kind "experts" tunes a trained model: name it as start_from')
    selection = read_selection(Path(config.selection), setting.model)
    rows = ExpertRows(selection.experts)
    count = sum(len(chosen) for chosen in selection.experts.values())
    note = (
        f"trained: {count} experts in {sum(map(bool, selection.experts.values()))} layers, "
        f"{selection.trainable_parameters:,} parameters ({selection.trainable_share:.1%}); all else stays as it is, "
        "routers and their biases too"
    )
    return replace(
        method,
        select=rows.select,
        prepare=(*method.prepare, compare(config.selection, selection)),
        stand_ins=(*method.stand_ins, rows),
        after_update=(*method.after_update, rows.after_update),
        state={**method.state, "experts": rows},
        notes=(*method.notes, note),
    )
