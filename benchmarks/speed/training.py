"""A training step of ours, as `finemoe train` does it: the trainer, its objective, clip and optimizer."""

from __future__ import annotations

import time
from typing import Literal

import torch
from benchmarks.speed.device import settle

from finemoe.data.batch import TokenBatch
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.runs.calibration import choose
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import CROSS_ENTROPY, NextToken
from finemoe.training.method import Figures, Method
from finemoe.training.optimizers import AdamWConfig
from finemoe.training.schedule import MultiStepConfig
from finemoe.training.trainer import Plan, Trainer

OBJECTIVE = NextToken(isolate_documents=False)
LEARNING_RATE = 1e-5  # small, so that the steps that are timed do not change what is timed


def batch_of(tokens: list[list[int]]) -> TokenBatch:
    """A batch of whole sequences. Nothing follows the last token of each, so it carries no weight."""
    ids = torch.tensor(tokens)
    weights = torch.ones(ids.shape)
    weights[:, -1] = 0
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return TokenBatch(ids, ids.roll(-1, 1), weights, positions, torch.zeros_like(ids))


def chosen_kernels(config: ModelConfig, batch: TokenBatch, device: str = "cpu", bf16: bool = False) -> Kernels:
    """What `finemoe train` chooses by measuring."""
    where = torch.device(device)
    return choose(config, Kernels(), tokens=batch.tokens.numel(), device=where, bf16=bf16).kernels


class _Same:
    """One batch for every step; the trainer asks for no more."""

    def __init__(self, batch: TokenBatch) -> None:
        self._batch = batch

    def batch(self, position: int, num_sequences: int) -> TokenBatch:
        return self._batch


def make_trainer(
    model: Transformer, batch: TokenBatch, bf16: bool = False, moments: Literal["fp32", "bf16"] = "fp32"
) -> Trainer:
    """A trainer whose every step is on `batch`, where the model is."""
    plan = Plan(
        total_steps=1_000_000,
        sequences_per_step=batch.num_sequences,
        sequences_per_micro_batch=batch.num_sequences,
        device=model.embedding.weight.device,
        bf16=bf16,
    )
    method = Method(_Same(batch), OBJECTIVE, lambda model: Figures({}), before_update=(Clip(1.0),))
    schedule = MultiStepConfig(warmup_share=0.0, milestones=())
    optimizer = AdamWConfig(learning_rate=LEARNING_RATE, moments=moments)
    return Trainer(model.train(), method, optimizer, schedule, plan)


@torch.no_grad()
def loss_of(model: Transformer, batch: TokenBatch) -> float:
    """Mean cross-entropy."""
    terms = OBJECTIVE.terms(model, batch.to(model.embedding.weight.device))
    return float(terms.sums[CROSS_ENTROPY] / batch.weights.sum())


def step(trainer: Trainer, batch: TokenBatch) -> float:
    """Seconds of one step."""
    settle(trainer.plan.device)
    started = time.perf_counter()
    trainer.step([batch])
    settle(trainer.plan.device)
    return time.perf_counter() - started
