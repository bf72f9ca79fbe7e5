"""What a configuration's classes tell of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from finemoe.core.config import Config, union_of
from finemoe.core.keys import LEFT_OUT, REQUIRED, Key, sections_of, type_words

Share = Annotated[float, Field(ge=0, le=1)]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str, "text"),
        (bool, "true or false"),
        (str | tuple[str, ...] | None, "text or list of text"),
        (PositiveInt, "whole number above 0"),
        (NonNegativeInt | None, "whole number, 0 or more"),
        (Annotated[float, Field(ge=0, lt=1)], "number from 0, below 1"),
        (Annotated[float, Field(gt=0, lt=1)], "number above 0, below 1"),
        (Annotated[int, Field(le=5)], "whole number to 5"),
        (Share, "number from 0 to 1"),
        (tuple[Share, ...], "list of number from 0 to 1"),
        (tuple[Share, Share], "list of 2: number from 0 to 1"),
        (Mapping[str, PositiveFloat], "table of number above 0 by name"),
        (Literal["a", "b"], '"a" | "b"'),
    ],
)
def test_types_are_said_in_words(annotation: Any, words: str) -> None:
    assert type_words(annotation) == words


class Below(Config):
    """The base.

    More of it.
    """

    depth: PositiveInt = 2
    """[layers] How deep. None: never."""


class First(Config):
    """One kind."""

    kind: Literal["first"] = "first"
    text: str
    """None: what it says."""


class Second(Config):
    """Another."""

    kind: Literal["second"] = "second"
    bare: int = 0


class Whole(Config):
    """All of it."""

    below: Below = Below()
    """A table."""
    again: Below | None = None
    """The same form."""
    either: union_of((First, Second))  # type: ignore[valid-type]
    """One of two."""
    sooner: union_of((First, Second), default="second") = Second(bare=7)  # type: ignore[valid-type]
    """One of two, or the second."""
    rate: PositiveFloat
    """[per step] How fast."""


def test_tables_kinds_defaults_units_and_meanings() -> None:
    sections = {(one.name, one.kind): one for one in sections_of(Whole, defaults={"rate": 0.5})}
    assert list(sections) == [("", None), ("below", None), ("either", "first"), ("either", "second")]
    assert sections["below", None].meaning == "The base."
    keys = {key.name: key for key in sections["", None].keys}
    assert keys["below"].type == "table"
    assert keys["below"].default == LEFT_OUT
    assert keys["again"].type == "table as [below]"
    assert keys["either.kind"].default == REQUIRED
    assert keys["sooner.kind"] == Key("sooner.kind", '"first" | "second" as [either]', '"second"', "", "")
    assert keys["rate"].default == "0.5"
    assert [key.name for key in sections["either", "first"].keys] == ["either.text"]


def test_the_unit_stands_in_brackets_and_none_is_left_out() -> None:
    from finemoe.model.moe.balance import BalanceConfig
    from finemoe.runs.config import TrainingConfig

    (section,) = sections_of(TrainingConfig, "training")
    keys = {key.name: key for key in section.keys}
    assert keys["training.tokens"].unit == "tokens"
    assert keys["training.tokens"].meaning.startswith("Length of the run")
    assert " Left out: ten over the run" in keys["training.evaluate_every"].meaning
    (section,) = sections_of(BalanceConfig, "balance")
    assert {key.unit for key in section.keys} == {"coefficient", "devices"}
