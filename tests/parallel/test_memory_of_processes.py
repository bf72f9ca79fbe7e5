"""What each of several processes holds: counted beforehand as it is, and never the whole model, from the start on."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.checkpoint.weights.shapes import parameter_shapes
from finemoe.core import memory
from finemoe.core.config import merge, to_json
from finemoe.core.errors import RunError
from finemoe.model import native
from finemoe.model.initialize import initialize
from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout
from finemoe.parallel.planner.setup import Setup, parameters_of, pieces_of_ranks
from finemoe.parallel.world import SOLO
from finemoe.runs import run as running
from finemoe.runs.beginning import first_model
from finemoe.runs.config import RunConfig, resolve_run
from finemoe.runs.footprint import footprint, require_memory
from finemoe.runs.kernels import kernels_for
from finemoe.runs.start import build_method, check_memory
from finemoe.training.optimizers import optimizer_tensors
from methods.tiny_adaptations import ADAPT, begin_all, of_kinds
from methods.tiny_talks import adapting, begin, write_pairs
from parallel.processes import run
from parallel.test_run_by_many import tables
from runs.tiny_runs import corpus, data_table

__all__ = ["corpus"]

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "replicate": (2, {"replicate": 2}),
    "shard": (2, {"shard": 2}),
    "experts": (4, {"shard": 4, "expert": 2}),
    "stages": (2, {"pipeline": 2}),
}


def recipe(corpus: Path, name: str) -> dict[str, Any]:
    """Wide enough that what is left over where pieces are uneven is little."""
    raw = merge(tables(corpus, "one"), {"model": {"hidden_size": 64}})
    return {**raw, "parallel": LAYOUTS[name][1]}


def held(raw: dict[str, Any]) -> tuple[int, int, int]:
    """[bytes] Of this process's weights, gradients and moments within a step."""
    config = resolve_run(raw, "recipe")
    with running.world_of(config) as world:
        method = world.in_turn(lambda: build_method(config))
        chosen = world.first(lambda: kernels_for(config))
        trainer = running._trainer(config, method, Path(), chosen.kernels, None, world)
        trainer.model.train()
        trainer.step(trainer.micro_batches())
        moments = [one for name, one in optimizer_tensors(trainer.optimizers, trainer.parameters).items()
                   if not name.endswith("/step")]  # fmt: skip
        parameters = list(trainer.model.parameters())
        gradients = [one.grad for one in parameters if one.grad is not None]
        return tuple(sum(world.local(one).nbytes for one in found) for found in (parameters, gradients, moments))  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "moments"), [*((name, "fp32") for name in LAYOUTS), ("shard", "bf16")])
def test_what_is_counted_is_what_the_fullest_process_holds(corpus: Path, name: str, moments: str) -> None:
    raw, (size, _) = recipe(corpus, name), LAYOUTS[name]
    raw = merge(raw, {"optimizer": {"moments": moments}})
    config = resolve_run(raw, "recipe")
    found = footprint(config, layout=config.parallel.layout(size))
    fullest = max(run(size, held, raw, met=False))
    assert fullest == pytest.approx((found.weights, found.gradients, found.optimizer), rel=0.02)
    assert (footprint(config).weights > found.weights) == (name != "replicate")


def large(corpus: Path, **more: Any) -> RunConfig:
    """A model of which nothing is allocated."""
    model = {"preset": "tiny-v3", "hidden_size": 1024, "num_layers": 8, "vocab_size": 300}
    training = {"steps": 4, "tokens_per_step": 64 * 32, "micro_batch_tokens": 32}
    data = {**data_table(corpus), "sequence_length": 32}
    return resolve_run({"model": model, "data": data, "training": training, **more}, "test")


@pytest.mark.parametrize("layout", [Layout(shard=8), Layout(shard=8, expert=8), Layout(replicate=2, shard=4, expert=2)])
def test_the_planner_counts_the_same_pieces(corpus: Path, layout: Layout) -> None:
    config = large(corpus)
    setup = Setup.of(layout, sequences=64, seq_len=32, precision="fp32")
    whole = parameters_of(config.model, pieces_of_ranks(config.model, setup)[0])
    mine = (whole.blocks + whole.root) / layout.fsdp + whole.experts / (layout.expert * layout.expert_shard)
    assert footprint(config, layout=layout).weights == pytest.approx(4 * mine, rel=0.01)


