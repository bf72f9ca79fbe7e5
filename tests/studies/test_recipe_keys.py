"""Every key of a recipe is listed, with what is true of it; the page of the reference is what the source says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import finemoe
from finemoe.core.config import models_in, with_overrides
from finemoe.core.errors import ConfigError
from finemoe.core.keys import LEFT_OUT, REQUIRED, Key
from finemoe.data import CORPORA
from finemoe.methods import METHODS
from finemoe.methods.distillation.sample_table import SampleConfig
from finemoe.model.attention import ATTENTIONS
from finemoe.model.config import ModelConfig, ModelRecipe
from finemoe.model.moe.routers import ROUTERS
from finemoe.model.rope import SCALINGS
from finemoe.runs.config import RunConfig, resolve_run
from finemoe.studies.config import CompareConfig, resolve_comparison
from finemoe.studies.keys import chosen_sections, heading, markdown, recipe_keys, recipe_sections
from finemoe.training.optimizers import OPTIMIZERS
from finemoe.training.schedule import SCHEDULES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"
KEYS = recipe_keys()
MINE = {"model": {"preset": "tiny-moe"}, "training": {"steps": 10}}


def configurations(config: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """Every configuration that a recipe reaches, found without the code under test."""
    if config not in seen:
        seen.add(config)
        for field in config.model_fields.values():
            for inner in models_in(field.annotation):
                configurations(ModelRecipe if inner is ModelConfig else inner, seen)
    return seen


def test_every_field_of_every_configuration_is_listed() -> None:
    reached = configurations(RunConfig, set()) | configurations(CompareConfig, set())
    reached |= configurations(SampleConfig, set())
    listed = {key.name.removesuffix(".kind").rpartition(".")[2] for key in KEYS}
    fields = {name for config in reached for name in config.model_fields if name != "kind"}
    assert len(reached) > 30
    assert fields <= listed


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_no_key_is_without_a_meaning_and_no_number_without_a_unit(key: Key) -> None:
    """Mend it in the docstring below the field: `[unit] What it means.`"""
    assert len(key.meaning) > 8
    assert key.type
    if "number" in re.sub(r'"[^"]*"', "", key.type) and key.name != "seed" and key.name != "seeds":
        assert key.unit


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        ("model.attention", ATTENTIONS),
        ("model.feed_forward", ("dense", "moe")),
        ("model.feed_forward.router", ROUTERS),
        ("model.attention.rope.scaling", SCALINGS),
        ("data.corpus", CORPORA),
        ("method", METHODS),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
    ],
)
def test_every_kind_has_a_section(table: str, kinds: Any) -> None:
    found = [section.kind for section in recipe_sections()["run"] if section.name == table]
    assert sorted(map(str, found)) == sorted(kinds)


def settable() -> Iterator[Key]:
    """Keys of a run whose default can be written into a recipe, in tables that every recipe may have."""
    for root, section in chosen_sections(None):
        usual = section.kind in (None, "grouped_query", "adamw", "multi_step", "pretraining")
        if (
            root == "run"
            and usual
            and section.name.split(".")[0] in ("training", "data", "kernels", "optimizer", "schedule", "")
        ):
            yield from (key for key in section.keys if key.default not in (REQUIRED, LEFT_OUT))


def test_defaults_are_those_that_a_recipe_gets() -> None:
    """A recipe that spells every default out is the recipe that says nothing."""
    words = ("the file's name", "model.vocab_size")
    chosen = [key for key in settable() if key.default not in words and not key.name.startswith("data.corpus.")]
    assert len(chosen) > 25
    spelt = with_overrides(MINE, [f"{key.name}={key.default}" for key in chosen])
    assert resolve_run({"name": "run", **spelt}, "spelt out") == resolve_run({"name": "run", **MINE}, "bare")


def test_what_is_filled_in_elsewhere_is_so() -> None:
    names = {(root, key.name) for root, section in chosen_sections(None) for key in section.keys}
    assert {("run", "data.vocab_size"), ("comparison", "base"), ("run", "model.preset"), ("run", "balance")} <= names
    config = resolve_run(MINE, "test")
    assert config.data.vocab_size == config.model.vocab_size
    for kind in ("adamw", "muon"):
        assert recipe_keys(f"optimizer.{kind}")[0].default == str(config.optimizer.learning_rate)
    assert "4096" in next(key for key in recipe_keys("comparison") if key.name == "training").meaning
    assert resolve_comparison({}, "test").training.tokens_per_step == 4096


@pytest.mark.parametrize(
    ("wanted", "first", "count"),
    [
        ("training", "training.tokens", None),
        ("[training]", "training.tokens", None),
        ("muon", "optimizer.learning_rate", 8),
        ("model.attention.latent", "model.attention.num_heads", 8),
        ("router", "model.feed_forward.router.num_groups", None),
        ("learning_rate", "optimizer.learning_rate", 2),
        ("training.steps", "training.steps", 1),
        ("comparison", "name", None),
        ("run", "name", None),
        ("stage", "stage.name", 13),
        ("[[stage]]", "stage.name", 13),
        ("stage.sample", "stage.sample.prompts", 10),
        ("at_least", "stage.sample.at_least", 1),
    ],
)
def test_a_section_is_found_by_any_of_its_names(wanted: str, first: str, count: int | None) -> None:
    found = finemoe.recipe_keys(wanted)
    assert found[0].name == first
    assert count is None or len(found) == count
    assert len(found) < len(KEYS)


@pytest.mark.parametrize(
    ("wanted", "says"), [("trainig", "`training`"), ("lerning_rate", "`learning_rate`"), ("zzz", "tables: run")]
)
def test_a_name_that_is_none_is_refused_with_a_suggestion(wanted: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe_keys(wanted)


def test_stages_are_listed_with_runs() -> None:
    (stage, *_) = chosen_sections("stage")
    assert (stage[0], heading(*stage)) == ("run", "[[stage]]")
    rewards = next(key for key in recipe_keys("stage.sample") if key.name == "stage.sample.rewards.kind")
    assert rewards.type.endswith("as [method.rewards]")


def test_the_page_is_what_the_source_says() -> None:
    """`finemoe recipe keys --markdown > docs/reference/recipe.md` writes it anew."""
    assert PAGE.read_text(encoding="utf-8") == markdown()


def test_the_page_breaks_no_table() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("|")]
    assert {len(line.replace("\\|", "").split("|")) for line in rows} == {7}
