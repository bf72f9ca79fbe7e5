"""Record deepseek_moe.json again: `python tests/parity/record_deepseek_moe.py`. A deliberate act: review the change.

Logits of tiny DeepSeekMoE models, computed by the oracle in float64 from seeded weights.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("deepseek_moe.json")
IDS = [3, 17, 0, 5, 5, 29, 11, 8, 2, 30]
_BASE: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.006,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 6,
    "moe_layer_freq": 1,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 31,
}
CASES: dict[str, dict[str, Any]] = {
    "as released": _BASE,
    "normalised, two key heads": {**_BASE, "norm_topk_prob": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    "every second layer, no shared experts": {
        **_BASE,
        "moe_layer_freq": 2,
        "n_shared_experts": None,
        "num_hidden_layers": 5,
    },
    "one expert, linear scaling": {
        **_BASE,
        "norm_topk_prob": True,
        "num_experts_per_tok": 1,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
}


def weights(raw: dict[str, Any]) -> dict[str, Tensor]:
    """Seeded float64 tensors under the names of the released files."""
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    keys = hidden // heads * raw["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (raw["vocab_size"], hidden)}

    def swiglu(at: str, width: int) -> None:
        shapes[at + "gate_proj.weight"] = shapes[at + "up_proj.weight"] = (width, hidden)
        shapes[at + "down_proj.weight"] = (hidden, width)

    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        shapes[at + "self_attn.q_proj.weight"] = shapes[at + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[at + "self_attn.k_proj.weight"] = shapes[at + "self_attn.v_proj.weight"] = (keys, hidden)
        if layer < raw["first_k_dense_replace"] or layer % raw["moe_layer_freq"]:
            swiglu(at + "mlp.", raw["intermediate_size"])
            continue
        shapes[at + "mlp.gate.weight"] = (raw["n_routed_experts"], hidden)
        for expert in range(raw["n_routed_experts"]):
            swiglu(f"{at}mlp.experts.{expert}.", raw["moe_intermediate_size"])
        if raw["n_shared_experts"]:
            swiglu(at + "mlp.shared_experts.", raw["n_shared_experts"] * raw["moe_intermediate_size"])
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (raw["vocab_size"], hidden)}
    return {name: _wave(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def _wave(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers that look random and need no generator, so that they are the same everywhere."""
    count = math.prod(shape)
    phases = torch.arange(1, count + 1, dtype=torch.float64) * (math.sqrt(2) + 0.1 * seed) * 1000
    values = torch.tensor([math.modf(abs(math.sin(float(phase))) * 1e4)[0] - 0.5 for phase in phases])
    values = values.double().reshape(shape)
    return 1 + 0.4 * values if len(shape) == 1 else values * 5 / math.sqrt(shape[-1])


def main() -> None:
    """Write deepseek_moe.json."""
    from parity import deepseek_moe_oracle

    table = {}
    for name, raw in CASES.items():
        found = deepseek_moe_oracle.logits(raw, weights(raw), IDS)
        table[name] = [[round(float(value), 9) for value in row[:8]] for row in found]
    GOLDEN.write_text(json.dumps({"ids": IDS, "logits of the first 8 tokens": table}, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
