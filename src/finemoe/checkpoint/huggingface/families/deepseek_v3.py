"""DeepSeek-V3 and R1: latent attention, sigmoid scores with a selection bias, and prediction modules after the layers.

`read_v3` and `write_v3` are for families that are this one under another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.latent import read_latent, the_latent, write_latent
from finemoe.checkpoint.huggingface.layers import read_leading, renamed, write_leading
from finemoe.checkpoint.huggingface.routing import read_biased, write_biased
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig

V3_DEFAULTS: Mapping[str, Any] = {
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}


def read_v3(fields: Fields) -> ModelConfig:
    """The model of a DeepSeek-V3 config.

    Raises:
        CheckpointError: settings that our model cannot compute, or that implementations read differently.
    """
    if "rope_interleave" in fields.raw and fields.raw["rope_interleave"] is None:
        why = "transformers takes that for false and DeepSeek's code for true; write which of them the weights are for"
        fields.refuse("rope_interleave", None, why)
    fields.only("rope_interleave", True, False, why="true or false is needed")
    attention = read_latent(fields, "half_split" if fields.value("rope_interleave") is False else "interleaved")
    fields.only("scoring_func", "sigmoid", why="this family's routers score by sigmoid")
    fields.only("topk_method", "noaux_tc", why="this family chooses by noaux_tc")
    single = fields.has("num_experts_per_tok") and fields.value("num_experts_per_tok") == 1
    if single and fields.flag("norm_topk_prob"):
        fields.refuse("num_experts_per_tok", 1, "DeepSeek's code leaves a single gate as it is, transformers does not")
    num_mtp = renamed(fields, "num_nextn_predict_layers", "num_mtp_layers")
    router = read_biased(fields)
    if fields.has("aux_loss_alpha") and fields.value("aux_loss_alpha"):
        fields.note(
            f"`aux_loss_alpha` {fields.value('aux_loss_alpha')} is not taken over: DeepSeek-V3's code does not use it"
        )
    return read_leading(fields, attention, router, num_mtp=num_mtp)


def write_v3(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    """The fields of a DeepSeek-V3 config.

    Raises:
        CheckpointError: another model, or one that implementations read differently.
    """
    attention = the_latent(config)
    layers, moe = write_leading(config)
    values: dict[str, Any] = {
        **write_latent(config, attention, max_positions),
        **layers,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": len(config.mtp),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if attention.rope.layout == "half_split":
        values["rope_interleave"] = False
    if moe is None:
        return values
    router = write_biased(moe)
    if router["norm_topk_prob"] and moe.experts_per_token == 1:
        raise CheckpointError("its single gate is normalised, which DeepSeek's code and transformers do differently")
    return {**values, **router}


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, write_v3, defaults=V3_DEFAULTS, modules=True)
