"""The model that a configuration describes: size, layers, positions, prediction modules, training, exports."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.doctor.findings import Findings, number
from finemoe.checkpoint.doctor.subject import Subject
from finemoe.checkpoint.gguf.exporting import ROW_BLOCK
from finemoe.checkpoint.gguf.keys import stored_tensors
from finemoe.checkpoint.gguf.metadata import describe
from finemoe.checkpoint.gguf.tokenizer import metadata_of
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.layers import training_only
from finemoe.checkpoint.storage.untrusted import TOKENIZER_BYTES, folder_file, read_bytes
from finemoe.core.errors import CheckpointError, DataError, FinemoeError
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.select import GroupsConfig
from finemoe.model.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from finemoe.model.size import measure
from finemoe.text.files import COMPANIONS

_IN_BLOCKS = "it was made small, in blocks of few bits that no Hugging Face class reads and GGUF files alone hold"
_SLACK = 1.01
_CONTEXT = 4096  # where a model does not say; changes FLOPs alone, which are not shown


def size_of(config: ModelConfig) -> dict[str, Any]:
    """Parameters and cache."""
    size = measure(config, config.max_positions or _CONTEXT)
    return {
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "mtp_parameters": size.mtp_parameters,
        "cache_elements_per_token": size.cache_elements_per_token,
    }


def layers_of(config: ModelConfig) -> dict[str, Any]:
    """Layers, attention and experts, in words."""
    moe = [block.feed_forward for block in config.blocks if isinstance(block.feed_forward, MoEConfig)]
    attentions = list(dict.fromkeys(_attention(block) for block in config.blocks))
    experts = list(dict.fromkeys(_experts(layer) for layer in moe))
    return {
        "layers": len(config.blocks),
        "moe_layers": len(moe),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tied": config.tie_embeddings,
        "attention": attentions,
        "experts": experts,
        "routers": list(dict.fromkeys(_router(layer) for layer in moe)),
    }


def _attention(block: BlockConfig) -> str:
    attention = block.attention
    if isinstance(attention, LatentConfig):
        query = f", queries through {attention.q_lora_rank}" if attention.q_lora_rank else ""
        return f"latent, {number(attention.num_heads, 'head')}, latent of {attention.kv_lora_rank}{query}"
    assert isinstance(attention, GroupedQueryConfig)
    shared = "" if attention.num_kv_heads == attention.num_heads else f", {number(attention.num_kv_heads, 'key head')}"
    turning = f", {attention.turning} of them turning" if attention.turning < attention.head_dim else ""
    return f"grouped-query, {number(attention.num_heads, 'head')} of {attention.head_dim}{turning}{shared}"


def _experts(layer: MoEConfig) -> str:
    shared = f", {layer.num_shared_experts} shared" if layer.num_shared_experts else ""
    width = f"width {layer.expert_hidden_size:,}"
    return f"{layer.experts_per_token} of {layer.num_routed_experts:,} routed{shared}, {width}"


def _router(layer: MoEConfig) -> str:
    router = layer.router
    text = str(router.kind)
    if isinstance(router, GroupsConfig) and router.num_groups > 1:
        text += f", {router.groups_per_token} of {router.num_groups} groups"
    scale = router.model_dump().get("route_scale", 1)
    return text if scale == 1 else f"{text}, gates times {scale:g}"


def count_mtp(subject: Subject) -> dict[str, int]:
    """Prediction modules that the foreign configuration announces, and those whose weights are there."""
    config = subject.config
    announced = subject.raw.get("num_nextn_predict_layers", 0)
    usable = len(config.mtp) if config is not None else 0
    says = announced if type(announced) is int and announced > usable else usable
    present = {
        place.ours.split(".")[1]
        for name, place in (subject.places or {}).items()
        if place.ours.startswith("mtp.") and name in subject.held
    }
    return {"announced": says, "present": len(present)}


def check_rope(config: ModelConfig, found: Findings) -> list[dict[str, Any]]:
    """Each kind of rotary settings that the layers have, and whether they reach as far as the model says."""
    ropes = dict.fromkeys(block.attention.rope.model_dump_json() for block in (*config.blocks, *config.mtp))
    facts = []
    for text in ropes:
        rope = RopeConfig.model_validate_json(text)
        facts.append(
            {
                **rope.model_dump(mode="json"),
                "softmax_factor": rope.softmax_factor,
                "rotary_factor": rope.scaling.rotary_factor if isinstance(rope.scaling, YarnScaling) else 1.0,
                "max_positions": config.max_positions,
            }
        )
        _check_reach(rope, config.max_positions, found)
    return facts


def _check_reach(rope: RopeConfig, positions: int | None, found: Findings) -> None:
    scaling = rope.scaling
    if scaling is None or positions is None:
        return
    if not isinstance(scaling, YarnScaling | Llama3Scaling):
        if isinstance(scaling, LinearScaling) and scaling.factor < 1:
            found.warning("rope", f"linear scaling by {scaling.factor:g} squeezes positions together, not apart")
        return
    original = scaling.original_max_positions
    reach = scaling.factor * original
    where = f"{scaling.kind} scaling by {scaling.factor:g} from {original:,} positions"
    if positions > _SLACK * reach:
        found.warning(
            "rope", f"{where} reaches {reach:,.0f}, and max_position_embeddings says {positions:,}: one is wrong"
        )
    elif positions * _SLACK < original:
        found.warning(
            "rope", f"{where}, and max_position_embeddings says only {positions:,}, less than before it was stretched"
        )
    elif positions <= original and scaling.factor > 1:
        found.note("rope", f"{where} costs accuracy that {positions:,} positions would not need")


def training_of(config: ModelConfig) -> list[str]:
    """What would be live if the model were trained further, in words."""
    layers = [b.feed_forward for b in (*config.blocks, *config.mtp) if isinstance(b.feed_forward, MoEConfig)]
    if not layers:
        return ["no layer routes: nothing to balance"]
    said = []
    terms: dict[str, None] = {}
    for layer in layers:
        values = layer.balance.model_dump()
        terms |= {
            f"balance.{name} {value:g}": None for name, value in values.items() if value and name != "num_devices"
        }
    said.append("balance losses: " + (", ".join(terms) if terms else "none"))
    biased = [layer for layer in layers if layer.router.selects_with_bias]
    if biased:
        said.append(
            f"selection bias moves after each step in {number(len(biased), 'layer')} ([balancing] of the recipe)"
        )
    elif not terms:
        said.append("nothing keeps experts in balance: they may collapse in a long training")
    capacities = sorted({layer.capacity_factor for layer in layers if layer.capacity_factor is not None})
    if capacities:
        said.append(f"tokens above capacity {capacities[0]:g} are dropped")
    if config.mtp:
        said.append(f"multi-token prediction of depth {len(config.mtp)} ([mtp] of the recipe)")
    return said


def exports_of(subject: Subject) -> list[dict[str, Any]]:
    """For every format that is written: whether it can hold the model, what it leaves out, or why it cannot."""
    config = subject.config
    if config is None:
        return []
    always = ["no optimizer state"] if subject.kind in ("run", "checkpoint") else []
    facts = []
    for name, family in FAMILIES.items():
        if subject.blocks():
            facts.append(_export(name, "huggingface", reason=_IN_BLOCKS))
            continue
        try:
            family.from_config(config, max_positions=1)
        except CheckpointError as error:
            reason = str(error).partition(": ")[2] or str(error)
            facts.append(_export(name, "huggingface", reason=reason))
        else:
            lost = [f"no {text} (training)" for text in family.lost(config)]
            strange = subject.kind == "imported" and subject.family != name and bool(subject.carried)
            carried = [f"none of the {number(len(subject.carried), 'carried tensor')}"] if strange else []
            facts.append(_export(name, "huggingface", lost=[*always, *carried, *lost]))
    return [*facts, _gguf_export(subject, config, always)]


def _gguf_export(subject: Subject, config: ModelConfig, always: list[str]) -> dict[str, Any]:
    """The same for GGUF; a tokenizer that it has no name for is left out on request."""
    try:
        described = describe(config, config.max_positions or _CONTEXT)
    except FinemoeError as error:
        return _export("gguf", "gguf", reason=str(error).partition(": ")[2] or str(error))
    missing: list[str] = []
    if subject.kind != "gguf":
        try:
            ends = subject.raw.get("eos_token_id")
            missing = metadata_of(_companions(subject), config.vocab_size, "tokenizer", ends)[1]
        except DataError as error:
            reason = str(error).removeprefix("the tokenizer cannot be written to GGUF: ")
            missing = [f"no tokenizer, so --no-tokenizer must be given: {reason}"]
        except FinemoeError as error:
            return _export("gguf", "gguf", reason=str(error).partition(": ")[2] or str(error))
    training = [f"no {text} (training)" for text in training_only(config)]
    blocks = subject.blocks()
    stored = stored_tensors(config, described.variants)
    odd = [one.name for one in stored if one.source.ours in blocks and one.shape[-1] % ROW_BLOCK]
    wider = [f"{number(len(odd), 'tensor')} in F16, with rows that are no multiple of {ROW_BLOCK}"] if odd else []
    return _export(described.architecture, "gguf", lost=[*always, *training, *described.notes, *wider, *missing])


def _companions(subject: Subject) -> dict[str, bytes]:
    """Tokenizer and template, as an export takes them along."""
    files = {}
    for name in COMPANIONS:
        if (subject.home / name).exists():
            files[name] = read_bytes(folder_file(subject.home, name), TOKENIZER_BYTES)
    return files


def _export(name: str, form: str, lost: list[str] | None = None, reason: str | None = None) -> dict[str, Any]:
    return {"family": name, "format": form, "possible": reason is None, "lost": lost or [], "reason": reason}
