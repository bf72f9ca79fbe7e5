"""Sizes by name, recipe and run; the table of presets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from finemoe.model.presets import PRESETS, resolve

RECIPE = '[model]\npreset = "tiny-moe"\n[data]\nsequence_length = 128\n[training]\nsteps = 1\n'


def test_size_gives_the_figures_by_name(process: Any) -> None:
    result = process("size", "deepseek-moe-2b", "--seq-len", "2048", "--json")
    assert result.returncode == 0
    assert result.stderr == ""
    figures = json.loads(result.stdout)
    assert figures["training_flops_per_sequence"] == pytest.approx(4.33e12, rel=2e-3)
    for key in ("total_parameters", "active_parameters", "cache_elements_per_token"):
        assert isinstance(figures[key], int)
    assert figures["seq_len"] == 2048
    assert isinstance(figures["notes"], list)


def test_several_models_side_by_side(command: Any) -> None:
    records = json.loads(command("size", "tiny-moe", "tiny-dense", "--json").stdout)
    assert [record["name"] for record in records] == ["tiny-moe", "tiny-dense"]
    table = command("size", "tiny-moe", "deepseek-moe-145b").stdout
    assert max(map(len, table.splitlines())) <= 80
    assert "585.5 T" in table
    assert "the paper prints" in table


def test_recipe_and_run_directory(command: Any, run_directory: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    preset = json.loads(command("size", "tiny-moe", "--seq-len", "128", "--json").stdout)
    assert json.loads(command("size", recipe, "--json").stdout) == {**preset, "name": str(recipe)}
    run = json.loads(command("size", run_directory, "--json").stdout)
    assert run["seq_len"] == 64
    assert run["total_parameters"] < preset["total_parameters"]
    assert json.loads(command("size", run_directory, "--seq-len", "9", "--json").stdout)["seq_len"] == 9


def test_published_widths_count_only_for_the_published_model(command: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\npreset = "deepseek-moe-16b"\nnum_layers = 2\n')
    figures = json.loads(command("size", recipe, "--json").stdout)
    expected = figures["training_flops_per_token"] * figures["seq_len"]
    assert figures["training_flops_per_sequence"] == pytest.approx(expected)
    assert figures["notes"] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[modle]\n", "no [model] table"),
        ('[model]\npreset = "tiny-mo"\n', "did you mean `tiny-moe`?"),
        ('[model]\npreset = "tiny-moe"\nhiden_size = 3\n', "did you mean `hidden_size`?"),
        ('[model]\npreset = "tiny-moe"\n[data]\nsequence_length = "long"\n', "sequence_length"),
        ("[model\n", "TOML"),
    ],
)
def test_a_bad_recipe_is_named(command: Any, tmp_path: Path, text: str, says: str) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text(text)
    result = command("size", recipe)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"model": {"blocks": []}}'])
def test_a_directory_that_is_no_run_is_named(command: Any, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    result = command("size", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.stderr


def test_presets_fit_the_terminal(command: Any) -> None:
    result = command("presets")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "1+63 top 7" in result.stdout
    assert [record["name"] for record in json.loads(command("presets", "--json").stdout)] == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_preset_is_the_preset(command: Any, name: str) -> None:
    printed = tomllib.loads(command("presets", name).stdout)["model"]
    assert resolve(printed, name) == resolve({"preset": name}, name)
    assert json.loads(command("presets", name, "--json").stdout)["seq_len"] == PRESETS[name].seq_len
