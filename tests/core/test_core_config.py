"""Configuration: errors that name the field and the fix, overrides, merging, TOML and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError

from finemoe.core.config import (
    Config,
    did_you_mean,
    merge,
    parse,
    read_toml,
    to_json,
    union_of,
    with_overrides,
)
from finemoe.core.errors import ConfigError


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float


class Box(Config):
    kind: Literal["box"] = "box"
    width: int = Field(gt=0)
    corner: Circle | None = None


Shape: Any = union_of((Circle, Box))


class Drawing(Config):
    title: str = "none"
    shape: Shape
    more: tuple[Shape, ...] = ()


GOOD = {"shape": {"kind": "circle", "radius": 1.0}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "titel": "x"}, "unknown key `titel`, did you mean `title`?"),
        ({**GOOD, "zzz": 1}, "unknown key `zzz`; known: more, shape, title"),
        ({"shape": {"kind": "circle", "radius": 1, "radios": 2}}, "did you mean `radius`?"),
        ({"shape": {"kind": "box", "width": 1, "radius": 2}}, "; known: corner, kind, width"),
        (
            {"shape": {"kind": "box", "width": 1, "corner": {"radius": 1, "radiu": 2}}},
            "did you mean `radius`?",
        ),
        (
            {**GOOD, "more": [{"kind": "circle", "radius": 1}, {"kind": "box", "widht": 1}]},
            "did you mean `width`?",
        ),
        ({}, "`shape` is required and missing"),
        ({"shape": {"radius": 1}}, "kind"),
        ({"shape": {"kind": "oval"}}, "oval"),
        ({"shape": {"kind": "box", "width": 0}}, "greater than 0 (got 0)"),
        ({"shape": {"kind": "circle", "radius": float("nan")}}, "finite number (got nan)"),
    ],
)
def test_errors_name_the_field_and_the_fix(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Drawing, data, "a.toml")
    assert str(error.value).startswith("a.toml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"shape": {"kind": "circle", "radius": 1, "radios": 2}}, "`shape.radios`"),
        ({"shape": {"kind": "box", "width": 1, "corner": {"radius": 1, "radiu": 2}}}, "`shape.corner.radiu`"),
        ({"shape": {"kind": "box"}}, "`shape.width`"),
    ],
)
def test_errors_spell_a_field_as_a_recipe_and_set_do(data: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Drawing, data, "a.toml")
    assert key in str(error.value)


def test_every_error_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse(Drawing, {"shape": {"kind": "box"}, "titel": "x"}, "a.toml")
    assert "width` is required" in str(error.value)
    assert "`titel`" in str(error.value)


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Circle(radius=1).radius = 2


def test_union_of_one_configuration_needs_no_kind() -> None:
    class Only(Config):
        shape: union_of((Circle,))  # type: ignore[valid-type]

    assert parse(Only, {"shape": {"radius": 2}}, "here").shape.kind == "circle"


def test_json_round_trip() -> None:
    drawing = parse(Drawing, {**GOOD, "title": "Größe", "more": [{"kind": "box", "width": 3}]}, "here")
    assert "Größe" in to_json(drawing)
    assert Drawing.model_validate_json(to_json(drawing)) == drawing


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=2", 2),
        ("a.b = 2.5", 2.5),
        ("a.b=1e-3", 0.001),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ('a.b=["x", "y"]', ["x", "y"]),
        ("a.b={ c = 1 }", {"c": 1}),
        ('a.b="2"', "2"),
        ("a.b=plain words", "plain words"),
        ("a.b=/some/path.txt", "/some/path.txt"),
        ("a.b=x=y", "x=y"),
        ("a.b=", ""),
    ],
)
def test_override_values_are_toml_else_strings(override: str, value: Any) -> None:
    assert with_overrides({"a": {"b": 0, "keep": 1}}, [override]) == {"a": {"b": value, "keep": 1}}


@pytest.mark.parametrize("override", ["", "a.b", "=1", ".a=1", "a..b=1", "a.=1", " =1"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as a\.b\.c=value"):
        with_overrides({}, [override])


def test_a_later_override_wins_and_new_tables_appear() -> None:
    assert with_overrides({}, ["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


def test_overrides_leave_their_input_alone() -> None:
    data = {"a": {"b": 1}}
    with_overrides(data, ["a.b=2"])
    assert data == {"a": {"b": 1}}


def test_an_entry_of_a_list_is_set_by_its_number() -> None:
    given = {"a": {"rewards": [{"kind": "x", "weight": 1}, {"kind": "y"}], "betas": [1, 2]}}
    laid = with_overrides(given, ["a.rewards.0.weight=3", "a.rewards.1.kind=z", "a.betas.1=9"])
    assert laid == {"a": {"rewards": [{"kind": "x", "weight": 3}, {"kind": "z"}], "betas": [1, 9]}}
    assert given["a"]["betas"] == [1, 2], "what was given stays"
    with pytest.raises(ConfigError, match=r"`rewards.2`: the list `rewards` has 2 entries, counted from 0"):
        with_overrides(given, ["a.rewards.2.weight=3"])


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ({"x": 1, "t": {"a": 1, "b": 2}}, {"t": {"b": 3}}, {"x": 1, "t": {"a": 1, "b": 3}}),
        ({"t": {"kind": "a", "x": 1}}, {"t": {"kind": "b", "y": 2}}, {"t": {"kind": "b", "y": 2}}),
        ({"t": {"kind": "a", "x": 1}}, {"t": {"kind": "a", "y": 2}}, {"t": {"kind": "a", "x": 1, "y": 2}}),
        ({"t": {"kind": "a", "x": 1}}, {"t": {"y": 2}}, {"t": {"kind": "a", "x": 1, "y": 2}}),
        ({"t": {"a": 1}}, {"t": 5}, {"t": 5}),
        ({"t": 5}, {"t": {"a": 1}}, {"t": {"a": 1}}),
        ({"t": [1, 2]}, {"t": [3]}, {"t": [3]}),
    ],
)
def test_merge_goes_table_by_table_and_replaces_another_kind(base: Any, over: Any, expected: Any) -> None:
    assert merge(base, over) == expected


def test_read_toml(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[a]\nb = 1\n")
    assert read_toml(path) == {"a": {"b": 1}}


@pytest.mark.parametrize("content", [b"[a\n", b"a = \xff", b"a = 1\na = 2"])
def test_unreadable_toml_is_the_users_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml: not a readable TOML file"):
        read_toml(path)


def test_missing_recipe_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such recipe"):
        read_toml(tmp_path / "none.toml")


def test_did_you_mean() -> None:
    assert did_you_mean("lenght", ["length", "width"]) == ", did you mean `length`?"
    assert did_you_mean("q", ["length", "width"]) == "; known: length, width"
    assert did_you_mean("q", []) == ""


def test_what_holds_for_every_item_of_a_list_is_said_once() -> None:
    bad = {"kind": "box", "width": 0}
    with pytest.raises(ConfigError) as caught:
        parse(Drawing, {**GOOD, "more": [bad, bad, bad, {"kind": "circle", "radius": "x"}]}, "r.toml")
    text = str(caught.value)
    assert text.count("`more.0.width`") == 1
    assert "(got 0) (and the same of 2 more); `more.3.radius`" in text
    assert "more.1" not in text


class Numbers(Config):
    count: PositiveInt | None = None
    share: float = 0.5
    on: bool = False


@pytest.mark.parametrize("name", ["count", "share"])
def test_true_is_no_number(name: str) -> None:
    assert parse(Numbers, {"on": True}, "here").on
    with pytest.raises(ConfigError, match=f"here: `{name}` must be a number, not true"):
        parse(Numbers, {name: True}, "here")


def test_a_list_is_not_called_too_short_for_an_entry_that_is_wrong() -> None:
    class Several(Config):
        shapes: Annotated[tuple[Box, ...], Field(min_length=1)]

    with pytest.raises(ConfigError) as error:
        parse(Several, {"shapes": [{"kind": "box", "width": 0}]}, "a.toml")
    assert "`shapes.0.width` must be greater than 0" in str(error.value)
    assert "at least 1" not in str(error.value)
    with pytest.raises(ConfigError, match="`shapes` must have at least 1"):
        parse(Several, {"shapes": []}, "a.toml")
