"""Whole training steps: beside transformers on the same weights, and a mixture beside a dense model of its size."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.process import Peer, PeerError
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, Samples, fastest, interleave, ratios
from benchmarks.speed.training import batch_of, chosen_kernels, make_trainer, step

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure

OURS, TORCH = "finemoe", "finemoe, plain torch"
BACKENDS = ("grouped_mm", "batched_mm", "eager")
"""How transformers computes experts; the first is what it chooses by itself."""
FREED_PAGES_STAY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""For transformers what `keep_freed_pages` does for us: it is measured at its best."""
LENGTH = 512
_SLOW, _SLOW_REPEATS = 4, 1  # a backend so many times slower than another is timed this often
_LOSS_TOLERANCE = 1e-4
_SECONDS = 60.0
_FREE_SHARE = 0.5  # of the machine's memory that one backend may want


def write_models(config: ModelConfig, folder: Path, length: int = LENGTH) -> tuple[Path, Path]:
    """The same drawn weights as a run of ours and as a Hugging Face folder."""
    run = shapes.write_run(config, folder / "run", length)
    export_hf(run, folder / "hf", dtype="fp32", quiet=True)
    return run, folder / "hf"


def sizes(context: Context) -> tuple[ModelConfig, list[list[int]]]:
    """The model of these rows, and its batch of 2,048 tokens."""
    config = shapes.v3_model(2 if context.quick else 6)
    return config, shapes.token_ids(config, 1 if context.quick else 4, LENGTH)


def training(context: Context) -> list[Row]:
    """Rows of a whole step, its share of the peak, and validation."""
    config, tokens = sizes(context)
    with tempfile.TemporaryDirectory() as temporary:
        context.watch("writing the model")
        run, folder = write_models(config, Path(temporary))
        with context.own() as own, context.peer("transformers", "transformers", FREED_PAGES_STAY) as peer:
            context.watch("loading the model")
            own.ask("open", path=str(run))
            kernels = {OURS: None, TORCH: shapes.PURE_TORCH.model_dump()}
            context.kernels = own.ask("train", tokens=tokens, kernels=kernels)["kernels"]
            contestants = [Contestant(name, own.timer("step", trainer=name)) for name in kernels]
            contestants.append(Contestant("validation", own.timer("validate", trainer=OURS)))
            if peer is not None:
                peer.ask("open", path=str(folder))
                peer.ask("train", tokens=tokens)
                _same_loss(context, own, peer)
                contestants += _backends(context, config, tokens, peer)
            budget = context.seconds(_SECONDS)
            samples = interleave(contestants, context.repeats, budget=budget, watch=context.watch)
    return rows_of(samples, _flops(config, tokens))


def _flops(config: ModelConfig, tokens: list[list[int]]) -> float:
    """Of one step; see `finemoe.model.size`."""
    return measure(config, LENGTH).training_flops_per_token * len(tokens) * LENGTH


def _same_loss(context: Context, own: Peer, peer: Peer) -> None:
    """Both compute the same, or nothing is compared.

    Raises:
        PeerError: they do not.
    """
    losses = {name: own.ask("loss", trainer=name)["loss"] for name in (OURS, TORCH)}
    for backend in ("grouped_mm", "eager"):
        peer.ask("use", experts=backend)
        losses[backend] = peer.ask("loss")["loss"]
    difference = max(losses.values()) - min(losses.values())
    context.checks["largest difference of losses before training"] = difference
    if difference > _LOSS_TOLERANCE:
        raise PeerError(f"losses on the same weights and batch differ by more than {_LOSS_TOLERANCE}: {losses}")


