"""Tiny checkpoints laid out as published ones are, written by the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.fp8 import scale_shape
from finemoe.checkpoint.storage.safetensors import TensorFolder, raw_bytes
from finemoe.text import Tokenizer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
TIED = {**LLAMA, "tie_word_embeddings": True}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 136,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 140,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
FP8_SETTINGS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
V3_FP8 = {**V3, "quantization_config": FP8_SETTINGS}
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def tensors_of(raw: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, bf16 but for the selection bias; projections in FP8 where the config says so."""
    family = FAMILIES[raw["model_type"]]
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    originals: dict[str, str] = {}
    for placement in family.placements(family.to_config(raw)):
        key = placement.theirs
        original = originals.setdefault(placement.ours + str(placement.index), key)
        if original != key:
            if key != "lm_head.weight":
                found[key] = found[original].clone()
            continue
        weight = torch.randn(placement.shape, generator=draw) * 0.2
        if key.endswith("_bias"):
            found[key] = weight
        elif "quantization_config" in raw and "_proj" in key and "eh_proj" not in key:
            scale = torch.rand(scale_shape(placement.shape), generator=draw) * 1e-3 + 1e-4
            found[key] = (weight * 400).to(torch.float8_e4m3fn)
            found[f"{key}_scale_inv"] = scale
        else:
            found[key] = weight.bfloat16()
    return found


def write_weights(folder: Path, contents: dict[str, Tensor], shards: int = 1) -> None:
    """`model.safetensors`, or shards and their index."""
    if shards == 1:
        save_file(contents, folder / "model.safetensors", {"format": "pt"})
        return
    table: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(contents.items())[shard::shards])  # neighbours lie in different files
        save_file(part, folder / name, {"format": "pt"})
        table |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in contents.values())
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def publish(
    folder: Path, raw: dict[str, Any], *, shards: int = 1, seed: int = 0, extra: Mapping[str, Tensor] | None = None
) -> Path:
    """A whole folder; `extra` tensors are added, or take the place of those of their name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast", "eos_token": "x"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    Tokenizer.train(["abc abd " * 9], 260).save(folder / "tokenizer.json")
    (folder / "README.md").write_text("read me")
    write_weights(folder, tensors_of(raw, seed) | dict(extra or {}), shards)
    return folder


def contents_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, to the bit."""
    opened = TensorFolder.open(folder)
    return {
        name: (str(info.dtype), info.shape, bytes(raw_bytes(opened.read(name))))
        for name, info in opened.tensors.items()
    }
