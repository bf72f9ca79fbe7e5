"""What a configuration's keys are, told from its classes: type, default, unit and meaning of each.

The one source is the field itself: its annotation, its default, and the docstring below it. That docstring may begin
with a unit in brackets, as in `[tokens] Length of the run`; a key that holds a number always has one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finemoe.core.config import Config, models_in

REQUIRED, LEFT_OUT = "required", "left out"
"""In place of a default: there is none; nothing is set, and the meaning says what happens then."""
_UNIT = re.compile(r"\[([^\]]+)\]\s*")


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    """From the recipe's root: `training.tokens`."""
    type: str
    """In words, with its bounds."""
    default: str
    """As TOML writes it, or REQUIRED, or LEFT_OUT."""
    unit: str
    """Empty where the value is not a number."""
    meaning: str

    def to_dict(self) -> dict[str, str]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Section:
    """One table of a recipe, as one of its kinds."""

    name: str
    """`model.attention`; empty for the keys above all tables."""
    kind: str | None
    """Which of the kinds that the table may be; None where there is only one form."""
    meaning: str
    keys: tuple[Key, ...]


def sections_of(
    config: type[Config],
    name: str = "",
    *,
    defaults: Mapping[str, Any] | None = None,
    instead: Mapping[type[BaseModel], type[Config]] | None = None,
    known: dict[type[BaseModel], str] | None = None,
) -> Iterator[Section]:
    """The tables that `config` is made of, each before those within it.

    Args:
        config: a configuration.
        name: where it stands in the recipe.
        defaults: what is filled in before the configuration is made, table by table.
        instead: configurations that a recipe writes in another form, with that form.
        known: where a configuration was described already; it is not described again, and this grows.
    """
    known = {} if known is None else known
    known.setdefault(config, name)
    yield from _described([(config, None)], name, defaults or {}, instead or {}, known)


def _described(
    members: list[tuple[type[BaseModel], str | None]],
    name: str,
    defaults: Mapping[str, Any],
    instead: Mapping[type[BaseModel], type[Config]],
    known: dict[type[BaseModel], str],
) -> Iterator[Section]:
    """The forms of one table, then all that lies within them."""
    within = []
    for member, kind in members:
        keys = []
        for field, info in member.model_fields.items():
            if field == "kind" and _is_tag(info):
                continue
            inner = [instead.get(model, model) for model in models_in(info.annotation)]
            path = f"{name}.{field}" if name else field
            of_field = defaults.get(field, _own_default(info))
            keys.append(_key(member, field, path, inner, of_field, known))
            new = [model for model in inner if model not in known]
            known |= dict.fromkeys(new, path)
            below = of_field if isinstance(of_field, Mapping) else {}
            within.append(([(model, _kind_of(model)) for model in new], path, below))
        yield Section(name, kind, _first_paragraph(member.__doc__ or ""), tuple(keys))
    for inner_members, path, below in within:
        yield from _described(inner_members, path, below, instead, known)


def _key(
    owner: type[BaseModel],
    field: str,
    path: str,
    inner: list[type[BaseModel]],
    default: Any,
    known: Mapping[type[BaseModel], str],
) -> Key:
    info = owner.model_fields[field]
    unit, meaning = _documented(owner, field)
    if not inner:
        return Key(path, type_words(info.annotation, info.metadata), _literal(info, default), unit, meaning)
    listed = get_origin(info.annotation) in (tuple, list)
    elsewhere = {known[model] for model in inner if model in known}
    as_there = f" as [{elsewhere.pop()}]" if len(elsewhere) == 1 else ""
    kinds = [kind for model in inner if (kind := _kind_of(model)) is not None]
    if not kinds:
        return Key(path, ("list of tables" if listed else "table") + as_there, _table_default(info), "", meaning)
    found = _default_kind(owner, field, kinds, default)
    shown = json.dumps(found) if found else _table_default(info)
    return Key(f"{path}.kind", _one_of(kinds) + as_there, shown, "", meaning)


