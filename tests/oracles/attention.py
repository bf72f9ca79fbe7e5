"""Attention with explicit loops: grouped-query head by head, latent token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finemoe.model.attention.latent import LatentConfig
from oracles import rope


def repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """Grouped-query attention as multi-head: each key head stands once for every query head it serves."""
    share = num_heads // states.shape[1]
    return torch.stack([states[:, head // share] for head in range(num_heads)], dim=1)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """softmax_j(scale · q_i . k_j) v_j over the j that `mask` shows, key by key. No scale: 1 / sqrt(d)."""
    batch, heads, seq, dim = query.shape
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(seq):
                seen = [j for j in range(key.shape[2]) if mask[b, h, i, j]]
                weights = [torch.exp((query[b, h, i] * key[b, h, j]).sum() * scale) for j in seen]
                mixed = [w * value[b, h, j] for w, j in zip(weights, seen, strict=True)]
                rows.append(sum(mixed) / sum(weights))
    return torch.stack(rows).view(batch, heads, seq, -1)


def causal(batch: int, heads: int, seq: int) -> Tensor:
    """Query i sees keys 0 to i."""
    return torch.tensor([[j <= i for j in range(seq)] for i in range(seq)]).expand(batch, heads, seq, seq)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def latent_attention(
    module: nn.Module, h: Tensor, positions: Tensor, mask: Tensor, frequencies: Sequence[float], scale: float
) -> Tensor:
    """V2 section 2.1.2-2.1.3 (Eq. 37-47), one token and one head after the other, from the weights of `module`.

    `h [batch, seq, hidden]`; `mask [batch, seq, seq]`, True where a token sees another.
    """
    config: LatentConfig = module.config  # type: ignore[assignment]
    weights = {name: value.double() for name, value in module.named_parameters()}
    plain, turning, values, width = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.kv_lora_rank,
    )

    def turned(x: Tensor, position: Tensor) -> Tensor:
        return rope.rotate(x.view(1, 1, 1, -1), position.view(1, 1), frequencies, config.rope.layout).view(-1)

    rows = []
    for b, sequence in enumerate(h.double()):
        latents, rotary_keys, queries = [], [], []
        for t, x in enumerate(sequence):
            if config.q_lora_rank is None:
                q = weights["q_proj.weight"] @ x
            else:
                c_q = weights["q_down_proj.weight"] @ x  # Eq. 37
                q = weights["q_proj.weight"] @ norm(c_q, weights["q_norm.weight"], config.latent_norm_eps)  # Eq. 38-39
            heads = q.view(config.num_heads, plain + turning)
            queries.append([torch.cat((q_i[:plain], turned(q_i[plain:], positions[b, t]))) for q_i in heads])  # Eq. 40
            c_kv = weights["kv_down_proj.weight"][:width] @ x  # Eq. 41
            latents.append(norm(c_kv, weights["kv_norm.weight"], config.latent_norm_eps))
            rotary_keys.append(turned(weights["kv_down_proj.weight"][width:] @ x, positions[b, t]))  # Eq. 43
        ups = weights["kv_up_proj.weight"].view(config.num_heads, plain + values, width)
        for t in range(len(sequence)):
            outputs = []
            for i, up in enumerate(ups):
                seen = [j for j in range(len(sequence)) if mask[b, t, j]]
                keys = [torch.cat((up[:plain] @ latents[j], rotary_keys[j])) for j in seen]  # Eq. 42, 44
                score = torch.stack([torch.exp(queries[t][i] @ k * scale) for k in keys])
                mixed = [s * (up[plain:] @ latents[j]) for s, j in zip(score, seen, strict=True)]  # Eq. 45-46
                outputs.append(sum(mixed) / score.sum())
            rows.append(weights["o_proj.weight"] @ torch.cat(outputs))  # Eq. 47
    return torch.stack(rows).view(h.shape)
