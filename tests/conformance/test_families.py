"""What every model family must satisfy; a new one is covered by its line in FAMILIES and a released config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from checkpoint.huggingface.released_configs import RELEASED
from finemoe.checkpoint.gguf.metadata import describe
from finemoe.checkpoint.huggingface import families
from finemoe.checkpoint.huggingface.accounting import split_copies
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.proof.twin import shrink
from finemoe.checkpoint.storage.safetensors import span
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer

TWINS = {name: shrink(raw) for name, raw in RELEASED.items()}
EVERY = pytest.mark.parametrize("name", TWINS)
TRAINING = {"balance", "capacity_factor", "capacity_level", "capacity_exempt", "init_std"}


def test_every_family_has_a_released_config_and_its_own_name() -> None:
    assert {raw["model_type"] for raw in RELEASED.values()} == set(FAMILIES)
    assert all(family.name == name for name, family in FAMILIES.items())
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(FAMILIES)


@EVERY
def test_a_family_reads_back_what_it_writes(name: str) -> None:
    family = FAMILIES[RELEASED[name]["model_type"]]
    config = family.to_config(RELEASED[name])  # as it was published, prediction modules and all
    raw = family.from_config(config)
    assert raw["model_type"] == family.name
    assert raw["architectures"] == RELEASED[name]["architectures"]
    assert family.to_config(raw) == config
    assert family.from_config(family.to_config(raw)) == raw


@EVERY
def test_every_tensor_of_the_model_has_one_place(name: str) -> None:
    family = FAMILIES[TWINS[name]["model_type"]]
    config = family.to_config(TWINS[name])
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Transformer(config).state_dict().items()}
    loaded, _, _ = split_copies(family.placements(config))
    filled = dict.fromkeys(shapes, 0)
    for placement in loaded.values():
        filled[placement.ours] += span(tuple(shapes[placement.ours]), placement.index)[1]
    assert filled == {key: shape.numel() for key, shape in shapes.items()}


def without(value: Any) -> Any:
    """A dump of a configuration without what concerns training."""
    if isinstance(value, dict):
        return {key: without(inner) for key, inner in value.items() if key not in TRAINING}
    return [without(inner) for inner in value] if isinstance(value, list | tuple) else value


def others(value: Any) -> Iterator[Any]:
    """Values that a setting might have instead."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value)
    elif isinstance(value, float):
        yield 1.5 * value
    elif value is None:
        yield from (2, 8.0)
    elif isinstance(value, str):
        yield from ("half_split", "interleaved", "none", "head", "projection", "sqrtsoftplus")


def variations(value: Any) -> Iterator[Any]:
    """Copies of a configuration's dump, each with one setting changed; in lists in all places at once, or the last."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for other in variations(inner) if isinstance(inner, dict | list | tuple) else others(inner):
                yield {**value, key: other}
    elif value:
        for other in variations(value[-1]):
            yield [*value[:-1], other]
            yield [other if one == value[-1] else one for one in value]


def goes_to_gguf(config: ModelConfig) -> bool:
    """Whether a file can hold it; `describe` reads back what it writes."""
    try:
        describe(config)
    except CheckpointError:
        return False
    return True


WRITTEN: dict[str, tuple[int, int]] = {
    "deepseek-llm-7b": (17, 21),
    "deepseek-coder-6.7b": (18, 22),
    "deepseek-r1-distill-llama-8b": (23, 26),
    "smollm2-135m": (18, 22),
    "deepseek-r1-distill-qwen-1.5b": (19, 21),
    "qwen3-0.6b": (19, 20),
    "mistral-7b-instruct-v0.3": (19, 22),
    "mixtral-8x7b": (45, 48),
    "olmoe-1b-7b": (41, 40),
    "qwen1.5-moe-a2.7b": (46, 41),
    "qwen3-30b-a3b": (46, 46),
    "deepseek-moe-16b": (40, 40),
    "deepseek-v2-lite": (39, 40),
    "deepseek-v2": (39, 1),
    "deepseek-v3": (41, 40),
    "glm-4.5-air": (45, 0),
    "glm-4.5": (45, 0),
    "kimi-k2": (43, 0),
}
"""How many of the variations are written to a folder, and to GGUF: what is refused, is refused on purpose."""


@EVERY
def test_every_other_setting_is_written_or_refused(name: str) -> None:
    """One setting after another is changed: what the family then writes says so, or it refuses."""
    family = FAMILIES[TWINS[name]["model_type"]]
    tried = written = to_gguf = 0
    for table in variations(family.to_config(TWINS[name]).model_dump()):
        try:
            config = ModelConfig.model_validate(table)
        except ValidationError:
            continue
        tried += 1
        to_gguf += goes_to_gguf(config)
        try:
            back = family.to_config(family.from_config(config))
        except CheckpointError:
            continue
        written += 1
        assert without(back.model_dump()) == without(config.model_dump())
    assert (written, to_gguf) == WRITTEN[name]
    assert tried > written
