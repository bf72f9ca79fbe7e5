"""Memory: the estimate against what processes take, and runs that cannot fit are refused before they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finemoe.core import memory
from finemoe.core.errors import RunError
from finemoe.runs.config import resolve_run
from finemoe.runs.footprint import WITHIN, footprint
from finemoe.runs.run import resume, train
from runs.tiny_runs import recipe, write_corpus

_MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
from finemoe.core import memory
from finemoe.runs.config import resolve_run
from finemoe.runs.footprint import footprint
from finemoe.runs.kernels import kernels_for
from finemoe.parallel.world import SOLO
from finemoe.runs.run import _trainer
from finemoe.runs.start import build_method

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

config = resolve_run(json.loads(sys.argv[1]), "test")
method = build_method(config)
chosen = kernels_for(config)
config = config.model_copy(update={"kernels": chosen.kernels})
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to be used again unseen
Path("/proc/self/clear_refs").write_text("5")  # the height so far is forgotten
before = status("VmRSS")
trainer = _trainer(config, method, Path("x"), chosen.kernels, None, SOLO)
for _ in range(2):
    trainer.step(trainer.micro_batches())
trainer.measure()
print(json.dumps({"taken": status("VmHWM") - before, "estimated": footprint(config).needed}))
"""

_WIDE = {"attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32}}
_DENSE = {"kind": "dense", "ffn_hidden_size": 768}
_EXPERTS = {"kind": "moe", "num_routed_experts": 32, "num_shared_experts": 1, "experts_per_token": 6}
_MOE = {**_EXPERTS, "expert_hidden_size": 128, "router": {"kind": "softmax_topk"}}
_LENGTH = {"sequence_length": 128, "max_validation_tokens": 1024}
_LONG = {"data": _LENGTH, "training": {"tokens_per_step": 8192, "micro_batch_tokens": 8192}}
MODELS: dict[str, dict[str, Any]] = {
    "mostly activations": {"model": {**_WIDE, "hidden_size": 128, "num_layers": 4, "feed_forward": _DENSE}},
    "experts in torch": {
        "model": {**_WIDE, "hidden_size": 128, "num_layers": 2, "feed_forward": _MOE},
        "kernels": {"experts": "sorted_slices", "products": "torch"},
    },
    "mostly weights": {
        "model": {**_WIDE, "hidden_size": 256, "num_layers": 2, "feed_forward": {**_MOE, "num_routed_experts": 64}},
        "training": {"tokens_per_step": 256, "micro_batch_tokens": 256},
    },
}
MODELS["mostly weights, moments in bf16"] = {**MODELS["mostly weights"], "optimizer": {"moments": "bf16"}}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="asks Linux for the height of a process")
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_near_what_a_process_takes(tmp_path: Path, name: str) -> None:
    raw = recipe(write_corpus(tmp_path / "corpus", documents=40, words=900), "dense", **_LONG)
    raw = {**raw, **{key: {**raw.get(key, {}), **table} for key, table in MODELS[name].items()}}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, json.dumps(raw)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 1 / WITHIN < found["taken"] / found["estimated"] < WITHIN, found


def test_what_cannot_fit_is_refused_with_both_numbers_and_what_to_lower(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = footprint(resolve_run(recipe(corpus), "test")).needed
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(RunError, match=r"needs about 0\.\d+ GiB of memory, and 0\.\d+ GiB are available: weights"):
        train(recipe(corpus), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    regardless = recipe(corpus, training={"memory_check": False})
    assert train(regardless, out=tmp_path / "regardless", quiet=True).summary["steps"] == 6
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    assert train(recipe(corpus), out=tmp_path / "run", quiet=True).summary["steps"] == 6


def test_a_run_that_goes_on_where_there_is_less_is_refused_and_untouched(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(recipe(corpus), out=tmp_path / "run", quiet=True).directory
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(RunError, match="memory_check=false"):
        resume(out, overrides=["training.steps=8"], quiet=True)
    assert (out / "summary.json").exists()
    again = resume(out, overrides=["training.steps=8", "training.memory_check=false"], quiet=True)
    assert again.summary["steps"] == 8


def test_smaller_pieces_recomputing_and_fewer_layers_take_less(corpus: Path) -> None:
    def needed(**tables: Any) -> int:
        return footprint(resolve_run(recipe(corpus, **{**_LONG, **tables}), "test")).needed

    small = {"training": {"tokens_per_step": 8192, "micro_batch_tokens": 1024}}
    deep = recipe(corpus)["model"] | {"num_layers": 8}
    assert needed(**small) < needed()
    assert needed(model=deep, kernels={"recompute": True}) < needed(model=deep)
    assert needed() < needed(model=deep)


def test_advice_names_the_micro_batch_where_activations_are_what_does_not_fit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe(corpus, **_LONG)
    found = footprint(resolve_run(raw, "test"))
    monkeypatch.setattr(memory, "available_bytes", lambda: found.needed - found.activations // 4)
    with pytest.raises(RunError, match=r"training\.micro_batch_tokens=2048, kernels\.recompute=true"):
        train(raw, out=tmp_path / "run", quiet=True)
    monkeypatch.setattr(memory, "available_bytes", lambda: found.weights)
    with pytest.raises(RunError, match="Try a smaller model"):
        train(raw, out=tmp_path / "run", quiet=True)
