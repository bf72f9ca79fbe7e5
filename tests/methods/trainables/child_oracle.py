"""Child-Tuning written out in obvious lines, in float64: masks by loops and numpy, and the official update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finemoe.core.seeds import generator
from finemoe.data import DataConfig, TokenBatch
from finemoe.methods.setting import Setting
from finemoe.methods.trainables.child import ChildConfig, build
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.training.balancing import BalancingConfig
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import MTPLossConfig, NextToken
from finemoe.training.method import Figures, Method
from finemoe.training.optimizers import AdamWConfig
from finemoe.training.schedule import ConstantConfig
from finemoe.training.trainer import Plan, Trainer
from oracles.models import VOCAB, small_config
from oracles.models import build as build_model

SEQUENCES, LENGTH, EPOCH, SEED = 4, 12, 10, 3
RATE, DECAY, NORM, SHARE = 0.02, 0.1, 0.05, 0.3
OPTIMIZER = AdamWConfig(learning_rate=RATE, weight_decay=DECAY, max_gradient_norm=NORM)


class Rows:
    """Row `i` depends on `i` alone; a third of the weights are 0."""

    sequences_per_epoch = EPOCH

    def batch(self, position: int, rows: int) -> TokenBatch:
        made = [
            torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(position + i))
            for i in range(rows)
        ]
        tokens, place = torch.stack(made), torch.arange(LENGTH).expand(rows, LENGTH)
        return TokenBatch(tokens[:, :-1], tokens[:, 1:], (place % 3 > 0).float(), place, torch.zeros_like(place))


def setting_of(config: ModelConfig) -> Setting:
    data = DataConfig(sequence_length=LENGTH)
    return Setting(config, data, None, SEED, SEQUENCES, None, NORM, BalancingConfig(rate=0.0), MTPLossConfig())


def double_model(config: ModelConfig | None = None) -> Transformer:
    return build_model(config or small_config(), products="torch", experts="loop").double()


def tuned(
    model: Transformer, micro: int = SEQUENCES, select: Any = None, moments: str = "fp32", **table: Any
) -> Trainer:
    """A trainer of `model`; `table` as in a recipe."""
    setting = setting_of(model.config)
    method: Method[Any] = Method(
        Rows(),  # type: ignore[arg-type]
        NextToken(True),
        lambda model: Figures({"nothing": 0.0}),
        before_update=(Clip(NORM),),
        **({} if select is None else {"select": select}),
    )
    plan = Plan(5, SEQUENCES, micro, torch.device("cpu"), bf16=False)
    config = ChildConfig(share=SHARE, **table)
    optimizer = OPTIMIZER.model_copy(update={"moments": moments})
    made = Trainer(model, build(config, method, setting), optimizer, ConstantConfig(warmup_share=0.0), plan)
    made.model.train()
    return made


# ---- the obvious oracle ----------------------------------------------------------------------------------------------


def gradients(model: Transformer, batch: TokenBatch) -> dict[str, Tensor]:
    """Of the mean loss of `batch`."""
    objective = NextToken(True)
    counts = objective.counts(batch)
    model.zero_grad()
    sum(value / counts[name] for name, value in objective.terms(model, batch).sums.items()).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters()}


def clipped(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    norm = torch.cat([one.flatten() for one in grads.values()]).norm()
    return {name: one * min(1.0, NORM / (norm.item() + 1e-6)) for name, one in grads.items()}


def is_expert(name: str) -> bool:
    return name.startswith("blocks.") and ".experts." in name and "shared" not in name


def frozen(name: str, granularity: str) -> bool:
    return granularity == "expert" and name.startswith("blocks.") and not is_expert(name)


def found_masks(
    model: Transformer, granularity: str = "parameter", fisher: str = "batch", count: int = EPOCH
) -> dict[str, Tensor]:
    """Masks of D: the loop over batches or examples, and numpy's percentile of one long row."""
    total = {name: torch.zeros(one.shape) for name, one in model.named_parameters() if name.startswith("blocks.")}
    total = {name: one for name, one in total.items() if not frozen(name, granularity)}
    size = SEQUENCES if fisher == "batch" else 1
    for start in range(0, count, size):
        grads = gradients(model, Rows().batch(start, min(size, count - start)))
        for name in total:
            one = clipped({name: grads[name]})[name] if fisher == "batch" else grads[name]
            total[name] += one.float() ** 2
    if granularity == "row":
        total = {name: one.mean(-1, keepdim=True).expand(one.shape) for name, one in total.items()}
        row = [one[..., 0].numpy().ravel() for one in total.values()]
    elif granularity == "expert":
        gate_up, down = total.values()
        means = [torch.cat((a.flatten(), b.flatten())).mean() for a, b in zip(gate_up, down, strict=True)]
        row = [torch.stack(means).numpy()]
        total = {name: row_of(means, one) for name, one in total.items()}
    else:
        row = [one.numpy().ravel() for one in total.values()]
    threshold = np.percentile(np.concatenate(row).astype(np.float64), (1 - SHARE) * 100)
    return {name: one.double() >= threshold for name, one in total.items()}


def row_of(means: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([mean.expand(one.shape) for mean, one in zip(means, like, strict=True)])


def drawn_masks(parameters: Mapping[str, Tensor], granularity: str = "parameter") -> Iterator[dict[str, Tensor]]:
    """Masks of F, step by step: one number of the saved stream seeds the masks of a step."""
    stream = generator(SEED, "child", "masks")
    while True:
        own = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=stream)))
        masks: dict[str, Tensor] = {}
        for name, one in parameters.items():
            if granularity == "expert":
                if not is_expert(name):
                    continue
                layer = name.rpartition(".")[0]
                other = next((mask for known, mask in masks.items() if known.startswith(layer)), None)
                mask = other[:, :1, :1] if other is not None else draw((one.shape[0], 1, 1), own)
            else:
                mask = draw(one.shape if granularity == "parameter" else (*one.shape[:-1], 1), own)
            masks[name] = mask.expand(one.shape)
        yield masks


def draw(shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.bool).bernoulli_(SHARE, generator=stream)


def masks_of_steps(model: Transformer, mode: str, granularity: str, **fisher: Any) -> Iterator[dict[str, Tensor]]:
    parameters = {n: p.detach() for n, p in model.named_parameters() if not frozen(n, granularity)}
    if mode == "F":
        return drawn_masks(parameters, granularity)
    return iter([found_masks(model, granularity, **fisher)] * 5)


def official(
    model: Transformer,
    masks: Iterator[dict[str, Tensor]],
    steps: int,
    granularity: str,
    scale: float,
    held: bool,
    kept: torch.dtype = torch.float64,
) -> None:
    """Clip, mask, scale, AdamW as its paper has it, its moments `kept` from step to step; a vector does not decay."""
    trained = {name: one for name, one in model.named_parameters() if not frozen(name, granularity)}
    moments = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in trained.items()}
    for step in range(1, steps + 1):
        grads = gradients(model, Rows().batch((step - 1) * SEQUENCES, SEQUENCES))
        grads = clipped({name: grads[name] for name in trained})
        mask = next(masks)
        for name, one in trained.items():
            grad = grads[name] * mask[name] * scale if name in mask else grads[name]
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * grad)
            second.mul_(0.95).add_(0.05 * grad * grad)
            new = one.detach() * (1 - RATE * (DECAY if one.ndim > 1 else 0.0))
            new = new - RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            if held and name in mask:
                new = torch.where(mask[name], new, one.detach())
            one.data.copy_(new)
            moments[name] = (first.to(kept).double(), second.to(kept).double())
