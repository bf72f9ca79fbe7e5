"""Model families of Hugging Face checkpoints. A new one is a file here and a line in FAMILIES.

`FAMILIES[model_type].read(raw)` understands every field or says which it does not; `from_config` is its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.checkpoint.huggingface.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    kimi_k2,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import shown
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig

FAMILIES: Mapping[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "kimi_k2": kimi_k2.FAMILY,
    "deepseek": deepseek.FAMILY,
}
"""By `model_type`; a run is written as the first that computes its model, so the most widely read come first."""


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        CheckpointError: none, or one that is not known.
    """
    name = raw.get("model_type")
    if name is None:
        classes = raw.get("architectures")
        one = classes[0] if isinstance(classes, list) and classes else None
        meant = next((known.name for known in FAMILIES.values() if known.architecture == one), None)
        fix = f"; set it to one of {', '.join(FAMILIES)}"
        fix = f'; `architectures` says {one}, so set `"model_type": "{meant}"`' if meant else fix
        raise CheckpointError(f"config.json: no `model_type`, which says how all else is read{fix}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"config.json: `model_type` is {shown(name)}, and finemoe opens {', '.join(FAMILIES)}; "
            "another architecture computes something else, even where its tensors look alike"
        )
    return FAMILIES[name]


def representable_as(config: ModelConfig) -> dict[str, str | None]:
    """For every family None, or the reason why it cannot compute what `config` does."""
    found: dict[str, str | None] = {}
    for name, family in FAMILIES.items():
        try:
            family.from_config(config, max_positions=1)
        except CheckpointError as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found
