"""Every named model, by group: data, no logic. Each module names its sources.

`GROUPS` is what `finemoe presets` shows; a new preset is an entry in the table of one of the modules. Names alone cost
no import, since a shell asks for them at every press of the tab key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finemoe.core.errors import ConfigError
from finemoe.model.presets.dense import DEEPSEEK_CODER, DEEPSEEK_LLM, R1_DISTILL, SMOLLM2
from finemoe.model.presets.latent import DEEPSEEK_V2, DEEPSEEK_V3
from finemoe.model.presets.moe import DEEPSEEK_MOE
from finemoe.model.presets.preset import Preset
from finemoe.model.presets.tiny import LADDERS, LITE, TINY

if TYPE_CHECKING:
    from finemoe.model.config import ModelRecipe

__all__ = ["GROUPS", "PRESETS", "Preset", "find_preset", "group_of", "resolve"]

GROUPS: dict[str, dict[str, Preset]] = {
    "DeepSeekMoE and its baselines": DEEPSEEK_MOE,
    "DeepSeek LLM and Coder, dense": {**DEEPSEEK_LLM, **DEEPSEEK_CODER},
    "DeepSeek-V2 and Coder-V2": DEEPSEEK_V2,
    "DeepSeek-V3 and R1": DEEPSEEK_V3,
    "Distilled R1, on dense bases": R1_DISTILL,
    "For laptops and workstations": {**SMOLLM2, **TINY, **LITE},
    "Ladders: V1, V2 and V3 of one size": LADDERS,
}
PRESETS: dict[str, Preset] = {name: preset for group in GROUPS.values() for name, preset in group.items()}


def find_preset(name: str) -> Preset:
    """The preset `name`.

    Raises:
        ConfigError: naming the closest preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {_nearest(name)}")
    return PRESETS[name]


def _nearest(name: str) -> str:
    from finemoe.core.config import did_you_mean

    return f"`{name[:60]}`{did_you_mean(name, sorted(PRESETS))}"


def group_of(name: str) -> str:
    """The title of the group that the preset `name` stands in."""
    return next(title for title, group in GROUPS.items() if name in group)


def resolve(model: Mapping[str, Any], source: str) -> ModelRecipe:
    """The `[model]` table of a recipe: a `preset` and what differs from it, or everything spelt out.

    Raises:
        ConfigError: unknown preset, unknown key, impossible combination.
    """
    from finemoe.core.config import merge, parse
    from finemoe.core.config_words import shown
    from finemoe.model.config import ModelRecipe  # brings torch along, which a name that does not exist needs not

    if not isinstance(model, Mapping):
        raise ConfigError(f'{source}: must be a table such as {{ preset = "tiny-moe" }}{shown(model)}')
    own = {key: value for key, value in model.items() if key != "preset"}
    if not isinstance(model.get("preset", ""), str):
        raise ConfigError(f"{source}: `preset` must be text in quotes{shown(model['preset'])}")
    if "preset" in model and model["preset"] not in PRESETS:
        raise ConfigError(f"{source}: unknown `preset` {_nearest(model['preset'])}")
    base = find_preset(model["preset"]).model if "preset" in model else {}
    return parse(ModelRecipe, merge(base, own), source, table="base" if source.endswith(": base") else "model")
