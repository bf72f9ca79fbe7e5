"""What the families' routers share: softmax top-k, and sigmoid scores with a selection bias, read and written back."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.layers import the_dense, the_moe
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.sigmoid_biased import SigmoidBiasedConfig
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig


def read_softmax_moe(fields: Fields, experts: str, width: int, normalize: bool, **more: Any) -> dict[str, Any]:
    """A layer of softmax top-k routing; `experts` is the field that counts them, `width` of each."""
    return {
        "kind": "moe",
        "num_routed_experts": fields.integer(experts),
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "expert_hidden_size": width,
        "router": {"kind": "softmax_topk", "normalize_gates": normalize},
        **more,
    }


def the_softmax_moe(
    config: ModelConfig, *, shared: bool = False, gated: bool = False
) -> tuple[DenseConfig | None, MoEConfig | None, SoftmaxTopKConfig]:
    """The one dense and the one MoE layer of a model, and the latter's router; None where there is none.

    Args:
        config: of the model.
        shared: whether the family has shared experts.
        gated: whether it gates them.

    Raises:
        CheckpointError: layers differ, or route in a way that the family does not.
    """
    plain, moe = the_dense(config.blocks), the_moe(config.blocks)
    if moe is None:
        return plain, None, SoftmaxTopKConfig()
    router = moe.router
    if not isinstance(router, SoftmaxTopKConfig):
        raise CheckpointError(f"its router is {router.kind}, and the family's softmax_topk")
    if router.route_scale != 1:
        raise CheckpointError(f"its gates are multiplied by {router.route_scale:g}, and the family's are not")
    if moe.num_shared_experts and not shared:
        raise CheckpointError("it has shared experts, and the family none")
    check_gate(moe, gated)
    return plain, moe, router


def check_gate(moe: MoEConfig, gated: bool) -> None:
    """Raise where shared experts are gated, or not, other than the family's."""
    if moe.gate_shared_experts != gated:
        raise CheckpointError(
            "its shared experts are gated, and the family's are not"
            if moe.gate_shared_experts
            else "it has no gated shared expert, and the family has one in every MoE layer"
        )


def made_of_experts(config: ModelConfig, **shared: bool) -> tuple[DenseConfig | None, MoEConfig, SoftmaxTopKConfig]:
    """`the_softmax_moe` of a family without a dense form.

    Raises:
        CheckpointError: as there, or no layer routes.
    """
    plain, moe, router = the_softmax_moe(config, **shared)
    if moe is None:
        raise CheckpointError("it has no MoE layer, and the family is made of them")
    return plain, moe, router


def read_biased(fields: Fields) -> dict[str, Any]:
    """DeepSeek-V3's router, by its fields."""
    return {
        "kind": "sigmoid_biased",
        "num_groups": fields.integer("n_group"),
        "groups_per_token": fields.integer("topk_group"),
        "normalize_gates": fields.flag("norm_topk_prob"),
        "route_scale": fields.number("routed_scaling_factor"),
    }


def write_biased(moe: MoEConfig) -> dict[str, Any]:
    """The fields of DeepSeek-V3's router.

    Raises:
        CheckpointError: the layer routes otherwise.
    """
    router = moe.router
    check_gate(moe, gated=False)
    if not isinstance(router, SigmoidBiasedConfig):
        raise CheckpointError(f"its router is {router.kind}, and the family's sigmoid_biased")
    if router.score_function != "sigmoid":
        raise CheckpointError(f"its scores are {router.score_function}, and the family's sigmoid")
    if moe.num_routed_experts // router.num_groups < 2:
        raise CheckpointError("its groups hold one expert each, and the family scores a group by its two best")
    return {
        "n_group": router.num_groups,
        "norm_topk_prob": router.normalize_gates,
        "routed_scaling_factor": router.route_scale,
        "topk_group": router.groups_per_token,
    }


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


def write_expert_balance(config: ModelConfig) -> float:
    """The coefficient of the first MoE layer; the others' may differ, and training alone looks at it."""
    return float(config.blocks[config.moe_layers[0]].feed_forward.balance.expert)
