"""From the metadata of a GGUF file to a ModelConfig, for every architecture in the table.

Meaning is what llama.cpp computes. A key that says something this model cannot do, or that is not known here, is
refused by its name: a model that is nearly right would answer all the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from finemoe.checkpoint.gguf.architectures import ARCHITECTURES, Architecture, Experts
from finemoe.checkpoint.gguf.keys import EMBEDDING, OUTPUT, Variants
from finemoe.checkpoint.gguf.llama3 import llama3_scaling
from finemoe.core.config import parse
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.model.config import ModelConfig

LOG_MULTIPLIER = 0.1
"""`rope.scaling.yarn_log_multiplier` holds this times `mscale_all_dim`."""
SOFTMAX, SIGMOID = 1, 2
"""Values of `expert_gating_func`."""

_V3_GROUPS = "a model trained with groups needs them, as DeepSeek-V3 and R1 do, with 8 groups of which 4 are used"
_V2_GROUPS = {160: "DeepSeek-V2 and Coder-V2 have 8 groups, of which 3 are used"}
"""By number of experts; V2-Lite has none."""

_LARGEST = 1 << 31
_REQUIRED = object()
_DESCRIBES = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})  # change nothing that is computed
# What a key must be, where any other value is another model.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.temperature_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "use_parallel_residual": False,
    "nextn_predict_layers": 0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "pooling_type": 0,
}


@final
class _Keys:
    """The keys of one architecture, each checked when asked for; what nobody asked for is found at the end."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self.prefix, self.where = prefix, where
        self._asked: set[str] = set()
        self.warnings: list[str] = []

    def _get(self, key: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        self._asked.add(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.where}: the metadata has no {self.prefix}{key}, which the model needs")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one for each layer, and all the same
        if isinstance(value, list):
            raise self.refuse(key, "differs from layer to layer, which is not read")
        if value is not default and type(value) not in kinds:
            raise self.refuse(key, f"must be {what}")
        return value

    def count(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        value = self._get(key, (int,), "a whole number", default)
        if value is not default and not least <= value < _LARGEST:
            raise self.refuse(key, f"must be from {least} to {_LARGEST - 1}")
        return value  # type: ignore[no-any-return]

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, (int, float), "a number", default)
        if value is not default and not math.isfinite(value):
            raise self.refuse(key, "must be finite")
        return value  # type: ignore[no-any-return]

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, (bool,), "true or false", default)  # type: ignore[no-any-return]

    def text(self, key: str, default: str) -> str:
        return self._get(key, (str,), "a text", default)  # type: ignore[no-any-return]

    def has(self, key: str) -> bool:
        return key in self._values

    def assumed(self, key: str, taken: str) -> None:
        """Say aloud what stands for a key that is missing, where another value would be another model."""
        if not self.has(key):
            self.warnings.append(
                f"{self.prefix}{key} is missing: {taken}, as in llama.cpp; "
                f"`finemoe import --metadata {self.prefix}{key}=...` says otherwise"
            )

    def refuse(self, key: str, why: str) -> CheckpointError:
        value = str(self._values.get(key))
        shown = value if len(value) <= 80 else value[:80] + " ..."
        return CheckpointError(f"{self.where}: {self.prefix}{key} is {shown}: {why}")

    def check_rest(self) -> None:
        for key, value in self._values.items():
            if key in self._asked or key in _DESCRIBES:
                continue
            if key not in _NEUTRAL:
                raise self.refuse(key, "this key is not known here, so the model may be another than it seems")
            if value != _NEUTRAL[key] or isinstance(value, bool) != isinstance(_NEUTRAL[key], bool):
                raise self.refuse(key, f"only {_NEUTRAL[key]} can be represented")


@dataclass(frozen=True)
class Facts:
    """What the tensors of a file say of its model, beside the metadata."""

    names: Collection[str]
    vocab_size: int
    """Rows of the embedding."""
    rope_factors: Tensor | None
    """What every rotary frequency is divided by."""

    def variants(self, architecture: str) -> Variants:
        """In what form the file holds what can be held in several; `architecture` is one that is known."""
        ends = {name.split(".", 2)[-1] for name in self.names if name.startswith("blk.")}
        return Variants(
            split_latent="attn_kv_b.weight" not in ends,
            fused_experts="ffn_gate_up_exps.weight" in ends,
            single_experts="ffn_gate.0.weight" in ends,
            selection_bias="exp_probs_b.bias" in ends,
            neighbours=ARCHITECTURES[architecture].neighbours,
        )


