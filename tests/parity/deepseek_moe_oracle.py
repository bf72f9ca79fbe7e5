"""DeepSeekMoE 16B ("deepseek") token by token, in plain loops over the tensors of a file: DeepSeekMoE eq. 1-11.

Written from the paper and from what its config.json says: Llama's attention with half-split rotation, the first layers
dense, softmax over all experts before the top k, gates as they are (or over their sum), shared experts always on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def logits(raw: Mapping[str, Any], weights: Weights, ids: list[int]) -> Tensor:
    """`[len(ids), vocab]` in the dtype of the weights."""
    states = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = [_norm(x, weights[at + "input_layernorm.weight"], raw) for x in states]
        states = [x + a for x, a in zip(states, _attention(raw, weights, at + "self_attn.", normed), strict=True)]
        normed = [_norm(x, weights[at + "post_attention_layernorm.weight"], raw) for x in states]
        states = [x + _feed_forward(raw, weights, at + "mlp.", layer, u) for x, u in zip(states, normed, strict=True)]
    final = [_norm(x, weights["model.norm.weight"], raw) for x in states]
    return torch.stack([weights["lm_head.weight"] @ x for x in final])


def _norm(x: Tensor, weight: Tensor, raw: Mapping[str, Any]) -> Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + raw["rms_norm_eps"]) * weight


def _attention(raw: Mapping[str, Any], weights: Weights, at: str, inputs: list[Tensor]) -> list[Tensor]:
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim = raw["hidden_size"] // heads
    q, k, v = ([weights[f"{at}{name}_proj.weight"] @ x for x in inputs] for name in "qkv")
    outputs = []
    for t in range(len(inputs)):
        mixed = []
        for head in range(heads):
            own, shared = slice(head * dim, (head + 1) * dim), head // (heads // kv_heads)
            theirs = slice(shared * dim, (shared + 1) * dim)
            query = _rotate(q[t][own], t, raw)
            scores = [query @ _rotate(k[j][theirs], j, raw) / math.sqrt(dim) for j in range(t + 1)]
            shares = torch.softmax(torch.stack(scores), dim=0)
            mixed.append(sum((share * v[j][theirs] for j, share in enumerate(shares)), torch.zeros_like(query)))
        outputs.append(weights[f"{at}o_proj.weight"] @ torch.cat(mixed))
    return outputs


def _rotate(x: Tensor, position: int, raw: Mapping[str, Any]) -> Tensor:
    half = len(x) // 2
    result = x.clone()
    for i in range(half):
        angle = position / raw["rope_theta"] ** (2 * i / len(x))
        if raw.get("rope_scaling"):
            angle /= raw["rope_scaling"]["factor"]
        result[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        result[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return result


def _swiglu(weights: Weights, at: str, x: Tensor) -> Tensor:
    gate, up = weights[at + "gate_proj.weight"] @ x, weights[at + "up_proj.weight"] @ x
    return weights[at + "down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def _feed_forward(raw: Mapping[str, Any], weights: Weights, at: str, layer: int, u: Tensor) -> Tensor:
    if layer < raw["first_k_dense_replace"] or layer % raw["moe_layer_freq"]:
        return _swiglu(weights, at, u)
    affinity = torch.exp(weights[at + "gate.weight"] @ u)
    scores = affinity / affinity.sum()
    chosen = sorted(range(raw["n_routed_experts"]), key=lambda e: -float(scores[e]))[: raw["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) if raw["norm_topk_prob"] and len(chosen) > 1 else 1.0
    output = torch.zeros_like(u)
    if raw["n_shared_experts"]:
        output = output + _swiglu(weights, at + "shared_experts.", u)
    for expert in chosen:
        output = output + scores[expert] / total * _swiglu(weights, f"{at}experts.{expert}.", u)
    return output
