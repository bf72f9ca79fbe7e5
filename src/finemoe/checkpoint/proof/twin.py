"""Does our code compute what transformers computes? A tiny random twin of a configuration goes through both.

The twin has the family and every switch of the original (rope scaling, groups, score function, norms, biases, ties)
and sizes that take a second. transformers runs in a separate process, where it is installed at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finemoe.checkpoint.huggingface.families import family_of
from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import IRRELEVANT
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.proof import witness
from finemoe.model.config import ModelConfig

TOLERANCE = 5e-5
"""Largest difference of rounding; a setting read differently shows from about 1e-3 on."""
DEADLINE_SECONDS = 120
_VOCAB, _SEQ, _POSITIONS = 64, 48, 256


@dataclass(frozen=True)
class TwinResult:
    """What became of a twin."""

    status: Literal["verified", "differs", "could not"]
    difference: float | None
    """max |ours - theirs| / max |theirs| over all logits; None where transformers gave none."""
    tolerance: float
    reason: str
    """A sentence for the user, whatever the status."""
    transformers: str | None
    """Version of the witness."""


def verify_twin(raw_config: Mapping[str, Any], *, seed: int = 0) -> TwinResult:
    """Compare our logits of a tiny twin of `raw_config`, a Hugging Face config.json, with transformers'.

    Multi-token prediction modules and FP8 storage are no part of the twin.

    Raises:
        CheckpointError: the configuration is one that we refuse.
    """
    family = family_of(raw_config)
    family.to_config(raw_config)
    if not family.native:
        return _could_not(f"transformers has no {family.name!r} of its own, and code from the repository is never run")
    try:
        return _verify(family, shrink(raw_config), seed)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return _could_not(f"no twin can be written: {reason or error}")


def _verify(family: Family, raw: Mapping[str, Any], seed: int) -> TwinResult:
    with tempfile.TemporaryDirectory(prefix="finemoe-twin-") as name:
        folder = Path(name)
        tokens = _write(folder, family, raw, seed)
        with torch.no_grad():
            model = load_model(folder)
            ours = model.logits(model(tokens).hidden)
        failed = _run_witness(folder)
        if failed is not None:
            return failed
        report = json.loads((folder / "witness.json").read_text(encoding="utf-8"))
        theirs = load_file(folder / "logits.safetensors")["logits"]
    return _compare(ours, theirs, report)


def _compare(ours: Tensor, theirs: Tensor, report: Mapping[str, Any]) -> TwinResult:
    version = str(report["transformers"])
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if report["odd"]:
        kind, names = next(iter(report["odd"].items()))
        reason = f"transformers {version} finds {kind.replace('_', ' ')}: {', '.join(names)}"
        return TwinResult("differs", difference, TOLERANCE, reason, version)
    against = f"a tiny random twin against transformers {version}: logits differ by {difference:.1e} of the largest"
    if difference <= TOLERANCE:
        return TwinResult("verified", difference, TOLERANCE, against, version)
    return TwinResult("differs", difference, TOLERANCE, f"{against}, and {TOLERANCE:.0e} is rounding", version)


def _could_not(reason: str) -> TwinResult:
    return TwinResult("could not", None, TOLERANCE, reason, None)


def shrink(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The twin's config.json: `raw` with small sizes and the same switches."""
    left = IRRELEVANT.keys() | {"quantization_config", "qk_head_dim"}
    small = {key: value for key, value in raw.items() if key not in left or key == "model_type"}
    small |= {"vocab_size": _VOCAB, "hidden_size": 64, "intermediate_size": 48, "initializer_range": 0.02}
    small |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "torch_dtype": "float32"}
    config = family_of(raw).to_config(raw)
    small |= _positions(raw, config) | _layers(raw, config) | _attention(raw, config)
    first = next((config.blocks[i].feed_forward for i in config.moe_layers), None)
    if first is not None:
        small |= _experts(raw, first.num_routed_experts, first.experts_per_token, first.num_shared_experts)
    return small


def _positions(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """An original context of `_POSITIONS`, so that 48 tokens see the scaling; the same ratio to the longest one."""
    found: dict[str, Any] = {}
    longest = config.max_positions or _POSITIONS
    ratio = 1.0
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(name), Mapping):
            found[name] = dict(raw[name])
            original = raw[name].get("original_max_position_embeddings")
            if original:
                found[name]["original_max_position_embeddings"] = _POSITIONS
                ratio = max(1.0, longest / original)
    if raw.get("original_max_position_embeddings"):
        found["original_max_position_embeddings"] = _POSITIONS
    found["max_position_embeddings"] = round(_POSITIONS * min(ratio, 1024.0))
    if raw.get("sliding_window"):
        found["sliding_window"] = found["max_position_embeddings"]  # idle, as it was
    return found