def _backends(context: Context, config: ModelConfig, tokens: list[list[int]], peer: Peer) -> list[Contestant]:
    """transformers' ways to compute experts: slow ones less often, and the one that copies only where it fits."""
    names = list(BACKENDS)
    needed, present = gathered_bytes(config, sum(map(len, tokens))), _memory_bytes()
    if needed > _FREE_SHARE * present:
        names.remove("batched_mm")
        context.note(
            f"transformers' batched_mm was left out: it copies the weights of every choice, {needed / 1e9:.0f} GB "
            f"in this step, and the machine has {present / 1e9:.0f} GB"
        )
    seconds = {}
    for name in names:
        context.watch(f"{name}, a first step")
        seconds[name] = peer.timer("step", experts=name)()
    slow = [name for name in names if seconds[name] > _SLOW * min(seconds.values())]
    for name in slow:
        context.note(
            f"transformers' {name} is timed {_SLOW_REPEATS} times only, after a first step of {seconds[name]:.0f} s"
        )
    return [
        Contestant(name, peer.timer("step", experts=name), _SLOW_REPEATS if name in slow else None) for name in names
    ]


def gathered_bytes(config: ModelConfig, tokens: int) -> float:
    """Weights that a kernel copies which takes three matrices a choice and keeps them for the backward pass."""
    layers = [config.blocks[index].feed_forward for index in config.moe_layers]
    chosen = sum(layer.experts_per_token * layer.expert_hidden_size for layer in layers if isinstance(layer, MoEConfig))
    return 4.0 * 3 * config.hidden_size * chosen * tokens


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rows_of(samples: Samples, flops: float) -> list[Row]:
    """What the samples say; `flops` of one step."""
    ours = Measured(OURS, samples[OURS])

    def row(what: str, first: str, second: str, **more: Any) -> Row:
        values = ratios(samples[first], samples[second])
        return Row("step", what, Measured(first, samples[first]), Measured(second, samples[second]), values, **more)

    rows = []
    backends = [name for name in BACKENDS if name in samples]
    if backends:
        best = fastest(samples, [name for name in backends if len(samples[name]) == len(samples[OURS])])
        rows.append(row(f"training step / transformers {best}", OURS, best, target=0.70, stretch=0.60))
        rows += [row(f"  / transformers {name}", OURS, name) for name in backends if name != best]
    rows.append(row("  / finemoe on plain torch", OURS, TORCH))
    rates = [flops / seconds for seconds in samples[OURS]]
    rows.append(
        Row(
            "step",
            "training step, share of GEMM peak",
            Measured(OURS, rates, "FLOP/s"),
            None,
            rates,
            of="gemm",
            higher=True,
            target=0.75,
            stretch=0.85,
            note="6 FLOPs for each active weight and token, embedding and router left out, and attention scores "
            "without the causal saving: finemoe.model.size",
        )
    )
    rows.append(
        Row(
            "step",
            "validation / training step",
            Measured("validation", samples["validation"]),
            ours,
            ratios(samples["validation"], samples[OURS]),
            note="validation: a forward pass over the tokens of one training step",
        )
    )
    return rows


def same_size(context: Context) -> list[Row]:
    """A step of a DeepSeekMoE beside one of the dense model of as many parameters in all."""
    layers = 1 if context.quick else 2
    experts, width = 63, 344
    configs = {
        "DeepSeekMoE": shapes.expert_model(shapes.moe(experts, width, 7), layers),
        "Dense x16": shapes.expert_model(shapes.dense((experts + 1) * width), layers),
    }
    batch = batch_of(shapes.token_ids(configs["Dense x16"], 1 if context.quick else 4, LENGTH))
    contestants, flops = [], []
    for name, config in configs.items():
        context.watch(f"building {name}")
        trainer = make_trainer(shapes.build(config, chosen_kernels(config, batch)), batch)
        contestants.append(Contestant(name, lambda trainer=trainer: step(trainer, batch)))  # type: ignore[misc]
        flops.append(measure(config, LENGTH).training_flops_per_token)
    samples = interleave(contestants, context.repeats, budget=context.seconds(_SECONDS / 2), watch=context.watch)
    sparse, full = (Measured(name, samples[name]) for name in configs)
    share = flops[0] / flops[1]
    values = [ratio / share for ratio in ratios(sparse.samples, full.samples)]
    note = f"DeepSeekMoE has {share:.3f} of the FLOPs of a step of Dense x16; both steps update all weights"
    what = "DeepSeekMoE / Dense x16, over FLOPs"
    return [Row("dense-x16", what, sparse, full, values, target=1.25, stretch=1.1, note=note)]
