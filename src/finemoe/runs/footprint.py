"""How much memory a run takes at its height, from its configuration alone: nothing is allocated.

Weights follow from the number of parameters; gradients and optimizer state from how many of them move. What else a
method or a choice of what may move holds, it says itself: a teacher, what adapters are added to, masks. What a
micro-batch leaves behind for the backward pass is counted layer by layer: every product keeps what went in and what
comes out. Measured on a CPU the sum is right within a factor of `WITHIN` (tests/runs/test_footprint.py); a run is
refused only where it does not fit at all. Not counted: the one number that preferences keep of every answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finemoe.checkpoint.weights.shapes import parameter_shapes
from finemoe.core import memory
from finemoe.core.errors import RunError
from finemoe.methods.setting import Held, Kept
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure
from finemoe.runs.config import RunConfig

WITHIN = 1.6
"""Factor between estimate and what a process was seen to take, either way; 0.8 to 1.4 in most settings."""

_VALIDATION_TOKENS = 16_384  # of one forward pass when the run is measured
_BESIDE = 1.25
"""Times what is kept: what is made and dropped on the way, and what lies unused between tensors."""
_AT_ANY_RATE = 48 << 20
"""Of threads, libraries and buffers that the first step loads."""
_STATE_OF = {"adamw": 8, "muon": 4}
"""Bytes of optimizer state a parameter; Muon keeps a momentum alone, and AdamW's two for the few that are no matrix."""


@dataclass(frozen=True)
class Footprint:
    """Bytes at the height of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of one micro-batch, with what the loss needs."""
    copy: int
    """Of a checkpoint while it is written; where there is no room for it, the run waits instead."""
    micro_batch_tokens: int
    kept: tuple[Kept, ...] = ()
    """Beside the model, by the method and by what may move."""
    before: int = 0
    """All that is held at the height of what is done before the first step."""
    only_before: tuple[Kept, ...] = ()
    """What is held in that time alone."""

    @property
    def stepping(self) -> int:
        """At the height of a step, not before."""
        beside = sum(one.nbytes for one in self.kept)
        return self.weights + self.gradients + self.optimizer + self.activations + beside

    @property
    def needed(self) -> int:
        """All that the run cannot do without."""
        return max(self.stepping, self.before)


def footprint(config: RunConfig, *, bf16: bool = False) -> Footprint:
    """What a run of `config` takes, on a CPU or in bf16 products on an accelerator.

    Raises:
        ConfigError, CheckpointError: what is to move does not fit the model, or there is no teacher.
    """
    model, length = config.model, config.data.sequence_length
    size = measure(model, length)
    parameters = size.total_parameters + size.mtp_parameters
    state = _STATE_OF.get(config.optimizer.kind, 8)
    tokens = min(config.micro_batch_sequences, config.sequences_per_step) * length
    moving = {name: shape for name, shape in parameter_shapes(model).items() if config.method.moves(name)}
    held: Held = config.trainable.held(moving, config.setting)
    kept = (*config.method.kept, *held.kept)
    activations = _activations(config, tokens, bf16)
    first = 4 * parameters + sum(one.nbytes for one in (*kept, *held.before))
    first += _activations(config, held.sequences_before * length, bf16) if held.before else 0
    alone = sum(one.nbytes for one in config.method.before)
    return Footprint(
        weights=4 * parameters,
        gradients=4 * (held.stepped + held.passing),
        optimizer=state * held.stepped,
        activations=activations,
        copy=4 * parameters + state * held.stepped,
        micro_batch_tokens=tokens,
        kept=kept,
        before=max(first if held.before else 0, alone + _AT_ANY_RATE if alone else 0),
        only_before=held.before if first >= alone and held.before else config.method.before,
    )


def _activations(config: RunConfig, tokens: int, bf16: bool) -> int:
    """[bytes] What so many tokens leave behind at once, or those of a validation, with what the loss needs."""
    model = config.model
    kept = [_kept_by_block(block, config, bf16) for block in (*model.blocks, *model.mtp)]
    streams = 2 * model.hidden_size * len(kept)  # the residual stream, before attention and before the feed-forward
    # While a block is taken back its gradients are made; a block that is recomputed is there once more for that.
    elements = streams + (3 * max(kept) if config.kernels.recompute else sum(kept) + max(kept))
    head = 2 * 4 * model.vocab_size * model.hidden_size  # the loss makes the head's gradient beside its place
    nbytes = _BESIDE * (2 if bf16 else 4)
    training = int(tokens * elements * nbytes)
    measured_on = min(_VALIDATION_TOKENS, config.data.max_validation_tokens)
    validating = int(measured_on * (2 * model.hidden_size + max(kept) / 2) * nbytes)  # half of it at a time
    return max(training, validating) + head + _AT_ANY_RATE


