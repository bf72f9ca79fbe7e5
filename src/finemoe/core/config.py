"""Configuration: frozen pydantic models, TOML recipes, dotted overrides, errors that suggest the key you meant."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finemoe.core.contents import explain
from finemoe.core.encodings import decode_text
from finemoe.core.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: frozen, complete, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    return {"kind": kind, **value} if isinstance(value, Mapping) and "kind" not in value else value


def parse(config: type[ConfigT], data: Mapping[str, Any], source: str) -> ConfigT:
    """Validate `data` as `config`.

    Raises:
        ConfigError: names every offending field, its value, `source`, and the key that was probably meant.
    """
    try:
        return config.model_validate(data)
    except ValidationError as error:
        lines = [_explain(config, detail) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(_folded(lines))) from error


def _folded(lines: Sequence[str]) -> list[str]:
    """Each message once: what holds for every item of a list is said of the first, with the number of the others."""
    alike: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        alike.setdefault(re.sub(r"\.\d+(?=[.`])", "", line), []).append(line)
    more = {key: f" (and the same of {len(found) - 1} more)" if len(found) > 1 else "" for key, found in alike.items()}
    return [found[0] + more[key] for key, found in alike.items()]


def _explain(config: type[BaseModel], detail: Any) -> str:
    location = detail["loc"]
    name, beside, kinds = _follow(config, location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key `{name}`{did_you_mean(str(location[-1]), sorted(beside))}"
    if detail["type"] == "missing":
        return f"`{name}` is required and missing"
    if detail["type"] == "union_tag_not_found":
        return f"`{name}.kind` is required and missing; known: {', '.join(kinds)}"
    if detail["type"] == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        return f"unknown `{name}.kind` {tag!r}{did_you_mean(tag, kinds)}"
    message = detail["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    value = detail.get("input")
    shown = "" if isinstance(value, (Mapping, list, tuple, BaseModel)) else f" (got {value!r})"
    return f"`{name}`: {message}{shown}" if name else message  # a combination names its fields itself


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """', did you mean `x`?' when something close exists, else the list of what exists."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f", did you mean `{close[0]}`?"
    return f"; known: {', '.join(known)}" if known else ""


def _follow(config: type[BaseModel], location: Sequence[Any]) -> tuple[str, set[str], list[str]]:
    """`location` as a recipe spells it, the field names that would be valid where it ends, and the kinds of table."""
    here, beside = [config], set(config.model_fields)
    spelt: list[str] = []
    for part in location:
        beside = {name for c in here for name in c.model_fields}
        fields = [c.model_fields[part] for c in here if part in c.model_fields]
        # A discriminated union adds its tag to the location: keep the member with that tag, and do not spell it.
        tagged = [c for c in here if len(here) > 1 and c.model_fields["kind"].default == part]
        if fields or not tagged:
            spelt.append(str(part))
        here = [m for field in fields for m in models_in(field.annotation)] or tagged or here
    return ".".join(spelt), beside, [c.model_fields["kind"].default for c in here if "kind" in c.model_fields]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configurations that a field of this type may hold, in lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: when it does not exist, is not text, or is not TOML (with line and column).
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe") from error
    except OSError as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error.strerror or error}") from error
    try:
        return tomllib.loads(decode_text(data))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        held = explain(data, frozenset())
        if held is not None:
            raise ConfigError(f"{path}: a recipe is TOML, but this {held}") from error
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from error


def read_tables(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe in TOML, or, by its suffix, in JSON, as the config.json of a run is.

    Raises:
        ConfigError: when it does not exist or is neither.
    """
    if Path(path).suffix.lower() != ".json":
        return read_toml(path)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(found).__name__}")
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, table by table. A table of another `kind` replaces instead of merging."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and ("kind" not in value or value["kind"] == old.get("kind", value["kind"]))
        )
        merged[key] = merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def with_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b.c=value` overrides. Values are TOML where they parse as TOML, else plain strings.

    Raises:
        ConfigError: for an override without `=` or with an empty key.
    """
    merged = dict(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"--set {override!r}: write it as a.b.c=value")
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


def to_json(config: BaseModel) -> str:
    """The resolved configuration as indented JSON; `config.model_validate_json` reads it back."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
