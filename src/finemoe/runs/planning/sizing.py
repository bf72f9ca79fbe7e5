"""The size of whatever describes a model: a preset, a recipe, a run, a checkpoint, or a configuration alone.

Nothing here needs the weights, nor memory for them: a config.json that was fetched before 700 GB, and the header of a
GGUF file of which no more was fetched, have their figures all the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finemoe.checkpoint.huggingface.families import family_of
from finemoe.checkpoint.kinds import CONFIG, read_config, require_there
from finemoe.checkpoint.open import describe_model, read_model_config
from finemoe.checkpoint.own_config import refuse_older
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.core.config import did_you_mean, parse, read_toml
from finemoe.core.errors import ConfigError, named
from finemoe.data import DataConfig
from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import PRESETS, resolve
from finemoe.model.size import ModelSize, measure

# Where a model was trained elsewhere nothing says on which length; DeepSeek's own models all began on 4096.
_ELSEWHERE = 4096
# Keys of a Hugging Face config.json that no file of ours has outside its tables.
_FOREIGN = frozenset({"architectures", "hidden_size", "num_attention_heads", "num_hidden_layers"})


@dataclass(frozen=True)
class Described:
    """A model, and what else its description says."""

    config: ModelConfig
    seq_len: int
    """[tokens] As asked; else as in training, where that is known."""
    unrounded: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """All tables of the recipe, or of the run, that it was read from."""


def size(model: str | os.PathLike[str] | ModelConfig, seq_len: int | None = None) -> ModelSize:
    """Parameters, FLOPs and cache of a model, from what describes it; see `finemoe.model.size`.

    Args:
        model: name of a preset; path of a recipe, a run, a checkpoint, an imported or Hugging Face folder (config.json
            is enough), a config.json itself, or a GGUF file (its header is enough); or a configuration.
        seq_len: tokens per sequence; None: as in training, where that is known.

    Raises:
        ConfigError, CheckpointError: none of these, or no valid model.
    """
    found = describe(model, seq_len)
    return measure(found.config, found.seq_len, found.unrounded, found.notes)


def describe(model: str | os.PathLike[str] | ModelConfig, seq_len: int | None = None) -> Described:
    """The configuration of whatever describes a model; arguments and errors as of `size`."""
    if isinstance(model, ModelConfig):
        return _elsewhere(model, seq_len)
    name, path = os.fspath(model), Path(model)
    if name in PRESETS:
        return _of_table({"preset": name}, name, seq_len or PRESETS[name].seq_len)
    if path.suffix == ".toml":
        return _of_recipe(read_toml(path), path, seq_len)
    if not path.exists() and not path.is_symlink() and path.suffix.lower() not in (".gguf", ".json"):
        raise ConfigError(
            f"{name}: neither a recipe, nor a run, nor a checkpoint, nor a preset{did_you_mean(name, sorted(PRESETS))}"
        )
    require_there(path)
    if path.is_file() and path.suffix.lower() not in (".gguf", ".json"):
        if path.suffix.lower() == ".safetensors":
            raise ConfigError(f"{path}: weights alone do not say which model they are of; give their config.json")
        return _of_recipe(read_toml(path), path, seq_len)
    file = folder_file(path, CONFIG) if path.is_dir() and (path / CONFIG).exists() else path
    if file.suffix.lower() == ".json":
        raw = read_config(path) if path.is_dir() else read_json(folder_file(file.parent, file.name))
        if "model_type" not in raw and "model" not in raw and raw.keys() & _FOREIGN:
            with named(file):
                family_of(raw)
        elif "model_type" not in raw and "source" not in raw:  # a run's, or one of its checkpoints'
            refuse_older(raw, file)
            return _of_recipe(raw, file, seq_len)
    return _elsewhere(describe_model(path), seq_len)


def _elsewhere(config: ModelConfig, seq_len: int | None) -> Described:
    return Described(config, seq_len or min(config.max_positions or _ELSEWHERE, _ELSEWHERE))


def _of_table(table: dict[str, Any], source: str, seq_len: int) -> Described:
    """What a `[model]` table says. A preset's published widths count only where nothing was changed."""
    if "blocks" in table:
        return Described(parse(ModelConfig, table, source), seq_len)
    config = expand(resolve(table, source))
    if "preset" in table:
        preset = PRESETS[table["preset"]]
        if config == expand(resolve(preset.model, source)):
            return Described(config, seq_len, preset.unrounded, preset.notes)
    return Described(config, seq_len)


def _of_recipe(recipe: Mapping[str, Any], path: Path, seq_len: int | None) -> Described:
    """A recipe, or a run's config.json, at the length of its sequences."""
    model, data = recipe.get("model"), recipe.get("data", {})
    if model is None and isinstance(recipe.get("start_from"), str):
        model = read_model_config(recipe["start_from"]).model_dump(mode="json")
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise ConfigError(f'{path}: no [model] table; the smallest is [model] with preset = "tiny-moe"')
    length = seq_len or data.get("sequence_length")
    if length is None:
        length = DataConfig().sequence_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(f"{path}: `data.sequence_length`: must be a whole number above 0 (got {length!r})")
    return replace(_of_table(model, f"{path}: model", length), recipe=recipe)