def _kept_by_block(block: BlockConfig, config: RunConfig, bf16: bool) -> int:
    """Numbers a token leaves in a block until its backward pass."""
    hidden, attention, layer = config.model.hidden_size, block.attention, block.feed_forward
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        queries, values = heads * attention.qk_head_dim, heads * attention.v_head_dim
        ranks = 2 * ((attention.q_lora_rank or 0) + attention.kv_lora_rank)
        attending = 4 * queries + 2 * values + ranks
    else:
        attending = 2 * attention.head_dim * (heads + attention.num_kv_heads) + attention.head_dim * heads
        if bf16 or config.kernels.products == "torch":  # a key for every head
            attending += 2 * attention.head_dim * heads
    if config.kernels.attention == "reference":
        attending += 3 * heads * config.data.sequence_length
    native = not bf16 and config.kernels.products != "torch"
    if not isinstance(layer, MoEConfig):
        return 2 * hidden + attending + (2 if native else 4) * int(layer.ffn_hidden_size)
    k, width = layer.experts_per_token, layer.expert_hidden_size
    in_place = not bf16 and config.kernels.experts in ("auto", "native")  # reads states where they lie, keeps little
    routed = k * (2 * width if in_place else 3 * width + 2 * hidden) + 3 * layer.num_routed_experts
    shared = (2 if native else 4) * width * layer.num_shared_experts + (hidden if layer.num_shared_experts else 0)
    return 2 * hidden + attending + routed + shared


def require_memory(config: RunConfig, device: torch.device, *, bf16: bool, at_once: int = 1) -> None:
    """Refuse what cannot fit, before it starts.

    Args:
        config: of a run; `training.memory_check` false lets everything through.
        device: where it computes.
        bf16: its precision there.
        at_once: how many such runs go at the same time.

    Raises:
        RunError: names what it needs, what there is, and what to lower.
        ConfigError, CheckpointError: as `footprint`.
    """
    available = memory.available_on(device)
    if available is None or not config.training.memory_check:
        return
    found = footprint(config, bf16=bf16)
    if at_once * found.needed <= available:
        return
    parts = (found.weights, found.gradients, found.optimizer, found.activations)
    weights, gradients, optimizer, activations = (f"{at_once * part / 2**30:.2f}" for part in parts)
    runs = f"{at_once} runs at the same time need" if at_once > 1 else "this run needs"
    beside = "".join(f", {one.what} {at_once * one.nbytes / 2**30:.2f}" for one in found.kept)
    parts_of = (
        f"weights {weights}, gradients {gradients}, optimizer {optimizer}{beside}, activations of a micro-batch of "
        f"{found.micro_batch_tokens:,} tokens {activations}"
    )
    if found.before > found.stepping:
        only = ", ".join(f"{one.what} {at_once * one.nbytes / 2**30:.2f}" for one in found.only_before)
        parts_of = f"before its first step, with {only}"
    raise RunError(
        f"{runs} about {at_once * found.needed / 2**30:.2f} GiB of memory, and {available / 2**30:.2f} GiB are "
        f"available: {parts_of}. {_advice(config, found, available / at_once, at_once)}, or go on regardless with "
        "--set training.memory_check=false"
    )


def _advice(config: RunConfig, found: Footprint, available: float, at_once: int) -> str:
    """What to lower, by what weighs most."""
    advice = ["a smaller model"]
    if found.before > found.stepping:
        advice = [one.lower for one in found.only_before]
    elif found.needed - found.activations < available:
        least = config.data.sequence_length
        lower = max(least, found.micro_batch_tokens // 4 // least * least)
        advice = [f"training.micro_batch_tokens={lower}"] if lower < found.micro_batch_tokens else []
        if not config.kernels.recompute:
            advice.append("kernels.recompute=true")
        advice.append("a shorter data.sequence_length or a smaller model")
    if found.before <= found.stepping:
        advice += [one.lower for one in found.kept if one.nbytes > found.needed / 20]
    if at_once > 1:
        advice.insert(0, "fewer parallel_runs")
    return f"Try {', '.join(advice)}"
