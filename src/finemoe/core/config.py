"""Configuration: frozen pydantic models, TOML recipes, dotted overrides, errors that suggest the key you meant."""

from __future__ import annotations

import codecs
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from finemoe.core.config_words import did_you_mean as did_you_mean  # for all who look a name up
from finemoe.core.config_words import meant, must_be, shown
from finemoe.core.config_words import models_in as models_in
from finemoe.core.contents import explain
from finemoe.core.encodings import decode_text
from finemoe.core.errors import ConfigError
from finemoe.core.reading import decode_json, reason_of

_MOST_DEPTH = 40  # of tables; real recipes have six
_MOST_TAG = 60
_MOST_DIGITS = 6  # of a place in a list


class Config(BaseModel):
    """Base of every configuration: frozen, complete, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_for_numbers(cls, data: Any) -> Any:
        """pydantic would take `true` for 1."""
        for name, field in cls.model_fields.items() if isinstance(data, Mapping) else ():
            value = data.get(name)
            if isinstance(value, bool) and _is_number(field.annotation):
                raise ValueError(f"`{name}` must be a number, not {str(value).lower()}")
        return data


def _is_number(annotation: Any) -> bool:
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    members = [
        typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind for kind in kinds or (annotation,)
    ]
    return (int in members or float in members) and bool not in members


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def union_of(configs: Iterable[type[Config]], default: str | None = None) -> Any:
    """The union of a table's configurations, told apart by their `kind`; `default` is the kind where none is given."""
    members = tuple(configs)
    if len(members) == 1:
        return Annotated[members[0], BeforeValidator(lambda value: _only_kind(value, members[0]))]
    union: Any = Annotated[typing.Union[members], Field(discriminator="kind")]  # noqa: UP007 - built from a table
    if default is None:
        return union
    return Annotated[union, BeforeValidator(lambda value: _with_kind(value, default))]


def _only_kind(value: Any, member: type[Config]) -> Any:
    """`value`, refused in the words of a table of several where it names another kind."""
    known = member.model_fields["kind"].default
    if isinstance(value, Mapping) and value.get("kind", known) != known:
        raise ValueError(f"unknown kind{did_you_mean(str(value['kind']), [known])}")
    if not isinstance(value, (Mapping, BaseModel)):
        raise ValueError(f'must be a table such as {{ kind = "{known}" }}')
    return value


def _with_kind(value: Any, kind: str) -> Any:
    if not isinstance(value, (Mapping, BaseModel)):
        raise ValueError(f'must be a table such as {{ kind = "{kind}" }}')
    return {"kind": kind, **value} if isinstance(value, Mapping) and "kind" not in value else value


def parse(config: type[ConfigT], data: Mapping[str, Any], source: str, *, table: str = "") -> ConfigT:
    """Validate `data` as `config`.

    Args:
        config: what it must be.
        data: plain values.
        source: named in errors.
        table: what a recipe calls `data` where it is a part of one, for suggestions.

    Raises:
        ConfigError: names every offending field, its value, `source`, and the key that was probably meant.
    """
    try:
        _check_size(data)
        return config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {in_words(config, error, table)}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{source}: {reason}") from error


def in_words(config: type[BaseModel], error: ValidationError, table: str = "") -> str:
    """What pydantic refused, each in a plain sentence."""
    found = error.errors(include_url=False)
    inside = {one["loc"][:length] for one in found for length in range(len(one["loc"]))}
    told = [one for one in found if one["type"] != "too_short" or one["loc"] not in inside]  # by entries that are wrong
    return "; ".join(_folded([_explain(config, one, table) for one in told]))


