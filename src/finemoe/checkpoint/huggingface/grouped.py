"""Families with grouped-query attention: llama, qwen2, qwen3; MoE: deepseek, mixtral, olmoe, qwen2_moe, qwen3_moe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from finemoe.checkpoint.huggingface.fields import Fields, shown
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
from finemoe.checkpoint.huggingface.rope import Meaning, read_rope, write_rope
from finemoe.core.errors import CheckpointError
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig

_QkNorm = Literal["none", "head", "projection"]


def _attention(
    fields: Fields, *, bias: bool = False, norm: _QkNorm = "none", free_head_dim: bool = True, meaning: Meaning
) -> dict[str, Any]:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads") if fields.has("num_key_value_heads") else None
    if kv_heads is None:
        kv_heads = fields.optional_integer("num_key_value_heads") or heads
    head_dim = hidden // heads
    if free_head_dim and fields.value("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    elif hidden % heads:
        fields.refuse("num_attention_heads", heads, f"it does not divide hidden_size {hidden}")
    elif not free_head_dim:
        fields.only("head_dim", head_dim, why=f"this family computes it as hidden_size / heads = {head_dim}")
    rope = read_rope(fields, head_dim, "half_split", meaning, fields.integer("max_position_embeddings"))
    return {
        "kind": "grouped_query",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope": rope,
        "qkv_bias": bias,
        "qk_norm": norm,
    }


def _moe(fields: Fields, experts: str, width: int, normalize: bool, **more: Any) -> dict[str, Any]:
    return {
        "kind": "moe",
        "num_routed_experts": fields.integer(experts),
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "expert_hidden_size": width,
        "router": {"kind": "softmax_topk", "normalize_gates": normalize},
        **more,
    }


def _uniform(fields: Fields, attention: dict[str, Any], layer: dict[str, Any]) -> ModelConfig:
    return build(fields, Layers(attention, lambda _: layer, fields.integer("num_hidden_layers")))


def _no_window(fields: Fields) -> None:
    """Sliding windows are refused where one is in use; Qwen's configs name a size even where none is."""
    for name in ("sliding_window", "max_window_layers"):
        fields.has(name)
    fields.only("use_sliding_window", False, why="finemoe has no sliding-window attention")


def read_llama(fields: Fields) -> ModelConfig:
    """Llama: also DeepSeek LLM, DeepSeek-Coder, R1's Llama distillations, SmolLM2."""
    attention = _attention(fields, meaning="transformers")
    return _uniform(fields, attention, dense(fields.integer("intermediate_size")))


def read_qwen2(fields: Fields) -> ModelConfig:
    """Qwen2 and Qwen2.5, dense: Llama with biases on queries, keys and values."""
    _no_window(fields)
    attention = _attention(fields, bias=True, meaning="transformers")
    return _uniform(fields, attention, dense(fields.integer("intermediate_size")))


def read_qwen3(fields: Fields) -> ModelConfig:
    """Qwen3, dense: Llama with norms on each head's query and key."""
    _no_window(fields)
    attention = _attention(fields, norm="head", meaning="transformers")
    return _uniform(fields, attention, dense(fields.integer("intermediate_size")))


def read_mixtral(fields: Fields) -> ModelConfig:
    """Mixtral: every layer routes, and the gates are normalised."""
    window, positions = fields.optional_integer("sliding_window"), fields.integer("max_position_embeddings")
    if window is not None and window < positions:
        fields.refuse("sliding_window", window, "finemoe has no sliding-window attention")
    attention = _attention(fields, meaning="transformers")
    layer = _moe(fields, "num_local_experts", fields.integer("intermediate_size"), normalize=True)
    return _uniform(fields, attention, layer)


def read_olmoe(fields: Fields) -> ModelConfig:
    """OLMoE: every layer routes; norms over all heads' queries, and keys, together."""
    attention = _attention(fields, norm="projection", free_head_dim=False, meaning="transformers")
    normalize = fields.flag("norm_topk_prob")
    return _uniform(fields, attention, _moe(fields, "num_experts", fields.integer("intermediate_size"), normalize))


