"""DeepSeek-V2, V2-Lite and Coder-V2: latent attention; softmax gates, plain or group-limited, never normalised."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.latent import read_latent, the_latent, write_latent
from finemoe.checkpoint.huggingface.layers import read_leading, refuse_mtp, write_leading
from finemoe.checkpoint.huggingface.routing import check_gate, read_expert_balance, write_expert_balance
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.group_limited import GroupLimitedConfig
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig


def _read(fields: Fields) -> ModelConfig:
    attention = read_latent(fields, "interleaved")
    fields.only("scoring_func", "softmax", why="this family's routers score by softmax")
    fields.only(
        "norm_topk_prob",
        False,
        why="DeepSeek's code then normalises the gates without scaling them, transformers scales without normalising",
    )
    scale = fields.number("routed_scaling_factor")
    fields.only("topk_method", "greedy", "gready", "group_limited_greedy", why="only greedy and group_limited_greedy")
    if fields.value("topk_method") == "group_limited_greedy":
        router = {
            "kind": "group_limited",
            "num_groups": fields.integer("n_group"),
            "groups_per_token": fields.integer("topk_group"),
            "route_scale": scale,
        }
    else:  # the groups, where there are any, are not looked at
        router = {"kind": "softmax_topk", "route_scale": scale}
        for name in ("n_group", "topk_group"):
            fields.has(name)
    return read_leading(fields, attention, router, balance=read_expert_balance(fields))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    attention = the_latent(config)
    layers, moe = write_leading(config)
    refuse_mtp(config)
    if attention.rope.layout != "interleaved":
        raise CheckpointError(f"its rotary layout is {attention.rope.layout}, and the family's interleaved")
    if config.hidden_size % attention.num_heads:
        raise CheckpointError(f"hidden_size {config.hidden_size} is no multiple of its {attention.num_heads} heads")
    return {
        **write_latent(config, attention, max_positions),
        **layers,
        **({} if moe is None else _write_router(config, moe)),
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "seq_aux": True,
    }


def _write_router(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    check_gate(moe, gated=False)
    router = moe.router
    if isinstance(router, GroupLimitedConfig):
        groups = {"n_group": router.num_groups, "topk_group": router.groups_per_token}
        values = {"topk_method": "group_limited_greedy", **groups}
    elif isinstance(router, SoftmaxTopKConfig):
        if router.normalize_gates:
            raise CheckpointError("its gates are normalised, which DeepSeek's code and transformers do differently")
        values = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    else:
        raise CheckpointError(f"its router is {router.kind}, and the family's softmax_topk or group_limited")
    return {**values, "aux_loss_alpha": write_expert_balance(config), "routed_scaling_factor": router.route_scale}


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _read,
    _write,
    defaults={
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 1.0,
        "seq_aux": True,
        "topk_method": "greedy",
    },
    keeps=("balance.expert",),
)
