"""Recipes with one thing wrong in them: whatever it is, the answer is a ConfigError in words of ours."""

from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import read_tables, read_toml, with_overrides
from finemoe.core.config_words import ELSEWHERE
from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.model.config import ModelRecipe
from finemoe.runs.config import RunConfig, read_recipe, resolve_run
from finemoe.runs.start import default_directory
from finemoe.studies.arms import solve
from finemoe.studies.config import resolve_comparison

_RUN: dict[str, Any] = {
    "name": "x",
    "seed": 1,
    "model": {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_layers": 2,
        "attention": {
            "kind": "grouped_query",
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "rope": {"theta": 1e4},
        },
        "leading": {"count": 1, "feed_forward": {"kind": "dense", "ffn_hidden_size": 24}},
        "feed_forward": {
            "kind": "moe",
            "num_routed_experts": 4,
            "experts_per_token": 2,
            "expert_hidden_size": 24,
            "num_shared_experts": 1,
            "router": {"kind": "softmax_topk", "normalize_gates": True},
            "balance": {"expert": 0.01},
        },
    },
    "data": {
        "corpus": {"kind": "files", "paths": ["x"], "validation_paths": ["y"]},
        "sequence_length": 16,
        "validation_share": 0.1,
    },
    "training": {"steps": 6, "tokens_per_step": 64, "threads": 1, "trackers": [], "device": "cpu"},
    "method": {"kind": "pretraining"},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01, "betas": [0.9, 0.95]},
    "schedule": {"kind": "multi_step", "milestones": [0.8, 0.9]},
    "kernels": {"attention": "sdpa"},
}
_COMPARISON: dict[str, Any] = {
    "arms": ["dense", "switch"],
    "seeds": [0, 1],
    "base": {"preset": "tiny-dense", "num_layers": 2},
    "matching": {"total_multiple": 4, "segments": 2},
    "routing": {"balance": 0.01},
    "budget": {"kind": "tokens", "value": 100_000},
    "tuning": {"learning_rates": [0.1, 0.2], "tokens": 9000},
    "data": {"sequence_length": 256},
    "training": {"tokens_per_step": 4096},
}
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 10**9, 2**62, 2**63, 10**30, 10**400, -(10**30), 0.5, -0.5, 1e300, math.nan, math.inf, "",
    "x", "3", "../../x", "\0", "x" * 10_000, [], [1], ["a"], [[1]], {}, {"kind": "x"}, {"kind": 3}, {"kind": None},
    {"a": {"b": 1}}, [{}], [None],
]  # fmt: skip
_RAW = re.compile(
    r"Errno|Traceback|pydantic|validation error|Input should be|has no attribute|does not fit: |NoneType|<class"
)


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def _places(table: Any) -> list[tuple[Any, Any]]:
    pairs = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [(table, key) for key, _ in pairs] + [place for _, inner in pairs for place in _places(inner)]