def _check_size(data: Any, name: str = "", depth: int = 0) -> None:
    """Refuse what no recipe holds and no computer counts with.

    Raises:
        ValueError: a whole number beyond 64 bits, text that no file can hold, or tables in tables in tables.
    """
    if depth > _MOST_DEPTH:
        raise ValueError(f"`{name[:40]} ...` is nested too deeply")
    if isinstance(data, Mapping):
        for key, value in data.items():
            _check_size(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(data, list | tuple):
        for value in data:
            _check_size(value, name, depth + 1)
    elif isinstance(data, int) and data.bit_length() > 63:
        raise ValueError(f"`{name}` must be below 2^63{shown(data)}")
    elif isinstance(data, str) and not data.isascii() and any("\ud800" <= char <= "\udfff" for char in data):
        raise ValueError(
            f"`{name}` is not UTF-8{shown(data)}: rename the file, or write ? in a pattern for what is not"
        )


def _folded(lines: Sequence[str]) -> list[str]:
    """Each message once: what holds for every item of a list is said of the first, with the number of the others."""
    alike: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        alike.setdefault(re.sub(r"\.\d+(?=[.`])", "", line), []).append(line)
    more = {key: f" (and the same of {len(found) - 1} more)" if len(found) > 1 else "" for key, found in alike.items()}
    return [found[0] + more[key] for key, found in alike.items()]


def _explain(config: type[BaseModel], detail: Any, table: str) -> str:
    location = detail["loc"]
    name, beside, kinds, values = _follow(config, location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key `{name}`{meant(config, table, name, sorted(beside))}"
    if detail["type"] == "missing":
        return f"`{name}` is required and missing" + (f"; known: {', '.join(map(repr, values))}" if values else "")
    if detail["type"] == "union_tag_not_found":
        return f"`{name}.kind` is required and missing; known: {', '.join(kinds)}"
    if detail["type"] == "union_tag_invalid":
        tag = str(detail["ctx"]["tag"])[:_MOST_TAG]
        return f"unknown `{name}.kind` {tag!r}{did_you_mean(tag, kinds)}"
    value = detail.get("input")
    if detail["type"] == "value_error" and isinstance(value, Mapping | list | tuple | BaseModel):
        return f"`{name}`: {must_be(detail)}" if name else must_be(detail)  # a combination names its fields itself
    if not name:
        return f"{must_be(detail)}{shown(value)}"
    return f"`{name}` {must_be(detail)}{shown(value)}"


def _follow(config: type[BaseModel], location: Sequence[Any]) -> tuple[str, set[str], list[str], list[Any]]:
    """Of `location`: how a recipe spells it, the field names that would be valid where it ends, the kinds of table, and
    the values of a field that has but a few."""
    here, beside = [config], set(config.model_fields)
    spelt: list[str] = []
    values: list[Any] = []
    for part in location:
        beside = {name for c in here for name in c.model_fields}
        fields = [c.model_fields[part] for c in here if part in c.model_fields]
        # A discriminated union adds its tag to the location: keep the member with that tag, and do not spell it.
        tagged = [c for c in here if len(here) > 1 and c.model_fields["kind"].default == part]
        if fields or not tagged:
            spelt.append(str(part))
        here = [m for field in fields for m in models_in(field.annotation)] or tagged or here
        literals = [field.annotation for field in fields if typing.get_origin(field.annotation) is typing.Literal]
        values = [value for literal in literals for value in typing.get_args(literal)]
    kinds = [c.model_fields["kind"].default for c in here if "kind" in c.model_fields]
    return ".".join(spelt), beside, kinds, values


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: when it does not exist, is not text, or is not TOML (with line and column).
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(_no_recipe(Path(path))) from error
    except OSError as error:
        raise ConfigError(f"{path}: not a readable TOML file: {_unreadable(error)}") from error
    try:
        return tomllib.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        held = explain(data, frozenset())
        if held is not None:
            raise ConfigError(f"{path}: a recipe is TOML, but this {held}") from error
        raise ConfigError(f"{path}: not a readable TOML file: {_unreadable(error)}") from error


def _no_recipe(path: Path) -> str:
    """What to say of a recipe that is not there."""
    try:
        beside = [one.name for one in path.parent.iterdir() if one.suffix == path.suffix]
    except OSError:
        beside = []
    return f"{path}: no such recipe{did_you_mean(path.name, beside)}"


def _unreadable(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError | OSError | RecursionError):
        return reason_of(error).removeprefix("damaged: ")
    return "a number in it has too many digits" if "digits" in str(error) else str(error)


def read_tables(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe in TOML, or, by its suffix, in JSON, as the config.json of a run is.

    Raises:
        ConfigError: when it does not exist or is neither.
    """
    if Path(path).suffix.lower() != ".json":
        return read_toml(path)
    try:
        found = decode_json(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))
    except FileNotFoundError as error:
        raise ConfigError(_no_recipe(Path(path))) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file: {_unreadable(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(found).__name__}")
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, table by table. A table of another `kind` replaces instead of merging.

    Where `base` has a list, keys that are all numbers are places in it, counted from 0.

    Raises:
        ConfigError: a list has no such place.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, list | tuple) and _has_places(old, value):
            merged[key] = _in_places(key, old, value)
            continue
        same_kind = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and ("kind" not in value or value["kind"] == old.get("kind", value["kind"]))
        )
        merged[key] = merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def _has_places(old: Sequence[Any], over: Any) -> bool:
    """Whether `over` names entries of a list; a list of pairs, or an empty one, may be meant as a whole."""
    pairs = not old or any(isinstance(one, list | tuple) for one in old)
    return not pairs and isinstance(over, Mapping) and bool(over) and all(map(_is_place, over))


def _is_place(key: Any) -> bool:
    return isinstance(key, str) and key.isdecimal() and len(key) < _MOST_DIGITS


def _in_places(name: str, old: Sequence[Any], over: Mapping[str, Any]) -> list[Any]:
    merged = dict(enumerate(old))
    for place, value in ((int(key), value) for key, value in over.items()):
        if place not in merged:
            raise ConfigError(f"`{name}.{place}`: the list `{name}` has {len(old)} entries, counted from 0")
        merged[place] = merge({"": merged[place]}, {"": value})[""]
    return list(merged.values())


def with_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b.c=value` overrides. Values are TOML where they parse as TOML, else plain strings.

    Of a list of tables, a number is a place: `method.rewards.0.weight=0.5`.

    Raises:
        ConfigError: for an override without `=`, with an empty key, or of a place that a list does not have.
    """
    merged = dict(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"--set {override[:200]!r}: write it as a.b.c=value")
        if len(parts) > _MOST_DEPTH:
            raise ConfigError(f"--set {override[:_MOST_TAG]} ...: the key is nested too deeply")
        value = _toml_value(text.strip())
        for part in reversed(parts):
            value = {part: value}
        merged = merge(merged, value)
    return merged


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set ...={text[:_MOST_TAG]} ...: {_unreadable(error)}") from error


def to_json(config: BaseModel) -> str:
    """The resolved configuration as indented JSON; `config.model_validate_json` reads it back."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
