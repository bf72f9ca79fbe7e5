"""Rotary settings of a Hugging Face config.json, in both spellings, and back.

`rope_theta` and `rope_scaling` (`type` or `rope_type`) up to version 4 of transformers, `rope_parameters` since. Where
transformers and DeepSeek's own code disagree on what a setting means, it is refused: one of them would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finemoe.checkpoint.huggingface.fields import Fields, shown
from finemoe.core.errors import CheckpointError
from finemoe.model.rope import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RopeConfig,
    RopeLayout,
    YarnScaling,
)

Meaning = Literal["transformers", "deepseek", "both"]
"""Whose code says what the settings mean: `both` where a family has two implementations that must agree."""

_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
}
_OF_ANY = frozenset(key for keys in _KEYS.values() for key in keys)
_EVERYWHERE = {"type", "rope_type", "rope_theta", "finetuned"}


@dataclass(frozen=True)
class Rope:
    """Rotary settings as read."""

    settings: dict[str, Any]
    """Of a RopeConfig, as keywords."""
    dim: int
    """How many components turn."""


def read_rope(fields: Fields, dim: int, layout: RopeLayout, meaning: Meaning, *, share: float | None = None) -> Rope:
    """The rotary settings of heads of `dim` components.

    Args:
        fields: of the file.
        dim: components that have positions, or of which `share` has.
        layout: which of them are pairs.
        meaning: whose code says what the settings mean.
        share: of the components that turn, where the file says none; None: all turn, in every file of the family.

    Raises:
        CheckpointError: a type or value that our model cannot compute, or that is ambiguous.
    """
    name, table = _table(fields)
    if share is not None:
        dim = _turning(fields, name, table, dim, share)
    max_positions = fields.integer("max_position_embeddings")
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind not in _KEYS:
        fields.refuse(f"{name}.rope_type", kind, f"only {', '.join(_KEYS)} are known")
    reader = _Table(name, table)
    _account_for(fields, name, table, kind, partial=share is not None)
    theta = reader.number("rope_theta") if reader.has("rope_theta") else fields.number("rope_theta")
    if fields.has("rope_theta") and fields.number("rope_theta") != theta:
        fields.refuse("rope_theta", fields.value("rope_theta"), f"`{name}.rope_theta` is {theta:g}; keep one")
    if theta <= 1:
        fields.refuse("rope_theta", theta, "a base above 1 is needed")
    rope: dict[str, Any] = {"theta": theta, "layout": layout}
    if kind == "linear":
        rope["scaling"] = {"kind": "linear", "factor": reader.number("factor")}
    elif kind == "llama3":
        if meaning == "deepseek":
            fields.refuse(f"{name}.rope_type", kind, "this family's code does not have it")
        rope["scaling"] = {
            "kind": "llama3",
            "factor": reader.number("factor"),
            "low_freq_factor": reader.number("low_freq_factor"),
            "high_freq_factor": reader.number("high_freq_factor"),
            "original_max_positions": reader.integer("original_max_position_embeddings"),
        }
    elif kind == "yarn":
        if meaning == "deepseek":
            fields.refuse(f"{name}.rope_type", kind, "this family's code does not have it")
        rope["scaling"] = _read_yarn(fields, reader, meaning, max_positions, dim, theta)
    elif kind == "dynamic":
        factor = reader.number("factor")
        fields.note(
            f"rope type dynamic, factor {factor:g}: equal to plain rotation up to {max_positions} positions; "
            "finemoe does not stretch beyond them"
        )
    return Rope(rope, dim)


def _account_for(fields: Fields, name: str, table: Mapping[str, Any], kind: str, *, partial: bool) -> None:
    """Every key of the table: a setting of its type, one that is known to be idle and said aloud, or refused."""
    for key in table:
        if key == "partial_rotary_factor" and (partial or table[key] in (None, 1)):
            continue
        if key in _KEYS[kind] or key in _EVERYWHERE or table[key] is None:
            continue
        if key == "attn_factor":
            fields.warn(
                f"`{name}.{key}` {shown(table[key])} is not used, as in transformers; other programs multiply by it"
            )
        elif key in _OF_ANY:
            fields.warn(f"`{name}.{key}` {shown(table[key])} is no setting of rope type {kind!r}, and not used")
        else:
            fields.refuse(f"{name}.{key}", table[key], f"not a setting of rope type {kind!r}; remove it if it is idle")


def _turning(fields: Fields, name: str, table: Mapping[str, Any], dim: int, share: float) -> int:
    """How many components turn: `partial_rotary_factor`, which lies among the rope settings or beside them."""
    key = "partial_rotary_factor"
    reader, beside = _Table(name, table), fields.has(key)
    if reader.has(key):
        share = reader.number(key)
        if beside:
            fields.only(key, share, why=f"`{name}.{key}` is {share:g}; keep one")
    elif beside:
        share = fields.number(key)
    turning = int(dim * share)
    if share > 1 or turning < 2:
        fields.refuse(key, share, f"a share of {dim} components, above 0 and at most 1, is needed")
    return turning


def _table(fields: Fields) -> tuple[str, Mapping[str, Any]]:
    """Name and content of the rope settings; empty where there are none."""
    found = [name for name in ("rope_parameters", "rope_scaling") if fields.has(name)]
    if len(found) == 2 and fields.value(found[0]) != fields.value(found[1]):
        fields.refuse("rope_scaling", fields.value("rope_scaling"), "`rope_parameters` says something else; keep one")
    if not found:
        return "rope_scaling", {}
    table = fields.value(found[0])
    if not isinstance(table, Mapping):
        fields.refuse(found[0], table, "a table is needed")
    if any(isinstance(value, Mapping) for value in table.values()):
        fields.refuse(found[0], table, "rope settings that differ between layers are not supported")
    kinds = {table[key] for key in ("type", "rope_type") if isinstance(table.get(key), str)}
    if len(kinds) > 1 or any(not isinstance(table.get(key), str | None) for key in ("type", "rope_type")):
        fields.refuse(found[0], table, "`type` and `rope_type` must be one name")
    return found[0], table


class _Table:
    """The numbers in a table of rope settings."""

    def __init__(self, name: str, table: Mapping[str, Any]) -> None:
        self._name = name
        self._table = table

    def number(self, key: str, default: float | None = None) -> float:
        value = self._table.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(f"config.json: `{self._name}.{key}` is {shown(value)}: a number above 0 is needed")
        return float(value)

    def optional(self, key: str) -> float | None:
        return None if self._table.get(key) in (None, 0) else self.number(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise CheckpointError(f"config.json: `{self._name}.{key}` is {value}: a whole number is needed")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._table.get(key)
        if not isinstance(value, bool | None):
            raise CheckpointError(f"config.json: `{self._name}.{key}` is {shown(value)}: true or false is needed")
        return default if value is None else value

    def has(self, key: str) -> bool:
        return self._table.get(key) is not None


def _read_yarn(
    fields: Fields, table: _Table, meaning: Meaning, max_positions: int, dim: int, theta: float
) -> dict[str, Any]:
    # transformers takes the whole context for the original one where that is left out, DeepSeek's code 4096.
    default = max_positions if meaning == "transformers" else None
    if default is not None and not table.has("original_max_position_embeddings"):
        default = fields.raw.get("original_max_position_embeddings") or max_positions
        fields.warn(
            f"YaRN names no `original_max_position_embeddings`: {default} is taken, as transformers does, which is "
            "wrong where the model was trained on shorter texts before"
        )
    original = table.integer("original_max_position_embeddings", default)
    fields.only("original_max_position_embeddings", original, why=f"the rope settings say {original}; keep one")
    factor = table.number("factor")
    scaling = {
        "kind": "yarn",
        "factor": factor,
        "original_max_positions": original,
        "beta_fast": table.number("beta_fast", 32.0),
        "beta_slow": table.number("beta_slow", 1.0),
        "truncate": table.flag("truncate", True),
    }
    first, last = (
        dim * math.log(original / (scaling[beta] * 2 * math.pi)) / (2 * math.log(theta))  # type: ignore[operator]
        for beta in ("beta_fast", "beta_slow")
    )
    if math.ceil(last) < 0 or math.floor(first) > dim - 1:
        raise CheckpointError(
            f"config.json: YaRN with original_max_position_embeddings {original} has no component to blend; "
            "implementations then differ"
        )
    if meaning == "both":
        if table.has("attention_factor"):
            raise CheckpointError(
                "config.json: the rope setting `attention_factor` is known to transformers alone; "
                "DeepSeek's models say `mscale` and `mscale_all_dim`"
            )
        if not scaling.pop("truncate"):
            raise CheckpointError(
                "config.json: the rope setting `truncate` is false, but DeepSeek's code always rounds"
            )
        return {**scaling, **_latent_mscale(table)}
    return {**scaling, "mscale": _grouped_mscale(table, factor), "mscale_all_dim": 0.0}


def _latent_mscale(table: _Table) -> dict[str, float]:
    mscale = table.number("mscale") if table.has("mscale") else None
    all_dim = table.optional("mscale_all_dim")
    # transformers looks at `mscale` only when both are there; DeepSeek's code takes 1 and 0 for what is left out.
    if (mscale is None) != (all_dim is None) and not (mscale == 1 and all_dim is None):
        raise CheckpointError(
            f"config.json: rope settings `mscale` {mscale} and `mscale_all_dim` {all_dim}: transformers and DeepSeek's "
            "code read that differently; give both, or neither"
        )
    return {"mscale": 1.0 if mscale is None else mscale, "mscale_all_dim": all_dim or 0.0}


def _grouped_mscale(table: _Table, factor: float) -> float:
    """YaRN's m where every component rotates: cosines and sines are multiplied by 0.1 · m · ln(factor) + 1."""
    mscale, all_dim = table.optional("mscale"), table.optional("mscale_all_dim")
    if table.has("attention_factor"):
        wanted = table.number("attention_factor")
    elif mscale is not None and all_dim is not None:
        wanted = _root(mscale, factor) / _root(all_dim, factor)
    else:
        return 1.0
    found = (wanted - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
    if not math.isclose(_root(found, factor), wanted, rel_tol=1e-12):
        raise CheckpointError(
            f"config.json: YaRN multiplies cosines and sines by {wanted:g} here; finemoe's YaRN, with factor "
            f"{factor:g}, by 1"
        )
    return 1.0 if math.isclose(found, 1.0, rel_tol=1e-12) else found


def _root(mscale: float, factor: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def write_rope(rope: RopeConfig, dim: int, meaning: Meaning) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for a model that rotates `dim` components. Every transformers reads it.

    Raises:
        CheckpointError: the family's code has no such scaling.
    """
    scaling = rope.scaling
    key = "rope_type" if meaning == "transformers" else "type"  # DeepSeek's own code knows the old name only
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    if isinstance(scaling, NTKScaling):  # a larger base is all it is
        return {"rope_theta": scaling.scaled_theta(rope.theta, dim), "rope_scaling": None}
    table: dict[str, Any] = {key: scaling.kind, "factor": scaling.factor}
    if isinstance(scaling, LinearScaling):
        return {"rope_theta": rope.theta, "rope_scaling": table}
    if meaning == "deepseek":
        raise CheckpointError(f"its code has no rope scaling {scaling.kind!r}")
    table["original_max_position_embeddings"] = scaling.original_max_positions
    if isinstance(scaling, Llama3Scaling):
        table |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    else:
        table |= _write_yarn(scaling, meaning)
    return {"rope_theta": rope.theta, "rope_scaling": table}


def _write_yarn(scaling: YarnScaling, meaning: Meaning) -> dict[str, Any]:
    table: dict[str, Any] = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if meaning == "both":
        if not scaling.truncate:
            raise CheckpointError("its code always rounds the edges of YaRN's blend: set rope.scaling.truncate = true")
        if not scaling.mscale_all_dim and scaling.mscale != 1:
            raise CheckpointError(
                f"transformers and DeepSeek's code read mscale {scaling.mscale} without mscale_all_dim differently"
            )
        return {**table, "mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    if scaling.mscale_all_dim:
        raise CheckpointError("its code leaves the softmax scale alone: set rope.scaling.mscale_all_dim = 0")
    if not scaling.truncate:
        table["truncate"] = False
    if scaling.mscale != 1:
        table["attention_factor"] = _root(scaling.mscale, scaling.factor)
    return table