def _layers(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """As many layers as show every kind: dense ones at the bottom or in between, and what routes."""
    count = min(len(config.blocks), 4)
    found: dict[str, Any] = {"num_hidden_layers": count}
    if "layer_types" in raw:
        found["layer_types"] = ["full_attention"] * count
    if "first_k_dense_replace" in raw:
        found["first_k_dense_replace"] = min(int(raw["first_k_dense_replace"]), 1 if config.moe_layers else count)
    if raw.get("mlp_only_layers"):
        found["mlp_only_layers"] = [layer for layer in raw["mlp_only_layers"] if layer < count - 1] or [0]
    if config.moe_layers and raw.get("decoder_sparse_step"):
        found["decoder_sparse_step"] = min(int(raw["decoder_sparse_step"]), 2)
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        if name in raw or config.mtp:
            found[name] = 0
    return found


def _attention(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    attention = config.blocks[0].attention
    found: dict[str, Any] = {"num_attention_heads": 4}
    if attention.kind == "latent":
        found |= {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 16, "v_head_dim": 8}
        found["q_lora_rank"] = None if attention.q_lora_rank is None else 24
        return found | {"num_key_value_heads": 4} | ({"head_dim": 16} if "head_dim" in raw else {})
    groups = attention.num_heads // attention.num_kv_heads
    found["num_key_value_heads"] = 4 if groups == 1 else 1 if attention.num_kv_heads == 1 else 2
    plain = attention.num_heads * attention.head_dim == config.hidden_size
    if raw.get("head_dim") or not plain:
        found["head_dim"] = 16 if plain else 24
    return found


def _experts(raw: Mapping[str, Any], experts: int, chosen: int, shared: int) -> dict[str, Any]:
    groups = int(raw.get("n_group") or 1)
    small = min(groups, 4)
    kept = max(1, min(int(raw.get("topk_group") or 1), small - 1)) if groups > 1 else 1
    count = min(experts, 3 * small if groups > 1 else 8)
    reach = count // small * kept if groups > 1 else count
    per_token = min(chosen, 3, reach)
    found = {"num_experts_per_tok": per_token, "moe_intermediate_size": 20}
    found |= {name: count for name in ("n_routed_experts", "num_experts", "num_local_experts") if name in raw}
    found |= {"n_group": small, "topk_group": kept} if raw.get("n_group") else {}
    if raw.get("n_shared_experts"):
        found["n_shared_experts"] = min(shared, 2)
    if raw.get("shared_expert_intermediate_size"):
        found["shared_expert_intermediate_size"] = 20 * min(shared, 2)
    return found


def _write(folder: Path, family: Family, raw: Mapping[str, Any], seed: int) -> Tensor:
    """Config, weights and tokens of the twin; the tokens."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        placement.theirs: _draw(placement.theirs, placement.shape, raw, generator)
        for placement in family.placements(family.to_config(raw))
        if placement.theirs != "lm_head.weight" or not raw.get("tie_word_embeddings")
    }
    tokens = torch.randint(_VOCAB, (2, _SEQ), generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return tokens


def _draw(name: str, shape: tuple[int, ...], raw: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """Weights at which every switch shows: sharp attention and routing, biases of both signs, states near each eps."""
    drawn = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * drawn
    if "embed_tokens" in name:
        drawn[::4] *= 1e-3  # as small as the eps of the first norm
        return drawn
    if len(shape) == 1:
        return 0.3 * drawn
    drawn *= 1.5 * shape[-1] ** -0.5
    if "q_a_proj" in name or "kv_a_proj" in name:
        drawn[: raw["kv_lora_rank"] if "kv_a_proj" in name else None] *= 1e-3  # latents, not the rotary key
    return drawn


def _run_witness(folder: Path) -> TwinResult | None:
    """Have transformers compute; None where it did."""
    # No cache and no network; -P, because the modules beside the script are no top-level ones.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-P", str(Path(witness.__file__)), str(folder)]
    environment = {**os.environ, **offline, "HF_HOME": str(folder / "home")}
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, timeout=DEADLINE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return _could_not(f"transformers did not answer within {DEADLINE_SECONDS} seconds")
    except OSError as error:
        return _could_not(f"no second process could be started: {error.strerror or error}")
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
    if done.returncode == witness.MISSING:
        if "No module named 'transformers'" in lines[-1]:
            return _could_not("transformers is not installed; `pip install transformers`, and verify again")
        return _could_not(f"transformers is installed, and cannot be imported: {lines[-1][:300]}")
    if done.returncode < 0:  # as for want of memory: nobody has compared anything
        return _could_not(f"the process in which transformers computes was ended by signal {-done.returncode}")
    if done.returncode:
        return TwinResult("differs", None, TOLERANCE, f"transformers cannot open the twin: {lines[-1][:300]}", None)
    return None
