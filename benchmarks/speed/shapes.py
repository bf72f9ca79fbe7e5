"""What is measured: models and layers by their shapes, batches, and models written for others to read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.model.config import Kernels, ModelConfig, expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer

Table = dict[str, Any]
PURE_TORCH = Kernels(attention="sdpa", experts="sorted_slices", products="torch")
"""The best of plain torch before there were kernels of our own."""


def init_std(hidden: int) -> float:
    """The papers' 0.006 at 1280, scaled so that a projection keeps the size of its input."""
    return round(0.006 * (1280 / hidden) ** 0.5, 4)


def model_config(table: Table) -> ModelConfig:
    """A `[model]` table, expanded."""
    return expand(resolve({"init_std": init_std(table["hidden_size"]), **table}, "the benchmark"))


def moe(experts: int, width: int, top_k: int, shared: int = 1, router: Table | None = None) -> Table:
    """A feed-forward layer of routed and shared experts."""
    return {
        "kind": "moe",
        "num_routed_experts": experts,
        "experts_per_token": top_k,
        "expert_hidden_size": width,
        "num_shared_experts": shared,
        "router": router or {"kind": "softmax_topk"},
    }


def dense(width: int) -> Table:
    """One SwiGLU."""
    return {"kind": "dense", "ffn_hidden_size": width}


def latent(heads: int, query_rank: int, rank: int) -> Table:
    """Multi-head latent attention with heads of 64 and 32 rotary ones."""
    return {
        "kind": "latent",
        "num_heads": heads,
        "q_lora_rank": query_rank,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    }


def grouped_query(heads: int, kv_heads: int) -> Table:
    """Grouped-query attention with heads of 64."""
    return {"kind": "grouped_query", "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 64}


def v3_model(layers: int = 6) -> ModelConfig:
    """Shaped like DeepSeek-V3: 193 M parameters at 6 layers, 43 M of them active, embedding included."""
    router = {"kind": "sigmoid_biased", "num_groups": 8, "groups_per_token": 4, "route_scale": 2.5}
    return model_config(
        {
            "vocab_size": 12_288,
            "hidden_size": 512,
            "num_layers": layers,
            "attention": latent(8, 256, 128),
            "leading": {"count": 1, "feed_forward": dense(2752)},
            "feed_forward": moe(64, 344, 7, router=router),
        }
    )


def llama_model(layers: int = 16) -> ModelConfig:
    """Shaped like Llama: about 200 M parameters that a token reads at 16 layers."""
    return model_config(
        {
            "vocab_size": 16_384,
            "hidden_size": 1024,
            "num_layers": layers,
            "attention": grouped_query(16, 4),
            "feed_forward": dense(2816),
        }
    )


def v3_decoder(layers: int = 10) -> ModelConfig:
    """Shaped like DeepSeek-V3: about 200 M parameters that a token reads at 10 layers, of 550 M."""
    return model_config(
        {
            "vocab_size": 12_288,
            "hidden_size": 1024,
            "num_layers": layers,
            "attention": latent(16, 512, 256),
            "leading": {"count": 1, "feed_forward": dense(8 * 688)},
            "feed_forward": moe(24, 688, 7, router={"kind": "sigmoid_biased", "route_scale": 2.5}),
        }
    )


def expert_model(feed_forward: Table, layers: int) -> ModelConfig:
    """A model of width 512 around one kind of feed-forward layer."""
    return model_config(
        {
            "vocab_size": 4096,
            "hidden_size": 512,
            "num_layers": layers,
            "attention": grouped_query(8, 8),
            "feed_forward": feed_forward,
        }
    )


@dataclass(frozen=True)
class LayerShape:
    """An MoE layer and how many tokens it sees."""

    hidden: int
    tokens: int
    experts: int
    width: int
    """Of one expert."""
    top_k: int
    shared: int = 1

    @property
    def active_width(self) -> int:
        """Of the dense layer of as many active parameters."""
        return (self.top_k + self.shared) * self.width

    @property
    def flops(self) -> float:
        """Forward and backward: 6 for each active weight and token, without the router."""
        return 6.0 * 3 * self.hidden * self.active_width * self.tokens

    def table(self) -> Table:
        """Of the layer."""
        return moe(self.experts, self.width, self.top_k, self.shared)


def build(config: ModelConfig, kernels: Kernels | None = None) -> Transformer:
    """A model with drawn weights, the same for the same configuration."""
    model = Transformer(config, kernels)
    initialize(model, seed=0)
    return model


def layer(hidden: int, feed_forward: Table, kernels: Kernels | None = None) -> Any:
    """The feed-forward layer of a model of one block, in training mode."""
    table = {"vocab_size": 16, "hidden_size": hidden, "num_layers": 1, "attention": grouped_query(1, 1)}
    return build(model_config({**table, "feed_forward": feed_forward}), kernels).train().blocks[0].feed_forward


def token_ids(config: ModelConfig, sequences: int, length: int, seed: int = 1) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(config.vocab_size, (sequences, length), generator=generator).tolist()
    return ids


def write_run(config: ModelConfig, folder: Path, length: int) -> Path:
    """A run directory with one checkpoint of drawn weights: what `finemoe export` and `load_model` open."""
    table = {"model": config.model_dump(mode="json"), "data": {"sequence_length": length}}
    model = build(config)
    save(folder / "checkpoints", 0, RunState(model.state_dict(), {}, {}, json.dumps(table)), keep=1)
    return folder
