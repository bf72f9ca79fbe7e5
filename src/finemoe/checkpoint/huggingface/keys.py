"""Which tensor of a Hugging Face file fills which of ours: the placements of a model, in the spelling of a family.

The n-th multi-token prediction module is layer num_layers + n - 1 of the file, as in the released DeepSeek-V3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from finemoe.checkpoint.weights.placement import Placement
from finemoe.core.errors import CheckpointError
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig


@dataclass(frozen=True)
class Spellings:
    """How the files of a family name the parts of an MoE layer."""

    moe: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


PLAIN = Spellings()
"""Those of DeepSeek, and of most."""
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_INV_FREQ = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def placements(config: ModelConfig, names: Spellings = PLAIN) -> list[Placement]:
    """Where each tensor of a file lies in `Transformer(config).state_dict()`.

    Every part of every entry occurs once; at the end, parts occur again under keys that a file may have as copies: the
    head of tied embeddings, and the embedding and head that DeepSeek-V3's prediction modules share.

    Raises:
        CheckpointError: the model has a router that learns nothing, for which no family has a name.
    """
    vocabulary, hidden = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    found = [
        Placement("model.embed_tokens.weight", "embedding.weight", vocabulary),
        Placement("model.norm.weight", "norm.weight", hidden),
    ]
    if not config.tie_embeddings:
        found.append(Placement("lm_head.weight", "head.weight", vocabulary))
    for index, block in enumerate(config.blocks):
        found += _block(f"model.layers.{index}", f"blocks.{index}", block, config.hidden_size, names)
    for depth, block in enumerate(config.mtp):
        found += _mtp(f"model.layers.{len(config.blocks) + depth}", f"mtp.{depth}", block, config.hidden_size, names)
    return found + list(_copies(config))


def _mtp(theirs: str, ours: str, block: BlockConfig, hidden: int, names: Spellings) -> Iterator[Placement]:
    yield Placement(f"{theirs}.enorm.weight", f"{ours}.embedding_norm.weight", (hidden,))
    yield Placement(f"{theirs}.hnorm.weight", f"{ours}.hidden_norm.weight", (hidden,))
    yield Placement(f"{theirs}.eh_proj.weight", f"{ours}.projection.weight", (hidden, 2 * hidden))
    yield Placement(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight", (hidden,))
    yield from _block(theirs, f"{ours}.block", block, hidden, names)


def _block(theirs: str, ours: str, block: BlockConfig, hidden: int, names: Spellings) -> Iterator[Placement]:
    yield Placement(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", (hidden,))
    yield Placement(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight", (hidden,))
    attention = block.attention
    if isinstance(attention, LatentConfig):
        yield from _latent(f"{theirs}.self_attn", f"{ours}.attention", attention, hidden)
    else:
        yield from _grouped_query(f"{theirs}.self_attn", f"{ours}.attention", attention, hidden)
    layer = block.feed_forward
    if isinstance(layer, DenseConfig):
        yield from _swiglu(f"{theirs}.mlp", f"{ours}.feed_forward", layer.ffn_hidden_size, hidden)
    else:
        yield from _moe(f"{theirs}.{names.moe}", f"{ours}.feed_forward", layer, hidden, names)


def _grouped_query(theirs: str, ours: str, config: GroupedQueryConfig, hidden: int) -> Iterator[Placement]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield Placement(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (size, hidden))
        if config.qkv_bias:
            yield Placement(f"{theirs}.{name}.bias", f"{ours}.{name}.bias", (size,))
    yield Placement(f"{theirs}.o_proj.weight", f"{ours}.o_proj.weight", (hidden, queries))
    for name, size in zip(("q_norm", "k_norm"), config.norm_sizes(), strict=False):
        yield Placement(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (size,))


def _latent(theirs: str, ours: str, config: LatentConfig, hidden: int) -> Iterator[Placement]:
    queries, rank = config.num_heads * config.qk_head_dim, config.kv_lora_rank
    if config.q_lora_rank is None:
        yield Placement(f"{theirs}.q_proj.weight", f"{ours}.q_proj.weight", (queries, hidden))
    else:
        compressed = config.q_lora_rank
        yield Placement(f"{theirs}.q_a_proj.weight", f"{ours}.q_down_proj.weight", (compressed, hidden))
        yield Placement(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm.weight", (compressed,))
        yield Placement(f"{theirs}.q_b_proj.weight", f"{ours}.q_proj.weight", (queries, compressed))
    down = (rank + config.qk_rope_head_dim, hidden)
    yield Placement(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.kv_down_proj.weight", down)
    yield Placement(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", (rank,))
    up = (config.num_heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield Placement(f"{theirs}.kv_b_proj.weight", f"{ours}.kv_up_proj.weight", up)
    output = (hidden, config.num_heads * config.v_head_dim)
    yield Placement(f"{theirs}.o_proj.weight", f"{ours}.o_proj.weight", output)


def _swiglu(theirs: str, ours: str, width: int, hidden: int) -> Iterator[Placement]:
    for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        yield Placement(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", shape)


def _moe(theirs: str, ours: str, config: MoEConfig, hidden: int, names: Spellings) -> Iterator[Placement]:
    if not config.router.learned:
        raise CheckpointError(f"{ours}.router: no Hugging Face family has a {config.router.kind} router")
    experts, width = config.num_routed_experts, config.expert_hidden_size
    yield Placement(f"{theirs}.gate.weight", f"{ours}.router.weight", (experts, hidden))
    if config.router.selects_with_bias:
        yield Placement(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.selection_bias", (experts,))
    gate_up, down = f"{ours}.experts.gate_up_proj", f"{ours}.experts.down_proj"
    inner, outer = (width, hidden), (hidden, width)
    for expert in range(experts):
        each = f"{theirs}.experts.{expert}"
        yield Placement(f"{each}.{names.gate}.weight", gate_up, inner, (expert, slice(0, width)))
        yield Placement(f"{each}.{names.up}.weight", gate_up, inner, (expert, slice(width, 2 * width)))
        yield Placement(f"{each}.{names.down}.weight", down, outer, (expert,))
    if config.num_shared_experts:
        shared = config.num_shared_experts * width
        yield from _swiglu(f"{theirs}.{names.shared}", f"{ours}.shared_experts", shared, hidden)
    if config.gate_shared_experts:
        yield Placement(f"{theirs}.{names.shared}_gate.weight", f"{ours}.shared_gate.weight", (1, hidden))


def _copies(config: ModelConfig) -> Iterator[Placement]:
    """Keys that hold a second time what a placement before them holds, and may be missing."""
    vocabulary = (config.vocab_size, config.hidden_size)
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    if config.tie_embeddings:
        yield Placement("lm_head.weight", head, vocabulary)
    for depth in range(len(config.mtp)):
        layer = f"model.layers.{len(config.blocks) + depth}"
        yield Placement(f"{layer}.embed_tokens.weight", "embedding.weight", vocabulary)
        yield Placement(f"{layer}.shared_head.head.weight", head, vocabulary)


def ignorable(key: str) -> str | None:
    """Why a tensor that has no placement may be left unused; None where nothing is known of it."""
    if _INV_FREQ.fullmatch(key):
        return "rotary frequencies, which follow from config.json"
    return None


def modules_after(names: Iterable[str], first: int) -> list[str]:
    """Names of the tensors in layers from `first` on, where prediction modules follow the layers."""
    matches = ((name, _LAYER.match(name)) for name in names)
    return [name for name, match in matches if match is not None and int(match[1]) >= first]


def without_absent_mtp(config: ModelConfig, names: Collection[str]) -> tuple[ModelConfig, tuple[str, ...]]:
    """`config` without the last prediction modules of which a file that holds `names` has no tensor; and a note.

    transformers writes DeepSeek-V3's `num_nextn_predict_layers` as it read it, but never the modules themselves.
    """
    present = len(config.mtp)
    while present and not any(name.startswith(f"model.layers.{len(config.blocks) + present - 1}.") for name in names):
        present -= 1
    if present == len(config.mtp):
        return config, ()
    note = f"config.json promises {len(config.mtp)} multi-token prediction module(s), and the weights hold {present}: "
    if present:
        note += f"opened with {present}, which speculative decoding and MTP training use; the others are not there"
    else:
        note += "opened without; speculative decoding and MTP training need them"
    return config.model_copy(update={"mtp": config.mtp[:present]}), (note,)