def model_config(metadata: Mapping[str, Any], facts: Facts, where: str) -> ModelConfig:
    """The model of a file; `where` names it in errors.

    Raises:
        CheckpointError: as `read_model`.
    """
    return read_model(metadata, facts, where)[0]


def read_model(metadata: Mapping[str, Any], facts: Facts, where: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model of a file, and what was taken for keys that are missing; `where` names it in errors.

    Raises:
        CheckpointError: another architecture, or a key that is missing, impossible, unknown or not representable.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{where}: general.type is {kind!r}, but only whole models are read")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"{where}: general.architecture is {name!r}; {', '.join(ARCHITECTURES)} are read")
    architecture = ARCHITECTURES[name]
    keys = _Keys(metadata, name, where)
    num_layers = keys.count("block_count")
    if num_layers > len(facts.names):
        raise keys.refuse("block_count", f"the file has only {len(facts.names)} tensors")
    attention = _latent(keys, facts) if architecture.latent else _grouped_query(keys, architecture, facts)
    feed_forwards = _feed_forwards(keys, architecture, num_layers, facts)
    named = keys.count("vocab_size", facts.vocab_size)
    if named != facts.vocab_size:
        raise keys.refuse("vocab_size", f"{EMBEDDING} has {facts.vocab_size} rows")
    raw = {
        "vocab_size": facts.vocab_size,
        "hidden_size": keys.count("embedding_length"),
        "blocks": [{"attention": attention, "feed_forward": feed_forward} for feed_forward in feed_forwards],
        "tie_embeddings": OUTPUT not in facts.names,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_positions": keys.count("context_length"),
    }
    keys.check_rest()
    try:
        return parse(ModelConfig, raw, where), tuple(keys.warnings)
    except ConfigError as error:
        raise CheckpointError(f"{error}: the metadata do not describe a possible model") from error


def _grouped_query(keys: _Keys, architecture: Architecture, facts: Facts) -> dict[str, Any]:
    heads = keys.count("attention.head_count")
    hidden = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("attention.value_length", f"must be attention.key_length, {head_dim}")
    if not architecture.own_head_dim and heads * head_dim != hidden:
        raise keys.refuse("attention.key_length", f"{architecture.name} has heads of embedding_length / head_count")
    kv_heads = keys.count("attention.head_count_kv", heads)
    if not architecture.shared_keys and kv_heads != heads:
        raise keys.refuse("attention.head_count_kv", f"{architecture.name} has a key for each of its {heads} heads")
    if facts.rope_factors is not None and not architecture.frequencies:
        raise CheckpointError(
            f"{keys.where}: rope_freqs.weight is there, and llama.cpp has none in {architecture.name}"
        )
    return {
        "kind": "grouped_query",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "qkv_bias": "blk.0.attn_q.bias" in facts.names if architecture.bias is None else architecture.bias,
        "qk_norm": architecture.qk_norm,
        "rope": {"layout": "half_split", **_rope(keys, head_dim, facts.rope_factors, latent=False)},
    }


def _latent(keys: _Keys, facts: Facts) -> dict[str, Any]:
    absorbed = keys.has("attention.key_length_mla")  # the form that llama.cpp computes; older files have the other
    rotary = keys.count("rope.dimension_count")
    rank = keys.count("attention.kv_lora_rank")
    key = keys.count("attention.key_length_mla" if absorbed else "attention.key_length")
    value = keys.count("attention.value_length_mla" if absorbed else "attention.value_length")
    heads = keys.count("attention.head_count")
    # The absorbed form is one head that all queries share; the other has a head for each.
    stated = {"attention.head_count_kv": 1 if absorbed else heads}
    if absorbed:
        stated |= {"attention.key_length": rank + rotary, "attention.value_length": rank}
    for name, expected in stated.items():
        if keys.count(name, expected) != expected:
            raise keys.refuse(name, f"must be {expected} in this layout of latent attention")
    if key <= rotary:
        raise keys.refuse("rope.dimension_count", f"no room is left in a key of {key}")
    return {
        "kind": "latent",
        "num_heads": heads,
        "q_lora_rank": keys.count("attention.q_lora_rank", 0, least=0) or None,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": key - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value,
        "latent_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope": {"layout": "interleaved", **_rope(keys, rotary, facts.rope_factors, latent=True)},
    }


def _rope(keys: _Keys, dim: int, factors: Tensor | None, *, latent: bool) -> dict[str, Any]:
    if keys.count("rope.dimension_count", dim) != dim:
        raise keys.refuse("rope.dimension_count", f"only all {dim} components of a head can be rotated")
    theta = float(keys.number("rope.freq_base", 10_000.0))
    keys.assumed("rope.freq_base", "10000 is taken")
    scaled = keys.has("rope.scale_linear") or keys.has("rope.scaling.factor")
    kind = keys.text("rope.scaling.type", "linear" if scaled else "none")
    if scaled:
        keys.assumed("rope.scaling.type", "linear is taken")
    if keys.has("rope.scaling.factor") or not keys.has("rope.scale_linear"):
        factor = float(keys.number("rope.scaling.factor", 0.0))
    else:
        factor = float(keys.number("rope.scale_linear"))
    original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if factors is not None:
        if kind != "none" or latent:
            raise keys.refuse("rope.scaling.type", "rope_freqs.weight scales the frequencies already")
        return {"theta": theta, "scaling": llama3_scaling(factors, theta, keys.where)}
    if kind not in ("none", "linear", "yarn"):
        raise keys.refuse("rope.scaling.type", "none, linear and yarn are read")
    if kind == "none" or factor in (0.0, 1.0):
        return {"theta": theta}
    if kind == "linear" and latent:
        raise keys.refuse("rope.scaling.type", "llama.cpp also sharpens attention then, which nothing here does")
    if kind == "linear":
        return {"theta": theta, "scaling": {"kind": "linear", "factor": factor}}
    keys.assumed("rope.scaling.original_context_length", f"context_length, {original}, is taken")
    scaling = {"kind": "yarn", "factor": factor, "original_max_positions": original}
    if not latent and multiplier:
        raise keys.refuse("rope.scaling.yarn_log_multiplier", "has a meaning in deepseek2 files only")
    if latent and not multiplier:
        raise keys.refuse("rope.scaling.type", "without yarn_log_multiplier llama.cpp sharpens attention twice")
    all_dim = round(multiplier / LOG_MULTIPLIER, 6)
    return {"theta": theta, "scaling": {**scaling, "mscale": all_dim or 1.0, "mscale_all_dim": all_dim}}


def _feed_forwards(keys: _Keys, architecture: Architecture, num_layers: int, facts: Facts) -> list[dict[str, Any]]:
    width, count = keys.count("feed_forward_length"), keys.count("expert_count", 0, least=0)
    used = keys.count("expert_used_count", 0, least=0)
    leading = keys.count("leading_dense_block_count", 0, least=0)
    dense = {"kind": "dense", "ffn_hidden_size": width}
    experts = architecture.experts
    if not count and architecture.dense:
        if experts is not None:  # what a file says of experts that it does not have must make sense all the same
            keys.count("expert_feed_forward_length", width)
            _shared(keys, experts, 0, width)
            _router(keys, architecture, experts, facts)
        return [dense] * num_layers
    if not count or experts is None:
        raise keys.refuse("expert_count", f"{architecture.name} has {'dense layers' if count else 'experts'} only")
    if leading and not experts.leading:
        raise keys.refuse("leading_dense_block_count", f"every layer of {architecture.name} routes")
    default = width // max(used, 1) if experts.divided else width
    expert_width = keys.count("expert_feed_forward_length", default)
    if not experts.own_width and expert_width != width:
        raise keys.refuse("expert_feed_forward_length", f"experts of {architecture.name} have feed_forward_length")
    moe = {
        "kind": "moe",
        "num_routed_experts": count,
        "experts_per_token": used,
        "expert_hidden_size": expert_width,
        "num_shared_experts": _shared(keys, experts, width, expert_width),
        "gate_shared_experts": experts.shared == "gated",
        "router": _router(keys, architecture, experts, facts),
    }
    return [dense] * min(leading, num_layers) + [moe] * max(0, num_layers - leading)


def _shared(keys: _Keys, experts: Experts, width: int, expert_width: int) -> int:
    """How many shared experts there are: counted, or by the width of all of them together."""
    total, told = "expert_shared_feed_forward_length", keys.has("expert_shared_count")
    default = keys.count("expert_shared_count", 0, least=0) * expert_width
    if experts.shared == "gated" and not told:
        default = width
    found = keys.count(total, default, least=0)
    if experts.shared == "none" and found:
        raise keys.refuse(total if keys.has(total) else "expert_shared_count", f"must be 0 times {expert_width}")
    if found % expert_width or (told and found != default):
        raise keys.refuse(total, f"must be {default // expert_width} times {expert_width}")
    return found // expert_width


def _router(keys: _Keys, architecture: Architecture, experts: Experts, facts: Facts) -> dict[str, Any]:
    return _described(keys, facts) if architecture.latent else _softmax(keys, architecture.name, experts)


def _softmax(keys: _Keys, name: str, experts: Experts) -> dict[str, Any]:
    """The router of an architecture that has one kind."""
    if keys.flag("expert_weights_norm", experts.normalized) != experts.normalized:
        raise keys.refuse("expert_weights_norm", f"llama.cpp does otherwise for {name}")
    gating, _, grouped = _gating(keys)
    if gating != SOFTMAX or grouped:
        raise keys.refuse("expert_gating_func", f"only softmax without groups exists for {name}")
    scale = _scale(keys)
    if scale != 1 and not experts.scaled:
        raise keys.refuse("expert_weights_scale", f"only 1.0 is read for {name}")
    return {"kind": "softmax_topk", "normalize_gates": experts.normalized, "route_scale": scale}


def _described(keys: _Keys, facts: Facts) -> dict[str, Any]:
    """A router whose kind the metadata say."""
    normalized, scale = keys.flag("expert_weights_norm", False), _scale(keys)
    gating, groups, grouped = _gating(keys)
    _warn_of_routing(keys, gating)
    if gating == SIGMOID:
        return {"kind": "sigmoid_biased", "normalize_gates": normalized, "route_scale": scale, **groups}
    if gating != SOFTMAX:
        raise keys.refuse("expert_gating_func", "1 (softmax) and 2 (sigmoid) are read")
    if any(name.endswith("exp_probs_b.bias") for name in facts.names):
        raise keys.refuse("expert_gating_func", "a softmax router has no selection bias, but exp_probs_b is there")
    if not grouped:
        return {"kind": "softmax_topk", "normalize_gates": normalized, "route_scale": scale}
    if normalized:
        raise keys.refuse("expert_weights_norm", "gates of group-limited softmax routing are not normalised")
    return {"kind": "group_limited", "route_scale": scale, **groups}


def _warn_of_routing(keys: _Keys, gating: int) -> None:
    """Files made before llama.cpp wrote a key are read as it computed then, and seldom as the model was trained."""
    experts = keys.count("expert_count", 0, least=0)
    if not experts:
        return
    keys.assumed("expert_gating_func", "softmax is taken")
    if gating == SIGMOID:
        keys.assumed("expert_weights_norm", "gates are not normalised")
        keys.assumed("expert_weights_scale", "gates are not scaled")
    published = _V3_GROUPS if gating == SIGMOID else _V2_GROUPS.get(experts)
    if published is not None and not keys.has("expert_group_count"):
        groups = " ".join(
            f"--metadata {keys.prefix}{key}=N" for key in ("expert_group_count", "expert_group_used_count")
        )
        keys.warnings.append(
            f"{keys.prefix}expert_group_count is missing, as in files made before autumn 2025: routing over all "
            f"{experts} experts without groups is read, as llama.cpp computed then; {published}: "
            f"`finemoe import {groups}` says so"
        )


def _scale(keys: _Keys) -> float:
    return keys.number("expert_weights_scale", 1.0) or 1.0  # llama.cpp takes 0 for "do not scale"


def _gating(keys: _Keys) -> tuple[int, dict[str, int], bool]:
    """The function of the scores, the groups as a router's settings, and whether there are any."""
    gating = keys.count("expert_gating_func", SOFTMAX, least=0) or SOFTMAX
    groups, used = keys.count("expert_group_count", 1, least=0), keys.count("expert_group_used_count", 1, least=0)
    return gating, {"num_groups": groups, "groups_per_token": used} if groups > 1 else {}, groups > 1
