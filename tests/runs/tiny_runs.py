"""Whole training runs that take a fraction of a second: corpus, recipes, and what a run left behind."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finemoe.core.config import merge
from finemoe.core.logs import read_json_lines
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer

LENGTH = 16
WIDTH = 24  # of one standard feed-forward layer

_MOE = {"kind": "moe", "num_routed_experts": 4, "expert_hidden_size": WIDTH, "balance": {"expert": 0.01}}
_SOFTMAX = {"router": {"kind": "softmax_topk"}}
_HASH = {"router": {"kind": "hash_layer"}, "balance": {"expert": 0.0}}
_FINE = {"num_shared_experts": 1, "num_routed_experts": 15, "expert_hidden_size": WIDTH // 4}

FEED_FORWARDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "ffn_hidden_size": WIDTH},
    "hash": {**_MOE, **_HASH, "experts_per_token": 1},
    "switch": {**_MOE, **_SOFTMAX, "experts_per_token": 1},
    "gshard": {**_MOE, **_SOFTMAX, "experts_per_token": 2},
    "deepseek-moe": {**_MOE, **_SOFTMAX, **_FINE, "experts_per_token": 7},
}
"""The five arms of the paper in miniature: 4 standard layers in all, 1 or 2 of them active."""

_LATENT = {
    "kind": "latent",
    "num_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_GROUPED = {
    "kind": "moe",
    "num_shared_experts": 1,
    "num_routed_experts": 8,
    "experts_per_token": 3,
    "expert_hidden_size": WIDTH // 4,
}
_FIRST_DENSE = {"count": 1, "feed_forward": {"kind": "dense", "ffn_hidden_size": WIDTH}}
_V2 = {
    "router": {"kind": "group_limited", "num_groups": 4, "groups_per_token": 2},
    "balance": {"expert": 0.003, "device": 0.05, "communication": 0.02, "num_devices": 4},
}
_V3 = {
    "router": {"kind": "sigmoid_biased", "num_groups": 4, "groups_per_token": 2, "route_scale": 2.5},
    "balance": {"sequence": 0.01},
}

LADDER: dict[str, dict[str, Any]] = {
    "v2": {
        "model": {"attention": _LATENT, "leading": _FIRST_DENSE, "feed_forward": {**_GROUPED, **_V2}},
    },
    "v3": {
        "model": {"attention": _LATENT, "leading": _FIRST_DENSE, "feed_forward": {**_GROUPED, **_V3}, "mtp_depth": 2},
        "balancing": {"rate": 0.05},
    },
}
"""DeepSeek-V2 and V3: latent attention, groups of experts; biases that move and two prediction modules in V3."""

_WORDS = "a be cat dog ear fox gnu hen ink jay kit low map nut owl pig rat sun tea urn van wax yak zoo".split()  # noqa: SIM905


def write_corpus(folder: Path, documents: int = 8, words: int = 160, seed: int = 0) -> Path:
    """`folder/train/*.txt` and `folder/validation.txt`: words that like to follow each other, from a seed."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        place, out = 0, []
        for _ in range(words):
            place = (place + (1, 2, 5)[int(rng.random() * 3)]) % len(_WORDS)
            out.append(_WORDS[place])
        return " ".join(out) + ".\n"

    (folder / "train").mkdir(parents=True)
    for number in range(documents):
        (folder / "train" / f"{number}.txt").write_text(text(words))
    (folder / "validation.txt").write_text(text(160))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus, with its cache beside it, for all tests of a process that do not change it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def recipe(corpus: Path, arm: str = "deepseek-moe", **tables: Any) -> dict[str, Any]:
    """A recipe of 6 steps of 4 sequences; `tables` are laid on top."""
    own = deepcopy(LADDER.get(arm, {}))  # whoever gets it may change it
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = own.pop("model", None) or {"attention": attention, "feed_forward": deepcopy(FEED_FORWARDS[arm])}
    return merge(
        {
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "num_layers": 2,
                "init_std": 0.05,
                **model,
            },
            "data": data_table(corpus),
            "training": {"steps": 6, "tokens_per_step": 4 * LENGTH, "checkpoint_every": 2, "threads": 1},
            "optimizer": {"learning_rate": 0.01},
            **own,
        },
        tables,
    )


def data_table(corpus: Path) -> dict[str, Any]:
    """The `data` table for a corpus of `write_corpus`."""
    return {
        "corpus": {
            "kind": "files",
            "paths": [str(corpus / "train")],
            "validation_paths": [str(corpus / "validation.txt")],
        },
        "vocab_size": 300,
        "sequence_length": LENGTH,
        "cache_dir": str(corpus / "cache"),
    }


def records(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what time decides: some figures, and when a checkpoint was written."""
    timed = ("seconds", "tokens_per_second", "processor_seconds")
    found = [
        {key: value for key, value in record.items() if key not in timed}
        for record in read_json_lines(directory / "metrics.jsonl")
        if record["kind"] != "checkpoint"
    ]
    for record in found:
        shares = [name for name in record.get("figures", {}) if name.startswith("time_")]
        if shares:
            record["figures"] = {name: one for name, one in record["figures"].items() if name not in shares}
    return found


def steps(directory: Path) -> list[dict[str, Any]]:
    """The step records of metrics.jsonl."""
    return [record for record in records(directory) if record["kind"] == "step"]


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted((directory / "checkpoints").glob("step-*"))


def newest_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer state and the method's own of the newest checkpoint, and state.json without the time."""
    newest = checkpoints(directory)[-1]
    tensors = {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}
    if (newest / "method.safetensors").exists():
        kept = load_file(newest / "method.safetensors")  # bits, as there may be NaN
        tensors |= {f"{name} {tuple(one.shape)}": one.flatten().view(torch.uint8) for name, one in kept.items()}
    state = json.loads((newest / "state.json").read_text())
    state.pop("seconds")
    return tensors, state


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run stops after `step`, as on Ctrl-C; the ones after it do not."""
    original = Trainer.step

    def stepping(trainer: Trainer, *arguments: Any) -> StepReport:
        report = original(trainer, *arguments)
        if report.step == step:
            trainer.request_stop()
            monkeypatch.setattr(Trainer, "step", original)
        return report

    monkeypatch.setattr(Trainer, "step", stepping)


def assert_same_run(left: Path, right: Path) -> None:
    """Weights, optimizer, random state and metrics are equal bit for bit; only times may differ."""
    (left_tensors, left_state), (right_tensors, right_state) = newest_state(left), newest_state(right)
    assert left_tensors.keys() == right_tensors.keys()
    for name, tensor in left_tensors.items():
        assert torch.equal(tensor, right_tensors[name]), name
    assert left_state == right_state
    assert records(left) == records(right)
