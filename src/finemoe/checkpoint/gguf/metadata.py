"""From a ModelConfig to the metadata of a GGUF file that llama.cpp loads and computes our logits from.

What GGUF cannot say, or llama.cpp would compute otherwise, is refused with the reason. What is written is read back by
our own reader and compared, so that no setting is lost because nobody here knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.gguf.architectures import ARCHITECTURES, Architecture, Experts, architecture_of
from finemoe.checkpoint.gguf.config import LOG_MULTIPLIER, SIGMOID, SOFTMAX, Facts, model_config
from finemoe.checkpoint.gguf.keys import Variants, stored_tensors
from finemoe.checkpoint.weights.agreement import SINGLE, differences
from finemoe.core.errors import CheckpointError
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.group_limited import GroupLimitedConfig
from finemoe.model.moe.routers.select import GroupsConfig
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig
from finemoe.model.rope import LinearScaling, Llama3Scaling, NTKScaling, RopeConfig, YarnScaling

_MAX_EXPERTS = 512  # llama.cpp's LLAMA_MAX_EXPERTS
_LITE_LAYERS = (26, 27)  # llama.cpp takes deepseek2 models of so many layers for ones without query compression
_SHOWN = 3
_CONTEXT = 4096  # of a model that does not say; some programs reserve memory for all of it


@dataclass(frozen=True)
class Description:
    """What a file says of a model."""

    architecture: str
    values: Mapping[str, Any]
    """Metadata by full key, but for the tokenizer and `general.`."""
    rope_factors: Tensor | None
    """For `rope_freqs.weight`."""
    variants: Variants
    """In what form the tensors are written."""
    notes: tuple[str, ...]
    """What is lost or computed otherwise, in words."""


def describe(config: ModelConfig, context: int | None = None) -> Description:
    """The metadata of `config`, read back; `context` is its longest sequence where the model does not say.

    Raises:
        CheckpointError: llama.cpp has no such model; says why.
    """
    found = _describe(config, context)
    names = {stored.name for stored in stored_tensors(config, found.variants)}
    facts = Facts(names, config.vocab_size, found.rope_factors)
    try:
        again = model_config({"general.architecture": found.architecture, **found.values}, facts, "read again")
    except CheckpointError as error:
        raise _refuse(str(error)) from error
    lost = differences(as_written(config, found.variants), again, SINGLE)
    if lost:
        more = f", and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise _refuse(f"the format has no place for {', '.join(lost[:_SHOWN])}{more}")
    return found


def as_written(config: ModelConfig, variants: Variants) -> ModelConfig:
    """The model that a file of it holds: without prediction modules, and half-split where the rows are turned."""
    blocks = config.blocks
    if variants.neighbours:
        halves = {"rope": blocks[0].attention.rope.model_copy(update={"layout": "half_split"})}
        attention = blocks[0].attention.model_copy(update=halves)
        blocks = tuple(block.model_copy(update={"attention": attention}) for block in blocks)
    return config.model_copy(update={"blocks": blocks, "mtp": ()})


def _describe(config: ModelConfig, context: int | None) -> Description:
    leading, dense, moe = _feed_forwards(config)
    attention = config.blocks[0].attention
    architecture = _architecture(config.hidden_size, attention, moe)
    notes = [] if not config.mtp else ["the multi-token prediction modules are left out: GGUF has no place for them"]
    width = dense.ffn_hidden_size if dense is not None else 0
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions or context or _CONTEXT,
        "embedding_length": config.hidden_size,
        "block_count": len(config.blocks),
        "feed_forward_length": width or (moe.expert_hidden_size if moe is not None else 0),
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    if isinstance(attention, LatentConfig):
        values |= _latent(attention, config)
    else:
        values |= _grouped_query(attention, architecture, config.hidden_size)
    values |= _rope(attention.rope, attention, notes)
    experts = architecture.experts
    if experts is not None and experts.leading:
        values["leading_dense_block_count"] = leading
    elif moe is not None and leading:
        raise _refuse(f"in {architecture.name} llama.cpp has no dense layers before the MoE layers")
    if moe is not None and experts is not None:
        values |= _experts(moe, architecture, experts)
    elif architecture.latent:  # llama.cpp asks a deepseek2 file for these even where no layer routes
        values |= {"expert_feed_forward_length": width, "expert_shared_count": 0}
    return Description(
        architecture.name,
        {f"{architecture.name}.{key}": value for key, value in values.items()},
        _llama3_factors(attention),
        Variants(neighbours=architecture.neighbours),
        tuple(notes),
    )


def _refuse(why: str) -> CheckpointError:
    return CheckpointError(f"this model cannot be written to GGUF: {why}")


def _feed_forwards(config: ModelConfig) -> tuple[int, DenseConfig | None, MoEConfig | None]:
    """How many dense layers lead, what they are, and what routes after them."""
    first = config.blocks[0]
    leading = next((i for i, block in enumerate(config.blocks) if isinstance(block.feed_forward, MoEConfig)), None)
    leading = len(config.blocks) if leading is None else leading
    dense = first.feed_forward if leading else None
    moe = config.blocks[leading].feed_forward if leading < len(config.blocks) else None
    for layer, block in enumerate(config.blocks):
        like = BlockConfig(attention=first.attention, feed_forward=dense if layer < leading else moe)
        if _as_computed(block) != _as_computed(like):
            raise _refuse(
                f"layer {layer} is not like layer {0 if layer < leading else leading}; "
                "GGUF has one kind of attention, dense layers first, and one kind of MoE layer"
            )
    for part in (dense, moe):
        if part is not None and part.swiglu_limit is not None:
            raise _refuse("llama.cpp has no swiglu_limit for it")
    return leading, dense, moe


def _as_computed(block: BlockConfig) -> BlockConfig:
    """Without what only training uses, which may differ between layers."""
    if not isinstance(block.feed_forward, MoEConfig):
        return block
    return block.model_copy(update={"feed_forward": block.feed_forward.without_training()})


def _architecture(hidden: int, attention: GroupedQueryConfig | LatentConfig, moe: MoEConfig | None) -> Architecture:
    """The one that suits the model; else the one that comes nearest, which then refuses it with the reason."""
    found = architecture_of(attention, moe, hidden)
    if found is not None:
        return found
    if moe is not None and not isinstance(moe.router, SoftmaxTopKConfig):
        raise _refuse(f"with this attention llama.cpp routes by softmax_topk only, not by {moe.router.kind}")
    normalized = moe is None or moe.router.normalize_gates
    return ARCHITECTURES["llama" if normalized else "deepseek"]


def _grouped_query(attention: GroupedQueryConfig, architecture: Architecture, hidden: int) -> dict[str, Any]:
    name = architecture.name
    if attention.rotary_dim is not None:
        raise _refuse(f"in {name} llama.cpp turns whole heads, not rotary_dim {attention.rotary_dim}")
    if attention.qk_norm != architecture.qk_norm:
        raise _refuse(f"llama.cpp has no qk_norm {attention.qk_norm!r} in {name}")
    if not architecture.own_head_dim and attention.num_heads * attention.head_dim != hidden:
        raise _refuse(f"in {name} llama.cpp wants heads that together are as wide as hidden_size, {hidden}")
    if isinstance(attention.rope.scaling, Llama3Scaling) and not architecture.frequencies:
        raise _refuse(f"llama.cpp has no llama3 rope scaling in {name}")
    return {
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
    }


def _latent(attention: LatentConfig, config: ModelConfig) -> dict[str, Any]:
    if attention.latent_norm_eps != config.norm_eps:
        raise _refuse(
            f"latent_norm_eps {attention.latent_norm_eps:g} is not norm_eps {config.norm_eps:g}; llama.cpp has one"
        )
    if attention.rope.layout != "interleaved":
        raise _refuse("the rotary part of latent attention must be interleaved")
    lite = len(config.blocks) in _LITE_LAYERS
    if lite and attention.q_lora_rank is not None:
        raise _refuse(f"llama.cpp takes a model of {len(config.blocks)} layers for one without query compression")
    # 0 says "not compressed" to a llama.cpp that would otherwise ask for the rank.
    rank = {} if lite else {"attention.q_lora_rank": attention.q_lora_rank or 0}
    return {
        **rank,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.kv_lora_rank + attention.qk_rope_head_dim,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
    }


def _rope(rope: RopeConfig, attention: GroupedQueryConfig | LatentConfig, notes: list[str]) -> dict[str, Any]:
    latent = isinstance(attention, LatentConfig)
    theta, scaling = float(rope.theta), rope.scaling
    values: dict[str, Any] = {"rope.dimension_count": attention.turning}
    if isinstance(scaling, LinearScaling | Llama3Scaling) and latent:
        raise _refuse(f"llama.cpp computes {scaling.kind} rope scaling otherwise with latent attention")
    if isinstance(scaling, LinearScaling):
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    elif isinstance(scaling, YarnScaling):
        values |= _yarn(scaling, latent)
    elif isinstance(scaling, NTKScaling):
        theta = scaling.scaled_theta(theta, attention.turning)
        notes.append(f"NTK scaling is written as the rotary base {theta:.8g}, which is the same")
    return {**values, "rope.freq_base": theta}


def _yarn(scaling: YarnScaling, latent: bool) -> dict[str, Any]:
    if (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
        raise _refuse("llama.cpp computes YaRN with beta_fast 32, beta_slow 1 and whole components only")
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_max_positions,
    }
    if not latent:
        if (scaling.mscale, scaling.mscale_all_dim) != (1.0, 0.0):
            raise _refuse("llama.cpp computes YaRN here with mscale 1 and mscale_all_dim 0 only")
        return values
    if scaling.mscale != scaling.mscale_all_dim:
        raise _refuse("llama.cpp computes YaRN with latent attention only where mscale and mscale_all_dim are equal")
    return {**values, "rope.scaling.yarn_log_multiplier": LOG_MULTIPLIER * scaling.mscale_all_dim}


def _llama3_factors(attention: GroupedQueryConfig | LatentConfig) -> Tensor | None:
    scaling = attention.rope.scaling
    if not isinstance(scaling, Llama3Scaling) or isinstance(attention, LatentConfig):
        return None
    theta, dim = attention.rope.theta, attention.head_dim
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors = (plain / scaling.inverse_frequencies(plain, theta)).float()
    return None if bool((factors == 1).all()) else factors


def _experts(moe: MoEConfig, architecture: Architecture, experts: Experts) -> dict[str, Any]:
    name = architecture.name
    if moe.gate_shared_experts != (experts.shared == "gated"):
        raise _refuse(f"llama.cpp has no gate on the shared experts in {name}")
    if moe.num_routed_experts > _MAX_EXPERTS:
        raise _refuse(f"llama.cpp has at most {_MAX_EXPERTS} experts, not {moe.num_routed_experts}")
    values: dict[str, Any] = {
        "expert_count": moe.num_routed_experts,
        "expert_used_count": moe.experts_per_token,
    }
    router: Any = moe.router
    if not router.learned:
        raise _refuse(f"llama.cpp has no router like {router.kind}")
    if moe.num_shared_experts and experts.shared == "none":
        raise _refuse(f"in {name} llama.cpp has neither shared experts nor a route_scale")
    if router.route_scale != 1 and not experts.scaled:
        raise _refuse(f"in {name} llama.cpp has no route_scale")
    if not moe.num_shared_experts and experts.shared != "none":
        raise _refuse(f"llama.cpp wants shared experts in {name}, and there are none")
    if experts.own_width:
        values["expert_feed_forward_length"] = moe.expert_hidden_size
    if experts.shared == "plain":
        values["expert_shared_count"] = moe.num_shared_experts
    elif experts.shared == "gated":
        values["expert_shared_feed_forward_length"] = moe.num_shared_experts * moe.expert_hidden_size
    if experts.scaled:
        values["expert_weights_scale"] = float(router.route_scale)
    return {**values, **_gating(moe)} if architecture.latent else values


def _gating(moe: MoEConfig) -> dict[str, Any]:
    router: Any = moe.router
    if router.selects_with_bias:
        if router.score_function != "sigmoid":
            raise _refuse(f"llama.cpp has no score_function {router.score_function!r} here")
        values: dict[str, Any] = {"expert_gating_func": SIGMOID, "expert_weights_norm": router.normalize_gates}
    elif isinstance(router, GroupLimitedConfig):
        values = {"expert_gating_func": SOFTMAX, "expert_weights_norm": False}
    else:
        values = {"expert_gating_func": SOFTMAX, "expert_weights_norm": router.normalize_gates}
    if not isinstance(router, GroupsConfig) or router.groups_per_token == router.num_groups:
        # Without the keys nobody knows whether the model has no groups, or the file is older than they are.
        sigmoid = router.selects_with_bias and moe.num_routed_experts > 1
        return {**values, "expert_group_count": 1, "expert_group_used_count": 1} if sigmoid else values
    if moe.num_routed_experts == router.num_groups:
        raise _refuse("llama.cpp wants more than one expert in a group")
    if isinstance(router, GroupLimitedConfig):
        raise _refuse(
            "llama.cpp ranks groups of experts by their two best scores, and group_limited routing (DeepSeek-V2) by "
            "the best one, so some tokens would go to other experts"
        )
    return {
        **values,
        "expert_group_count": router.num_groups,
        "expert_group_used_count": router.groups_per_token,
    }
