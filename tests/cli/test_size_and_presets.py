"""Sizes by name, recipe and run; the table of presets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.released_configs import RELEASED
from finemoe.model.config import expand
from finemoe.model.presets import GROUPS, PRESETS, resolve
from finemoe.runs.config import resolve_run
from runs.forking import finemoe

RECIPE = '[model]\npreset = "tiny-moe"\n[data]\nsequence_length = 128\n[training]\nsteps = 1\n'


def test_size_gives_the_figures_by_name() -> None:
    result = finemoe("size", "deepseek-moe-2b", "--seq-len", "2048", "--json")
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
    recipe.write_text(f'start_from = "{run_directory}"\n[data]\nsequence_length = 64\n')
    assert json.loads(command("size", recipe, "--json").stdout) == {**run, "name": str(recipe)}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--cache-bits", "16,6"], "-93.3 %"),
        ([], "-82.2 %"),
        (["--cache-bits", "8"], "-82.2 %"),
    ],
)
def test_caches_are_compared_with_the_first(command: Any, arguments: list[str], shown: str) -> None:
    names = ["deepseek-llm-67b", "deepseek-v2"]
    assert shown in command("size", *names, *arguments).stdout
    first, second = json.loads(command("size", *names, *arguments, "--json").stdout)
    assert first["cache_against_first"] == 1
    assert f"{100 * (second['cache_against_first'] - 1):.1f} %" == shown
    assert second["cache_bytes_per_token"] == second["cache_elements_per_token"] * second["cache_bits"] / 8


def test_one_model_at_two_widths(command: Any) -> None:
    records = json.loads(command("size", "tiny-v2", "tiny-v2", "--cache-bits", "16,4.5", "--json").stdout)
    assert [record["cache_bits"] for record in records] == [16, 4.5]
    assert records[1]["cache_against_first"] == 4.5 / 16
    assert "24.9 times" in command("size", "deepseek-v2", "deepseek-v2-mha").stdout


@pytest.mark.parametrize("bits", ["6,16,4", "six", "", "0", "-1", "nan", "inf", "16,", "65"])
def test_bits_that_fit_no_model_are_refused(command: Any, bits: str) -> None:
    result = command("size", "tiny-v1", "tiny-v2", "--cache-bits", bits)
    assert result.exit_code == 2
    assert "--cache-bits" in result.stderr
    assert result.stdout == ""


def test_the_whole_family_stands_in_80_columns(command: Any) -> None:
    text = command("size", "deepseek-v3", "deepseek-v2", "deepseek-v2-lite").stdout
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("671B", "37.6B", "36.6B", "+11.6B", "2.45B", "34,560", "1,250 GiB"):
        assert figure in text, figure


def test_an_imported_folder(command: Any, tmp_path: Path) -> None:
    config = expand(resolve({"preset": "tiny-v3", "max_positions": 900}, "here")).model_dump(mode="json")
    source = {"family": "deepseek_v3", "format": "huggingface"}
    (tmp_path / "config.json").write_text(json.dumps({"model": config, "source": source}))
    figures = json.loads(command("size", tmp_path, "--json").stdout)
    preset = json.loads(command("size", "tiny-v3", "--seq-len", "900", "--json").stdout)
    assert figures == {**preset, "name": str(tmp_path)}
    assert json.loads(command("size", tmp_path, "--seq-len", "9", "--json").stdout)["seq_len"] == 9
    (tmp_path / "config.json").write_text(json.dumps({"model": {**config, "max_positions": None}, "source": source}))
    assert json.loads(command("size", tmp_path, "--json").stdout)["seq_len"] == 4096
    (tmp_path / "config.json").write_text(json.dumps({"model": 3, "source": source}))
    result = command("size", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.stderr


def test_a_config_json_alone(command: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED["deepseek-v3"]}))
    figures = json.loads(command("size", tmp_path / "config.json", "--json").stdout)
    assert figures["total_parameters"] == 671_026_419_200
    assert json.loads(command("size", tmp_path, "--json").stdout) == {**figures, "name": str(tmp_path)}


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


@pytest.mark.parametrize("content", [None, "not json", "[]", "[" * 99_999, '{"model": {"blocks": []}}'])
def test_a_directory_that_is_no_run_is_named(command: Any, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    result = command("size", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.stderr


def test_presets_fit_the_terminal(command: Any) -> None:
    lines = command("presets").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("1+63 top 7" in line for line in lines) == 7
    runs_in = {line.split()[0]: line.split("top 7")[1].split()[0] for line in lines if "1+6" in line}
    assert (runs_in["tiny-lite"], runs_in["tiny-moe"], runs_in["tiny-v2"], runs_in["tiny-v3"]) == ("TL", "L", "T", "TL")
    # One line each, under its group: nothing wraps.
    assert len(lines) == 1 + sum(2 + len(group) for group in GROUPS.values()) + 5
    assert set(GROUPS) <= set(lines)
    assert [record["name"] for record in json.loads(command("presets", "--json").stdout)] == list(PRESETS)


def test_the_list_narrows_to_names_and_groups(command: Any) -> None:
    def names(text: str) -> list[str]:
        return [record["name"] for record in json.loads(command("presets", "--only", text, "--json").stdout)]

    assert names("TINY-V") == ["tiny-v1", "tiny-v2", "tiny-v3"]
    assert names("v3 and r1") == list(GROUPS["DeepSeek-V3 and R1"])
    shown = command("presets", "--only", "smol").stdout
    assert "smollm2-135m" in shown
    assert "tiny" not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "gpt"], "no preset and no group has it in its name"),
        (["tiny-moe", "--only", "tiny"], "give one of them"),
        (["tiny"], "unknown preset `tiny`"),
    ],
)
def test_a_list_of_nothing_is_explained(command: Any, arguments: list[str], says: str) -> None:
    result = command("presets", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_preset_is_the_preset(command: Any, name: str) -> None:
    recipe = tomllib.loads(command("presets", name).stdout)
    assert resolve(recipe["model"], name) == resolve({"preset": name}, name)
    assert resolve_run({"name": name, **recipe}, name).training.total_steps > 0  # it trains as it stands
    record = json.loads(command("presets", name, "--json").stdout)
    assert record["seq_len"] == PRESETS[name].seq_len
    assert name in GROUPS[record["group"]]