def _spoilt(sound: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    table = copy.deepcopy(sound)
    container, key = rng.choice(_places(table))
    if rng.random() < 0.2 and isinstance(container, dict):
        kept = container.pop(key)
        container[rng.choice([*ELSEWHERE, str(key)[:-1], str(key) + "s", "", "a.b", "\n"])] = kept
    elif rng.random() < 0.05:
        container[key] = _deep(rng.choice([50, 5000]))
    else:
        container[key] = rng.choice(_VALUES)
    return table


def _resolve_run(table: dict[str, Any]) -> object:
    return default_directory(resolve_run(*read_recipe(table)).name)


def _resolve_comparison(table: dict[str, Any]) -> object:
    config = resolve_comparison(*read_recipe(table))
    arms = [solve(n, config.base, config.matching, config.routing, config.data.sequence_length) for n in config.arms]
    return default_directory(config.name), arms


@pytest.mark.parametrize(("sound", "resolve"), [(_RUN, _resolve_run), (_COMPARISON, _resolve_comparison)])
def test_whatever_is_wrong_is_said_in_words(sound: dict[str, Any], resolve: Any) -> None:
    resolve(sound)
    said: dict[int, str] = {}
    for seed in range(400):
        table = _spoilt(sound, random.Random(seed))
        try:
            resolve(table)
        except FinemoeError as error:
            said[seed] = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
    assert len(said) > 200
    assert {seed: text[:500] for seed, text in said.items() if _RAW.search(text) or len(text) > 3000} == {}


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a = " + "9" * 5000,
        "a = 1e999999",
        "a.b" + ".c" * 5000 + " = 1",
        "a = '\x00'",
        "[a]\n[a]",
        "\xff",
    ],
)
def test_a_toml_that_is_none_is_said_in_words(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        resolve_run(*read_recipe(path))
    assert not _RAW.search(str(caught.value))


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "{a=" * 3000])
def test_a_value_of_set_that_is_none_is_said_in_words(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set|nested"):
        resolve_run(with_overrides({"model": {"preset": "tiny-moe"}}, [f"training.steps={value}"]), "r.toml")


def test_a_folder_a_link_to_itself_and_another_encoding_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    for path in (tmp_path, tmp_path / "loop.toml", tmp_path / "latin.toml"):
        with pytest.raises(ConfigError) as caught:
            read_toml(path)
        assert not _RAW.search(str(caught.value))


@pytest.mark.parametrize(
    "content", [None, b"\xe9", b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"name": "\\ud800"}']
)
def test_a_recipe_in_json_that_cannot_be_read_is_told_in_words(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a readable JSON file: ") as caught:
        read_tables(path)
    assert not _RAW.search(str(caught.value))
    assert "limit" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "..", ".x", "-x", "", "a\0b", "a\nb", "x" * 200, "a\\b", "a\u202eb", "a\x85"]
)
def test_a_name_never_leads_out_of_runs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"`name`.*becomes a folder in runs/"):
        default_directory(name)


@pytest.mark.parametrize("name", ["run", "größe 2", "v1.2_x-y", "7"])
def test_a_plain_name_becomes_a_folder_in_runs(name: str) -> None:
    assert default_directory(name).parent == Path("runs")
    assert default_directory(name).name.startswith(f"{name}-")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokens=5", "it belongs to [training], as `training.tokens`"),
        ("max_tokens=5", "it belongs to [training], as `training.max_tokens`"),
        ("training.token_budget=5", "did you mean `max_tokens`?"),
        ("lr=1", "here it is `optimizer.learning_rate`"),
        ("training.learning_rate=1", "it belongs to [optimizer], as `optimizer.learning_rate`"),
        ("model.num_experts=8", "here it is `model.feed_forward.num_routed_experts`"),
        ("model.feed_forward.num_experts=8", "did you mean `num_routed_experts`?"),
        ("num_experts=8", "here it is `model.feed_forward.num_routed_experts`"),
        ("num_layers=8", "here it is `model.num_layers`"),
        ("batch_size=8", "here it is `training.tokens_per_step`"),
        ("model.seq_len=8", "here it is `data.sequence_length`"),
        ("epochs=8", "it belongs to [training], as `training.epochs`"),
        ("training.gradient_clip=1", "here it is `optimizer.max_gradient_norm`"),
        ("data.path='x'", "here it is `data.corpus.paths`"),
        ("model.sequence_length=8", "here it is `data.sequence_length`"),
        ("model.seed=8", "it stands above all tables, as `seed`"),
        ("TRAINING.tokens=8", "unknown key `TRAINING`, did you mean `training`?"),
        ("output_dir='x'", "it is an option of the command, as --out"),
        ("schedule.final_share=0.1", 'it goes with kind = "cosine" or "warmup_stable_decay"'),
    ],
)
def test_a_key_in_the_wrong_place_or_of_another_program_is_led_to_the_right_one(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run(with_overrides({"model": {"preset": "tiny-moe"}, "training": {"steps": 2}}, [override]), "r.toml")
    assert said in str(caught.value)


def test_every_key_that_is_pointed_to_exists() -> None:
    from finemoe.core.config_words import keys_of

    known = {*keys_of(RunConfig), *(f"model.{key}" for key in keys_of(ModelRecipe)), "model.preset"}
    assert set(ELSEWHERE.values()) <= known
