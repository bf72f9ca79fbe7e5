"""Families with multi-head latent attention: deepseek_v2 (V2, V2-Lite, Coder-V2) and deepseek_v3 (V3, R1)."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import read_expert_balance
from finemoe.checkpoint.huggingface.layers import (
    Layers,
    build,
    dense,
    refuse_mtp,
    the_attention,
    the_dense,
    the_moe,
    write_common,
)
from finemoe.checkpoint.huggingface.rope import read_rope, write_rope
from finemoe.core.errors import CheckpointError
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.group_limited import GroupLimitedConfig
from finemoe.model.moe.routers.sigmoid_biased import SigmoidBiasedConfig
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig
from finemoe.model.rope import RopeLayout

_LATENT_EPS = 1e-6  # a constant in DeepSeek's code and in transformers, whatever rms_norm_eps


def _attention(fields: Fields, layout: RopeLayout) -> dict[str, Any]:
    heads, rotary = fields.integer("num_attention_heads"), fields.integer("qk_rope_head_dim")
    plain = fields.integer("qk_nope_head_dim")
    if fields.has("num_key_value_heads"):
        fields.only("num_key_value_heads", heads, why=f"latent attention has a key for each of its {heads} heads")
    fields.only("head_dim", rotary, why=f"in this family it repeats qk_rope_head_dim {rotary}")
    fields.only("qk_head_dim", plain + rotary, why=f"in this family it is {plain} + {rotary}")
    return {
        "kind": "latent",
        "num_heads": heads,
        "q_lora_rank": fields.optional_integer("q_lora_rank"),
        "kv_lora_rank": fields.integer("kv_lora_rank"),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotary,
        "v_head_dim": fields.integer("v_head_dim"),
        "rope": read_rope(fields, rotary, layout, "both", fields.integer("max_position_embeddings")),
        "latent_norm_eps": _LATENT_EPS,
    }


def _layers(fields: Fields, attention: dict[str, Any], router: dict[str, Any], balance: float, mtp: int) -> ModelConfig:
    """`first_k_dense_replace` dense layers, then MoE layers to the end, the prediction modules included."""
    fields.only("moe_layer_freq", 1, why="transformers and DeepSeek's code read that differently; only 1 is clear")
    num_layers, first = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace", 0)
    plain = dense(fields.integer("intermediate_size")) if first else None
    fields.has("intermediate_size")
    if first < num_layers + mtp and fields.value("n_routed_experts") is None:
        first = num_layers + mtp
        plain = dense(fields.integer("intermediate_size"))
    moe: dict[str, Any] = {}
    names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    if first < num_layers + mtp:
        moe = {
            "kind": "moe",
            "num_routed_experts": fields.integer("n_routed_experts"),
            "experts_per_token": fields.integer("num_experts_per_tok"),
            "expert_hidden_size": fields.integer("moe_intermediate_size"),
            "num_shared_experts": fields.optional_integer("n_shared_experts", 0) or 0,
            "router": router,
            "balance": {"expert": balance},
        }
    else:
        for name in names:
            fields.has(name)
    return build(fields, Layers(attention, lambda i: plain if plain and i < first else moe, num_layers, mtp))


def read_deepseek_v2(fields: Fields) -> ModelConfig:
    """Softmax gates, plain top-k or group-limited; never normalised."""
    attention = _attention(fields, "interleaved")
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
    return _layers(fields, attention, router, read_expert_balance(fields), 0)


def read_deepseek_v3(fields: Fields) -> ModelConfig:
    """Sigmoid scores, a selection bias, groups by their two best, and prediction modules after the last layer."""
    fields.only("rope_interleave", True, False, why="true or false is needed")
    attention = _attention(fields, "half_split" if fields.value("rope_interleave") is False else "interleaved")
    fields.only("scoring_func", "sigmoid", why="this family's routers score by sigmoid")
    fields.only("topk_method", "noaux_tc", why="this family chooses by noaux_tc")
    normalize = fields.flag("norm_topk_prob")
    if normalize and fields.has("num_experts_per_tok") and fields.value("num_experts_per_tok") == 1:
        fields.refuse("num_experts_per_tok", 1, "DeepSeek's code leaves a single gate as it is, transformers does not")
    mtp = _renamed(fields, "num_nextn_predict_layers", "num_mtp_layers")
    router = {
        "kind": "sigmoid_biased",
        "num_groups": fields.integer("n_group"),
        "groups_per_token": fields.integer("topk_group"),
        "normalize_gates": normalize,
        "route_scale": fields.number("routed_scaling_factor"),
    }
    if fields.has("aux_loss_alpha") and fields.value("aux_loss_alpha"):
        fields.note(
            f"`aux_loss_alpha` {fields.value('aux_loss_alpha')} is not taken over: DeepSeek-V3's code does not use it"
        )
    return _layers(fields, attention, router, 0.0, mtp)


def _renamed(fields: Fields, name: str, alias: str) -> int:
    """A whole number with two names."""
    if fields.has(alias) and not fields.has(name):
        return fields.integer(alias, 0)
    found = fields.integer(name, 0)
    fields.only(alias, found, why=f"`{name}` is {found}; keep one")
    return found


def write_latent(config: ModelConfig, family: str, max_positions: int | None) -> dict[str, Any]:
    """The fields of `family` for `config`.

    Raises:
        CheckpointError: with the reason, where the family cannot compute what `config` does.
    """
    attention = the_attention(config)
    if not isinstance(attention, LatentConfig):
        raise CheckpointError(f"it has {attention.kind} attention, and the family latent attention")
    if attention.latent_norm_eps != _LATENT_EPS:
        raise CheckpointError(f"latent_norm_eps is {attention.latent_norm_eps:g}, and the family's {_LATENT_EPS:g}")
    values: dict[str, Any] = {
        **write_common(config, max_positions),
        **write_rope(attention.rope, attention.qk_rope_head_dim, "both"),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "kv_lora_rank": attention.kv_lora_rank,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "pretraining_tp": 1,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        **_write_layers(config),
    }
    moe = the_moe([*config.blocks, *config.mtp])
    if moe is not None and moe.gate_shared_experts:
        raise CheckpointError("its shared experts are gated, and the family's are not")
    if family == "deepseek_v3":
        return {**values, **_write_v3(config, attention, moe)}
    refuse_mtp(config)
    if attention.rope.layout != "interleaved":
        raise CheckpointError(f"its rotary layout is {attention.rope.layout}, and the family's interleaved")
    if config.hidden_size % attention.num_heads:
        raise CheckpointError(f"hidden_size {config.hidden_size} is no multiple of its {attention.num_heads} heads")
    return {**values, **_write_v2(config, moe)}


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    blocks = [*config.blocks, *config.mtp]
    routed = [isinstance(block.feed_forward, MoEConfig) for block in blocks]
    first = routed.index(True) if any(routed) else len(blocks)
    if not all(routed[first:]):
        raise CheckpointError("it has dense layers after its first MoE layer, and the family has them at the bottom")
    plain, moe = the_dense(blocks), the_moe(blocks)
    values: dict[str, Any] = {"first_k_dense_replace": first, "moe_layer_freq": 1}
    if plain is not None:
        values["intermediate_size"] = plain.ffn_hidden_size
    if moe is not None:
        values |= {
            "moe_intermediate_size": moe.expert_hidden_size,
            "n_routed_experts": moe.num_routed_experts,
            "n_shared_experts": moe.num_shared_experts,
            "num_experts_per_tok": moe.experts_per_token,
        }
        values.setdefault("intermediate_size", moe.expert_hidden_size)
    return values


def _write_v2(config: ModelConfig, moe: MoEConfig | None) -> dict[str, Any]:
    values: dict[str, Any] = {"norm_topk_prob": False, "scoring_func": "softmax", "seq_aux": True}
    if moe is None:
        return values
    router = moe.router
    values["aux_loss_alpha"] = config.blocks[config.moe_layers[0]].feed_forward.balance.expert
    if isinstance(router, GroupLimitedConfig):
        groups = {"n_group": router.num_groups, "topk_group": router.groups_per_token}
        values |= {"topk_method": "group_limited_greedy", **groups}
    elif isinstance(router, SoftmaxTopKConfig):
        if router.normalize_gates:
            raise CheckpointError("its gates are normalised, which DeepSeek's code and transformers do differently")
        values |= {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    else:
        raise CheckpointError(f"its router is {router.kind}, and the family's softmax_topk or group_limited")
    return {**values, "routed_scaling_factor": router.route_scale}


def _write_v3(config: ModelConfig, attention: LatentConfig, moe: MoEConfig | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_nextn_predict_layers": len(config.mtp),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if attention.rope.layout == "half_split":
        values["rope_interleave"] = False
    if moe is None:
        return values
    router = moe.router
    if not isinstance(router, SigmoidBiasedConfig):
        raise CheckpointError(f"its router is {router.kind}, and the family's sigmoid_biased")
    if router.score_function != "sigmoid":
        raise CheckpointError(f"its scores are {router.score_function}, and the family's sigmoid")
    if router.normalize_gates and moe.experts_per_token == 1:
        raise CheckpointError("its single gate is normalised, which DeepSeek's code and transformers do differently")
    if moe.num_routed_experts // router.num_groups < 2:
        raise CheckpointError("its groups hold one expert each, and the family scores a group by its two best")
    return {
        **values,
        "n_group": router.num_groups,
        "norm_topk_prob": router.normalize_gates,
        "routed_scaling_factor": router.route_scale,
        "topk_group": router.groups_per_token,
    }
