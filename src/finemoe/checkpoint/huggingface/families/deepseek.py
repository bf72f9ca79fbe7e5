"""DeepSeekMoE 16B, as its own code reads it: the first layers dense, then every `moe_layer_freq`-th routes."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields, shown
from finemoe.checkpoint.huggingface.grouped import read_grouped, the_grouped, uniform, write_grouped
from finemoe.checkpoint.huggingface.layers import Layers, build, dense, refuse_mtp
from finemoe.checkpoint.huggingface.routing import (
    read_expert_balance,
    read_softmax_moe,
    the_softmax_moe,
    write_expert_balance,
)
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    attention = read_grouped(fields, own_head_dim=False, meaning="deepseek")
    fields.only("scoring_func", "softmax", why="this family's code has softmax only")
    fields.only("routed_scaling_factor", 1, why="this family's code does not scale the gates")
    num_layers, experts = fields.integer("num_hidden_layers"), fields.optional_integer("n_routed_experts")
    first, step = fields.integer("first_k_dense_replace", 0), fields.integer("moe_layer_freq")
    plain = dense(fields.integer("intermediate_size"))
    if experts is None:
        for name in ("norm_topk_prob", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"):
            fields.has(name)
        fields.has("aux_loss_alpha")
        return uniform(fields, attention, plain)
    # Its code normalises for more than one expert only.
    normalize = fields.flag("norm_topk_prob") and fields.integer("num_experts_per_tok") > 1
    layer = read_softmax_moe(
        fields,
        "n_routed_experts",
        fields.integer("moe_intermediate_size"),
        normalize,
        num_shared_experts=fields.optional_integer("n_shared_experts", 0) or 0,
        balance={"expert": read_expert_balance(fields)},
    )
    return build(fields, Layers(attention, lambda i: layer if i >= first and i % step == 0 else plain, num_layers))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention = the_grouped(config, own_head_dim=False)
    plain, moe, router = the_softmax_moe(config, shared=True)
    values = write_grouped(config, attention, max_positions, "deepseek")
    values |= {"attention_bias": False, "pretraining_tp": 1}
    if moe is None:
        assert plain is not None  # a layer either routes or does not
        return {**values, "intermediate_size": plain.ffn_hidden_size, "n_routed_experts": None}
    if router.normalize_gates and moe.experts_per_token == 1:
        raise CheckpointError("its single gate is normalised, and the family normalises two and more only")
    first, step = _pattern(config)
    return {
        **values,
        "aux_loss_alpha": write_expert_balance(config),
        "first_k_dense_replace": first,
        "intermediate_size": plain.ffn_hidden_size if plain is not None else moe.expert_hidden_size,
        "moe_intermediate_size": moe.expert_hidden_size,
        "moe_layer_freq": step,
        "n_routed_experts": moe.num_routed_experts,
        "n_shared_experts": moe.num_shared_experts or None,
        "norm_topk_prob": router.normalize_gates,
        "num_experts_per_tok": moe.experts_per_token,
        "scoring_func": "softmax",
        "seq_aux": True,
    }


def _pattern(config: ModelConfig) -> tuple[int, int]:
    """The first MoE layer and the distance at which the others follow."""
    routed, total = config.moe_layers, len(config.blocks)
    patterns = ((routed[0], step) for step in range(1, total + 1))
    fitting = (p for p in patterns if routed == tuple(i for i in range(p[0], total) if i % p[1] == 0))
    first, step = next(fitting, (0, 0))
    if not step:
        raise CheckpointError(f"its MoE layers are {shown(routed)}, and the family's follow at one distance")
    return first, step


FAMILY = Family(
    "deepseek",
    "DeepseekForCausalLM",
    _read,
    _write,
    defaults={
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "routed_scaling_factor": 1.0,
        "seq_aux": True,
    },
    native=False,
    keeps=("balance.expert",),
)