def _own_default(info: FieldInfo) -> Any:
    """A default that is a table, as a table."""
    return info.default.model_dump() if isinstance(info.default, BaseModel) else info.default


def _table_default(info: FieldInfo) -> str:
    return REQUIRED if info.is_required() else LEFT_OUT


def _literal(info: FieldInfo, default: Any) -> str:
    if default is None:
        return LEFT_OUT
    if info.is_required() and default is info.default:
        return REQUIRED
    return json.dumps(default, ensure_ascii=False) if default != {} else LEFT_OUT


def _default_kind(owner: type[BaseModel], field: str, kinds: list[str], default: Any) -> str | None:
    """The kind of a table that is left out, or does not say; found by asking for an empty one."""
    if isinstance(default, Mapping) and "kind" in default:
        return str(default["kind"])
    if default is None and not owner.model_fields[field].is_required():
        return None
    try:
        owner.model_validate({field: {}})
    except ValueError as error:
        for detail in error.errors():  # type: ignore[attr-defined]
            place = detail["loc"]
            if place[:1] == (field,):
                return str(place[1]) if len(place) > 1 and place[1] in kinds else None
    return kinds[0]


def _is_tag(info: FieldInfo) -> bool:
    """Whether a field called `kind` is a table's own tag, which has one value."""
    return get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1


def _kind_of(model: type[BaseModel]) -> str | None:
    info = model.model_fields.get("kind")
    return str(info.default) if info is not None and _is_tag(info) else None


def type_words(annotation: Any, metadata: Any = ()) -> str:
    """A type for people: `whole number above 0`, `"auto" or "cpu"`, `list of text`."""
    bounds = [*metadata]
    while _carries_bounds(annotation):
        annotation, *more = get_args(annotation)
        bounds += [one for item in more for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(type_words(one, bounds) for one in arguments if one is not type(None))
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple:
        several = Ellipsis in arguments
        return f"list of {'' if several else f'{len(arguments)}: '}{type_words(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return "table" if arguments[1] is Any else f"table of {type_words(arguments[1])} by name"
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return words[annotation] + _bounds(bounds)


def _carries_bounds(annotation: Any) -> bool:
    """Whether a type brings bounds along, as PositiveInt does."""
    return get_origin(annotation) is Annotated


def _bounds(metadata: list[Any]) -> str:
    """` above 0`, ` from 0 to 1`, ` from 0, below 1`."""
    found = {}
    for one in metadata:
        match one:
            case Gt(gt=value):
                found["low"] = f"above {value}"
            case Ge(ge=value):
                found["low"] = f"from {value}"
            case Lt(lt=value):
                found["high"] = f"below {value}"
            case Le(le=value):
                found["high"] = f"to {value}"
    low, high = found.get("low", ""), found.get("high", "")
    if low.startswith("from") and not high:
        return f", {low.removeprefix('from ')} or more"
    between = ", " if low and high.startswith("below") else " " if high else ""
    return (f" {low}" if low else "") + between + high


def _one_of(values: Any) -> str:
    return " | ".join(json.dumps(value) for value in values)


def _documented(owner: type[BaseModel], field: str) -> tuple[str, str]:
    """Unit and meaning of a field, from the class that declares it."""
    for base in owner.__mro__:
        found = _docstrings(base.__module__).get(f"{base.__qualname__}.{field}") if base is not object else None
        if found is not None:
            match = _UNIT.match(found)
            return (match[1], found[match.end() :]) if match else ("", found)
    return "", ""


@cache
def _docstrings(module: str) -> Mapping[str, str]:
    """`Class.field` to the text below it, of every class in a module."""
    if not module.startswith("finemoe"):
        return {}
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                text = " ".join(inspect.cleandoc(after.value.value).split())
                found[f"{node.name}.{statement.target.id}"] = _for_recipes(text)
    return found


def _for_recipes(text: str) -> str:
    """TOML has no None: what Python leaves at that, a recipe leaves out."""
    return re.sub(r"\bNone:", "left out:", re.sub(r"(^|\. |\] )None:", r"\1Left out:", text))


def _first_paragraph(docstring: str) -> str:
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
