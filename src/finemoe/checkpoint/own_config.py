"""The model in a config.json that finemoe wrote; where it is too old to be read, one sentence says what reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.core.config import parse
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.model.config import ModelConfig


def model_of(raw: Mapping[str, Any], file: Path) -> ModelConfig:
    """The model that the config.json of a run, a checkpoint or an import describes.

    Args:
        raw: what stands in it.
        file: named in errors.

    Raises:
        CheckpointError: it holds no `model`, or one nested too deeply.
        ConfigError: a model that is none, or that an older version wrote.
    """
    model = raw.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{file}: holds no `model`")
    refuse_older(raw, file)
    try:
        return parse(ModelConfig, model, f"{file}: model")
    except RecursionError as error:
        raise CheckpointError(f"{file}: `model` is nested too deeply") from error


def refuse_older(raw: Any, file: Path) -> None:
    """Refuse what a version wrote that spelt its models otherwise; whatever else is wrong with `raw` is left alone.

    Raises:
        ConfigError: it is so; names the version that can open it.
    """
    blocks = _at(_at(raw, "model"), "blocks")
    attentions = [_at(block, "attention") for block in (blocks if isinstance(blocks, list) else [])]
    if any(_at(attention, "rope_theta") is not None for attention in attentions):
        raise ConfigError(
            f"{file}: made by finemoe 0.1.0, whose `attention.rope_theta` is `attention.rope.theta` now; "
            "finemoe 0.1.0 (revision 37140b9) opens it, and nothing later"
        )


def _at(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, Mapping) else None
