"""What the families share: the plain fields, feed-forward layers by index, and the checks before writing them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finemoe.checkpoint.huggingface.fields import MAX_EXPERTS, MAX_LAYERS, Fields, shown
from finemoe.checkpoint.huggingface.fp8 import block_of
from finemoe.core.config import parse
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig

_E4M3 = ("e4m3", "e4m3fn", "float8_e4m3fn", "float8_e4m3")
# Beside what is read: activations, how new factors are rounded, and which tensors are plain, where each says its type.
_QUANTIZATION = frozenset(
    {
        *("quant_method", "weight_block_size", "fmt"),
        *("activation_scheme", "scale_fmt", "ignored_layers", "modules_to_not_convert"),
    }
)


@dataclass(frozen=True)
class Layers:
    """The layers of a file: one attention, and a feed-forward for every index."""

    attention: dict[str, Any]
    feed_forward: Callable[[int], dict[str, Any]]
    num_layers: int
    num_mtp: int = 0


def build(fields: Fields, layers: Layers) -> ModelConfig:
    """The ModelConfig of the fields that all families share, and of `layers`.

    Raises:
        CheckpointError: sizes that no model can have.
    """
    if layers.num_layers + layers.num_mtp > MAX_LAYERS:
        fields.refuse("num_hidden_layers", layers.num_layers, f"at most {MAX_LAYERS} layers are read")
    indices = range(layers.num_layers + layers.num_mtp)
    blocks = [{"attention": layers.attention, "feed_forward": layers.feed_forward(index)} for index in indices]
    experts = sum(block["feed_forward"].get("num_routed_experts", 0) for block in blocks)
    if experts > MAX_EXPERTS:
        raise CheckpointError(f"config.json: asks for {experts} experts in all; at most {MAX_EXPERTS} are read")
    values = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "blocks": blocks[: layers.num_layers],
        "mtp": blocks[layers.num_layers :],
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "init_std": fields.number("initializer_range"),
        "norm_eps": fields.number("rms_norm_eps"),
        "max_positions": fields.integer("max_position_embeddings"),
    }
    try:
        return parse(ModelConfig, values, "config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def read_general(fields: Fields) -> None:
    """What any family may say: the class, full attention in every layer, and weights plain or in blocks of FP8.

    Raises:
        CheckpointError: anything else.
    """
    if fields.has("architectures"):
        names = fields.value("architectures")
        if not isinstance(names, list) or (names and not any(str(name).endswith("ForCausalLM") for name in names)):
            fields.refuse("architectures", names, "finemoe opens language models (...ForCausalLM) only")
    if fields.has("layer_types"):
        kinds = fields.value("layer_types")
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            fields.refuse("layer_types", kinds, "finemoe has full attention only")
    window, positions = fields.raw.get("sliding_window"), fields.raw.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(positions, int) and window >= positions:
        fields.has("sliding_window")  # no sequence is longer
    if fields.has("quantization_config"):
        _read_quantization(fields)


def _read_quantization(fields: Fields) -> None:
    table = fields.value("quantization_config")
    if not isinstance(table, dict) or table.get("quant_method") != "fp8" or table.get("weight_block_size") is None:
        fields.refuse("quantization_config", table, "only FP8 with a `weight_block_size` is read, such as [128, 128]")
    block_of({"quantization_config": table})
    if table.get("fmt") not in (None, *_E4M3):
        fields.refuse("quantization_config.fmt", table["fmt"], f"only {_E4M3[0]} is read")
    for key in sorted(table.keys() - _QUANTIZATION):
        fields.note(f"`quantization_config.{key}` {shown(table[key])} is unknown and not used")
    fields.note("weights in FP8 blocks: computed with as bf16 or fp32, and activations are not rounded to FP8")


def dense(width: int) -> dict[str, Any]:
    """A SwiGLU."""
    return {"kind": "dense", "ffn_hidden_size": width}


def read_leading(
    fields: Fields, attention: dict[str, Any], router: dict[str, Any], *, balance: float = 0.0, num_mtp: int = 0
) -> ModelConfig:
    """`first_k_dense_replace` dense layers, then MoE layers to the end, the prediction modules included.

    Raises:
        CheckpointError: as `build`.
    """
    fields.only("moe_layer_freq", 1, why="transformers and DeepSeek's code read that differently; only 1 is clear")
    num_layers, first = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace", 0)
    plain = dense(fields.integer("intermediate_size")) if first else None
    fields.has("intermediate_size")
    if first < num_layers + num_mtp and fields.value("n_routed_experts") is None:
        first = num_layers + num_mtp
        plain = dense(fields.integer("intermediate_size"))
    moe: dict[str, Any] = {}
    names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    if first < num_layers + num_mtp:
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
    return build(fields, Layers(attention, lambda i: plain if plain and i < first else moe, num_layers, num_mtp))


def write_leading(config: ModelConfig) -> tuple[dict[str, Any], MoEConfig | None]:
    """The same fields for a model, and its one MoE layer; None where none routes.

    Raises:
        CheckpointError: dense layers lie elsewhere, or layers differ.
    """
    blocks = [*config.blocks, *config.mtp]
    routed = [isinstance(block.feed_forward, MoEConfig) for block in blocks]
    first = routed.index(True) if any(routed) else len(blocks)
    if not all(routed[first:]):
        raise CheckpointError("it has dense layers after its first MoE layer, and the family has them at the bottom")
    plain, moe = the_dense(blocks), the_moe(blocks)
    values: dict[str, Any] = {"first_k_dense_replace": first}
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
    return values, moe


def read_listed(fields: Fields, attention: dict[str, Any], moe: dict[str, Any]) -> ModelConfig:
    """Layers that are dense where `mlp_only_layers` or `decoder_sparse_step` says so (Qwen).

    Raises:
        CheckpointError: as `build`.
    """
    num_layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step")
    listed = fields.value("mlp_only_layers") or []
    if not isinstance(listed, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        fields.refuse("mlp_only_layers", listed, "a list of layer numbers is needed")
    plain = set(listed)
    routed = [i not in plain and (i + 1) % step == 0 for i in range(min(num_layers, 1 << 20))]
    width = fields.integer("intermediate_size") if not all(routed) else fields.value("intermediate_size")
    return build(fields, Layers(attention, lambda i: moe if routed[i] else dense(width), num_layers))


def write_listed(config: ModelConfig, plain: DenseConfig | None, moe: MoEConfig) -> dict[str, Any]:
    """The same fields for a model, and the sizes of its layers."""
    return {
        "decoder_sparse_step": 1,
        "intermediate_size": plain.ffn_hidden_size if plain is not None else moe.expert_hidden_size,
        "mlp_only_layers": [i for i in range(len(config.blocks)) if i not in config.moe_layers],
        "moe_intermediate_size": moe.expert_hidden_size,
        "num_experts_per_tok": moe.experts_per_token,
    }


def renamed(fields: Fields, name: str, alias: str) -> int:
    """A whole number with two names; null is 0.

    Raises:
        CheckpointError: both are there and differ.
    """
    if fields.has(alias) and not fields.has(name):
        return fields.integer(alias, 0)
    if name in fields.raw and not fields.has(name):
        return 0  # null: none
    found = fields.integer(name, 0)
    fields.only(alias, found, why=f"`{name}` is {found}; keep one")
    return found


def write_common(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    """The fields that all families share.

    Raises:
        CheckpointError: nobody says how long a sequence the model is made for.
    """
    positions = config.max_positions or max_positions
    if positions is None:
        raise CheckpointError("the model does not say max_positions, which config.json must; give the longest sequence")
    return {
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "max_position_embeddings": positions,
        "num_hidden_layers": len(config.blocks),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "use_cache": True,
    }


def the_attention(config: ModelConfig) -> GroupedQueryConfig | LatentConfig:
    """The attention of all layers.

    Raises:
        CheckpointError: layers differ.
    """
    blocks = [*config.blocks, *config.mtp]
    first = blocks[0].attention
    if any(block.attention != first for block in blocks):
        raise CheckpointError("its layers have different attention, and the format has one for all")
    attention: GroupedQueryConfig | LatentConfig = first
    return attention


def the_dense(blocks: Sequence[BlockConfig]) -> DenseConfig | None:
    """The one dense feed-forward of `blocks`; None where all route.

    Raises:
        CheckpointError: two that differ, or a clamp.
    """
    found = [block.feed_forward for block in blocks if isinstance(block.feed_forward, DenseConfig)]
    return _only(found, "dense layers")


def the_moe(blocks: Sequence[BlockConfig]) -> MoEConfig | None:
    """The one MoE feed-forward of `blocks`, without what concerns training alone; None where none routes.

    Raises:
        CheckpointError: two that differ, or a clamp.
    """
    found = [block.feed_forward for block in blocks if isinstance(block.feed_forward, MoEConfig)]
    return _only([layer.without_training() for layer in found], "MoE layers")


def _only(layers: Sequence[Any], what: str) -> Any:
    if any(layer != layers[0] for layer in layers):
        raise CheckpointError(f"its {what} differ in size or routing, and the format has one for all")
    if layers and layers[0].swiglu_limit is not None:
        raise CheckpointError(f"its {what} clamp SwiGLU (swiglu_limit), and the format cannot say that")
    return layers[0] if layers else None


def refuse_mtp(config: ModelConfig) -> None:
    """Raise where there are multi-token prediction modules."""
    if config.mtp:
        raise CheckpointError(
            f"the format has no place for the {len(config.mtp)} multi-token prediction module(s); "
            "a GGUF file leaves them out (OUT.gguf)"
        )


def training_only(config: ModelConfig) -> tuple[str, ...]:
    """What concerns training alone and no Hugging Face config of ours holds, in words."""
    layers = [b.feed_forward for b in (*config.blocks, *config.mtp) if isinstance(b.feed_forward, MoEConfig)]
    said: list[str] = []
    for layer in layers:
        terms = {name: value for name, value in layer.balance.model_dump().items() if value and name != "num_devices"}
        said += [f"balance.{name} {value:g}" for name, value in terms.items()]
        if layer.capacity_factor is not None:
            said.append(f"capacity_factor {layer.capacity_factor:g}")
    return tuple(dict.fromkeys(said))