def _qwen_moe(fields: Fields, attention: dict[str, Any], layer: dict[str, Any]) -> ModelConfig:
    """Which layers of a Qwen MoE are dense."""
    num_layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step")
    listed = fields.value("mlp_only_layers") or []
    if not isinstance(listed, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        fields.refuse("mlp_only_layers", listed, "a list of layer numbers is needed")
    plain = set(listed)
    routed = [i not in plain and (i + 1) % step == 0 for i in range(min(num_layers, 1 << 20))]
    width = fields.integer("intermediate_size") if not all(routed) else fields.value("intermediate_size")
    return build(fields, Layers(attention, lambda i: layer if routed[i] else dense(width), num_layers))


def read_qwen2_moe(fields: Fields) -> ModelConfig:
    """Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a sigmoid gate."""
    _no_window(fields)
    attention = _attention(fields, bias=fields.flag("qkv_bias"), meaning="transformers")
    width, shared = fields.integer("moe_intermediate_size"), fields.integer("shared_expert_intermediate_size")
    if shared % width:
        fields.refuse(
            "shared_expert_intermediate_size", shared, f"it must be a multiple of moe_intermediate_size {width}"
        )
    normalize = fields.flag("norm_topk_prob")
    more = {"num_shared_experts": shared // width, "gate_shared_experts": True}
    return _qwen_moe(fields, attention, _moe(fields, "num_experts", width, normalize, **more))


def read_qwen3_moe(fields: Fields) -> ModelConfig:
    """Qwen3-MoE: no shared expert, norms on each head's query and key."""
    _no_window(fields)
    attention = _attention(fields, norm="head", meaning="transformers")
    experts = "num_experts" if fields.has("num_experts") or not fields.has("num_local_experts") else "num_local_experts"
    layer = _moe(fields, experts, fields.integer("moe_intermediate_size"), fields.flag("norm_topk_prob"))
    return _qwen_moe(fields, attention, layer)


def read_deepseek(fields: Fields) -> ModelConfig:
    """DeepSeekMoE 16B, as its own code reads it: the first layers dense, then every `moe_layer_freq`-th routes."""
    attention = _attention(fields, free_head_dim=False, meaning="deepseek")
    fields.only("scoring_func", "softmax", why="this family's code has softmax only")
    fields.only("routed_scaling_factor", 1, why="this family's code does not scale the gates")
    num_layers, experts = fields.integer("num_hidden_layers"), fields.optional_integer("n_routed_experts")
    first, step = fields.integer("first_k_dense_replace", 0), fields.integer("moe_layer_freq")
    plain = dense(fields.integer("intermediate_size"))
    if experts is None:
        for name in ("norm_topk_prob", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"):
            fields.has(name)
        fields.has("aux_loss_alpha")
        return _uniform(fields, attention, plain)
    # Its code normalises for more than one expert only.
    normalize = fields.flag("norm_topk_prob") and fields.integer("num_experts_per_tok") > 1
    shared = fields.optional_integer("n_shared_experts", 0) or 0
    layer = _moe(
        fields,
        "n_routed_experts",
        fields.integer("moe_intermediate_size"),
        normalize,
        num_shared_experts=shared,
        balance={"expert": read_expert_balance(fields)},
    )
    return build(fields, Layers(attention, lambda i: layer if i >= first and i % step == 0 else plain, num_layers))


def read_expert_balance(fields: Fields) -> float:
    """`aux_loss_alpha` as the coefficient of the expert-level loss per sequence, which it is with `seq_aux`."""
    alpha = fields.value("aux_loss_alpha")
    if alpha is None or alpha == 0:
        return 0.0
    found = fields.number("aux_loss_alpha")
    if fields.value("seq_aux") is False:
        fields.note(
            f"`aux_loss_alpha` {found:g} is not taken over: with `seq_aux` false it averages over a whole batch"
        )
        return 0.0
    return found


def write_grouped(config: ModelConfig, family: str, max_positions: int | None) -> dict[str, Any]:
    """The fields of `family` for `config`.

    Raises:
        CheckpointError: with the reason, where the family cannot compute what `config` does.
    """
    refuse_mtp(config)
    attention = the_attention(config)
    if not isinstance(attention, GroupedQueryConfig):
        raise CheckpointError(f"it has {attention.kind} attention, and the family grouped-query attention")
    if attention.rope.layout != "half_split":
        raise CheckpointError(f"its rotary layout is {attention.rope.layout}, and the family's half_split")
    meaning: Meaning = "deepseek" if family == "deepseek" else "transformers"
    values = {
        **write_common(config, max_positions),
        **write_rope(attention.rope, attention.head_dim, meaning),
        "attention_dropout": 0.0,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        **_write_attention(config, attention, family),
    }
    plain, moe = the_dense(config.blocks), the_moe(config.blocks)
    if family in ("llama", "qwen2", "qwen3"):
        if moe is not None or plain is None:
            raise CheckpointError("it has MoE layers, and the family dense ones only")
        return {**values, "intermediate_size": plain.ffn_hidden_size}
    if family != "deepseek" and moe is None:
        raise CheckpointError("it has no MoE layer, and the family is made of them")
    if moe is not None:
        _check_router(moe, family)
    return {**values, **_write_moe(config, moe, plain.ffn_hidden_size if plain else None, family)}


_BIASED: Mapping[str, bool | None] = {"qwen2": True, "qwen2_moe": None}  # None: either
_NORMED: Mapping[str, _QkNorm] = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "projection"}


def _write_attention(config: ModelConfig, attention: GroupedQueryConfig, family: str) -> dict[str, Any]:
    biased = _BIASED.get(family, False)
    if biased is not None and attention.qkv_bias != biased:
        raise CheckpointError(f"qkv_bias is {str(attention.qkv_bias).lower()}, and the family's {str(biased).lower()}")
    norm = _NORMED.get(family, "none")
    if attention.qk_norm != norm:
        raise CheckpointError(f"qk_norm is {attention.qk_norm!r}, and the family's {norm!r}")
    if family in ("llama", "olmoe", "deepseek") and config.hidden_size % attention.num_heads:
        raise CheckpointError(f"hidden_size {config.hidden_size} is no multiple of its {attention.num_heads} heads")
    if family in ("olmoe", "deepseek"):
        if attention.head_dim * attention.num_heads != config.hidden_size:
            raise CheckpointError(f"head_dim {attention.head_dim} is not hidden_size / heads, which the family takes")
        return {"attention_bias": False} | ({"pretraining_tp": 1} if family == "deepseek" else {})
    values: dict[str, Any] = {"head_dim": attention.head_dim}
    if family == "llama":
        return {**values, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    if family == "mixtral":
        return {**values, "sliding_window": None}
    values |= {"use_sliding_window": False}
    if family == "qwen2_moe":
        return {**values, "qkv_bias": attention.qkv_bias}
    return values if family == "qwen2" else {**values, "attention_bias": False}


def _check_router(moe: MoEConfig, family: str) -> None:
    router = moe.router
    if not isinstance(router, SoftmaxTopKConfig):
        raise CheckpointError(f"its router is {router.kind}, and the family's softmax_topk")
    if router.route_scale != 1:
        raise CheckpointError(f"its gates are multiplied by {router.route_scale:g}, and the family's are not")
    if family == "mixtral" and not router.normalize_gates:
        raise CheckpointError("its gates are not normalised, and the family's are")
    if family == "deepseek" and router.normalize_gates and moe.experts_per_token == 1:
        raise CheckpointError("its single gate is normalised, and the family normalises two and more only")
    if moe.num_shared_experts and family not in ("deepseek", "qwen2_moe"):
        raise CheckpointError("it has shared experts, and the family none")
    if moe.gate_shared_experts != (family == "qwen2_moe"):
        raise CheckpointError(
            "its shared experts are gated, and the family's are not"
            if moe.gate_shared_experts
            else "it has no gated shared expert, and the family has one in every MoE layer"
        )


def _write_moe(config: ModelConfig, moe: MoEConfig | None, width: int | None, family: str) -> dict[str, Any]:
    """`width`: of the dense layers, None where there are none."""
    if family == "deepseek":
        return _write_deepseek(config, moe, width)
    assert moe is not None
    assert isinstance(moe.router, SoftmaxTopKConfig)
    values: dict[str, Any] = {"num_experts_per_tok": moe.experts_per_token}
    if family in ("mixtral", "olmoe"):
        if width is not None:
            raise CheckpointError("it has dense layers, and all of the family's route")
        values["intermediate_size"] = moe.expert_hidden_size
        if family == "mixtral":
            return {**values, "num_local_experts": moe.num_routed_experts}
        return {**values, "num_experts": moe.num_routed_experts, "norm_topk_prob": moe.router.normalize_gates}
    if family == "qwen2_moe":
        values["shared_expert_intermediate_size"] = moe.num_shared_experts * moe.expert_hidden_size
    return {
        **values,
        "decoder_sparse_step": 1,
        "intermediate_size": width or moe.expert_hidden_size,
        "mlp_only_layers": [i for i in range(len(config.blocks)) if i not in config.moe_layers],
        "moe_intermediate_size": moe.expert_hidden_size,
        "norm_topk_prob": moe.router.normalize_gates,
        "num_experts": moe.num_routed_experts,
    }


def _write_deepseek(config: ModelConfig, moe: MoEConfig | None, width: int | None) -> dict[str, Any]:
    if moe is None:
        return {"intermediate_size": width, "n_routed_experts": None}
    assert isinstance(moe.router, SoftmaxTopKConfig)
    routed, total = config.moe_layers, len(config.blocks)
    patterns = ((routed[0], step) for step in range(1, total + 1))
    fitting = (p for p in patterns if routed == tuple(i for i in range(p[0], total) if i % p[1] == 0))
    first, step = next(fitting, (0, 0))
    if not step:
        raise CheckpointError(f"its MoE layers are {shown(routed)}, and the family's follow at one distance")
    alpha = config.blocks[routed[0]].feed_forward.balance.expert
    return {
        "aux_loss_alpha": alpha,
        "first_k_dense_replace": first,
        "intermediate_size": width or moe.expert_hidden_size,
        "moe_intermediate_size": moe.expert_hidden_size,
        "moe_layer_freq": step,
        "n_routed_experts": moe.num_routed_experts,
        "n_shared_experts": moe.num_shared_experts or None,
        "norm_topk_prob": moe.router.normalize_gates,
        "num_experts_per_tok": moe.experts_per_token,
        "scoring_func": "softmax",
        "seq_aux": True,
    }