def test_stages_hold_less_and_what_is_under_way_more(corpus: Path) -> None:
    config = large(corpus)
    alone, four = footprint(config), footprint(config, layout=Layout(pipeline=4))
    assert four.weights < 0.5 * alone.weights
    assert four.activations > 0.9 * alone.activations / 4 * 3  # four micro-batches of a quarter of the blocks
    assert not alone.together


def refusal(config: RunConfig, layout: Layout, monkeypatch: pytest.MonkeyPatch, available: int, **how: Any) -> str:
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    monkeypatch.setattr(memory, "available_on", lambda device: available)
    with pytest.raises(RunError) as found:
        require_memory(config, bf16=False, layout=layout, **how)
    return str(found.value)


def test_processes_of_a_machine_share_its_memory(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, layout, cpu = large(corpus), Layout(shard=8), torch.device("cpu")
    found = footprint(config, layout=layout)
    needed = 4 * found.needed + found.copy
    said = refusal(config, layout, monkeypatch, needed - 1, device=cpu, here=4)
    assert "the 4 of 8 processes on this machine (shard 8) need" in said
    assert f"{needed / 2**30:.2f} GiB of memory" in said
    assert f"4 times that, and {found.copy / 2**30:.2f} where rank 0 puts a checkpoint together" in said
    monkeypatch.setattr(memory, "available_on", lambda device: needed)
    require_memory(config, cpu, bf16=False, layout=layout, here=4)


def test_each_gpu_holds_its_own(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, layout, cuda = large(corpus), Layout(shard=8), torch.device("cuda")
    needed = footprint(config, layout=layout).needed
    assert "each of 8 processes (shard 8) needs" in refusal(
        config, layout, monkeypatch, needed - 1, device=cuda, here=8
    )
    monkeypatch.setattr(memory, "available_on", lambda device: needed)
    copy = footprint(config, layout=layout).copy
    monkeypatch.setattr(memory, "available_bytes", lambda: copy)
    require_memory(config, cuda, bf16=False, layout=layout, here=8)
    monkeypatch.setattr(memory, "available_bytes", lambda: copy - 1)
    with pytest.raises(RunError, match="rank 0 puts each checkpoint together in its machine's memory"):
        require_memory(config, cuda, bf16=False, layout=layout, here=8)


def test_what_prepares_on_the_whole_model_is_counted_whole(corpus: Path, tmp_path: Path) -> None:
    """DPO's reference is what the run begins with: until the first step each process holds all of it."""
    base = begin(corpus, tmp_path, "v3")
    raw = adapting(base, write_pairs(tmp_path / "pairs.jsonl"), {"kind": "dpo"})
    needed = {}
    for name, more in (("dpo", {}), ("no reference", {"reference": "none", "length": "mean"}), ("sft", {})):
        kind = "sft" if name == "sft" else "dpo"
        config = resolve_run({**raw, "method": {"kind": kind, **more}}, "test")
        needed[name] = footprint(config, layout=Layout(shard=2)).before
    weights = footprint(resolve_run(raw, "test")).weights
    assert needed["dpo"] >= weights
    assert needed["no reference"] == needed["sft"] == 0


@pytest.mark.parametrize("kind", ADAPT)
def test_a_method_says_whether_it_prepares(corpus: Path, tmp_path: Path, kind: str) -> None:
    base = begin_all(corpus, tmp_path)
    config = resolve_run(of_kinds(base, kind, "everything"), "test")
    assert bool(build_method(config).prepare) == config.method.prepares


def test_a_checkpoint_in_pieces_is_put_together_by_nobody(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, layout, cpu = large(corpus), Layout(shard=8), torch.device("cpu")
    pieces = config.training.model_copy(update={"checkpoint_format": "sharded"})
    config = config.model_copy(update={"training": pieces})
    assert footprint(config).copy, "one process has nobody to share the writing with"
    found = footprint(config, layout=layout)
    said = refusal(config, layout, monkeypatch, 4 * found.needed - 1, device=cpu, here=4)
    assert "4 times that" in said
    assert "rank 0" not in said
    monkeypatch.setattr(memory, "available_on", lambda device: 4 * found.needed)
    require_memory(config, cpu, bf16=False, layout=layout, here=4)


def test_the_advice_names_a_layout_that_fits(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = large(corpus, parallel={"replicate": 4, "shard": 1})
    four = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**four, "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    sharded = footprint(config, layout=Layout(shard=4))
    assert sharded.needed < footprint(config, layout=Layout(replicate=2, shard=2)).needed
    monkeypatch.setattr(memory, "available_on", lambda device: 4 * sharded.needed + sharded.copy)
    with pytest.raises(RunError, match=r"Try --set parallel\.shard=4 with 4 processes, which fits"):
        check_memory(config)
    monkeypatch.setattr(memory, "available_on", lambda device: 4 * sharded.needed // 2)
    with pytest.raises(RunError, match=r"Try a smaller model|Try training"):
        check_memory(config)


HEAVY = {
    "hidden_size": 512,
    "num_layers": 6,
    "vocab_size": 300,
    "attention": {"kind": "grouped_query", "num_heads": 8, "num_kv_heads": 8, "head_dim": 64},
    "feed_forward": {
        "kind": "moe", "num_routed_experts": 16, "num_shared_experts": 1, "experts_per_token": 2,
        "expert_hidden_size": 256, "router": {"kind": "softmax_topk"},
    },
}  # fmt: skip
"""About 180 MB of weights, the largest tensor 17."""


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def height(raw: dict[str, Any]) -> int:
    """[bytes] By which a process grows while its trainer is made."""
    config = resolve_run(raw, "recipe")
    with running.world_of(config) as world:
        method = world.in_turn(lambda: build_method(config))
        chosen = world.first(lambda: kernels_for(config))
        native.available()  # its library is as large for any model
        gc.collect()
        memory.forget_peak()
        before = resident()
        trainer = running._trainer(config, method, Path(), chosen.kernels, None, world)
        peak = memory.peak_bytes() - before
        assert sum(world.local(one).nbytes for one in trainer.model.parameters()) > 0
        return peak


@final
class Two:
    """As much of a world as is asked before anything is cut."""

    size = 2
    put = staticmethod(Tensor.copy_)


def test_several_begin_with_a_model_that_has_no_memory(corpus: Path) -> None:
    config = resolve_run(tables(corpus, "one"), "recipe")
    method, kernels = build_method(config), kernels_for(config).kernels
    cpu = torch.device("cpu")

    def begun(world: Any, method: Any) -> Any:
        return first_model(config, method, kernels, starts=True, world=world, device=cpu)

    model, fill = begun(Two(), method)
    assert all(one.is_meta for one in model.state_dict().values())
    fill(model)
    whole, nothing = begun(SOLO, method)
    assert nothing is None
    assert all(torch.equal(one, whole.state_dict()[name]) for name, one in model.state_dict().items())
    prepares, nothing = begun(Two(), replace(method, prepare=(lambda model, begins: None,)))
    assert nothing is None
    assert not any(one.is_meta for one in prepares.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("start", ["drawn", "opened"])
def test_no_process_holds_the_whole_model_at_its_start(corpus: Path, tmp_path: Path, start: str) -> None:
    raw = merge(tables(corpus, "one"), {"kernels": {"products": "torch", "experts": "sorted_slices"}})
    raw = {**raw, "model": HEAVY, "parallel": {}}
    raw.pop("balancing")
    config = resolve_run(raw, "recipe")
    shapes = {name: 4 * torch.Size(shape).numel() for name, shape in parameter_shapes(config.model).items()}
    if start == "opened":
        raw = {**raw, "start_from": str(a_run(config, raw, tmp_path / "run"))}
        raw.pop("model")
    whole, largest = sum(shapes.values()), max(shapes.values())
    [alone] = run(1, height, raw, met=False)
    halves = run(2, height, merge(raw, {"parallel": {"shard": 2}}), met=False)
    assert alone > 0.95 * whole
    assert max(halves) < 0.5 * whole + 2 * largest + (24 << 20), (halves, whole, largest)


def a_run(config: RunConfig, raw: dict[str, Any], folder: Path) -> Path:
    """A run's folder with one checkpoint of weights that nobody trained."""
    small = merge(raw, {"training": {"steps": 1, "tokens_per_step": 16}})
    small = {**small, "model": {**HEAVY, "num_layers": 1, "hidden_size": 16}}
    running.train(small, out=folder, quiet=True)  # for the tokenizer
    model = Transformer(config.model)
    initialize(model, 5)
    state = {"step": 2, "tokens": 2, "position": 2, "seconds": 1.0, "threads": 1}
    tensors: dict[str, Tensor] = model.state_dict()
    save(folder / "checkpoints", 2, RunState(tensors, {}, state, to_json(config)), keep=1)
    (folder / "config.json").write_text(to_json(config))
    return folder
