"""From a recipe to a RunConfig: what is refused, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import merge, to_json
from finemoe.core.errors import ConfigError
from finemoe.model.config import expand
from finemoe.model.presets import PRESETS, resolve
from finemoe.runs.config import DEFAULT_LEARNING_RATE, RunConfig, read_config, read_recipe, resolve_run

MINIMAL: dict[str, Any] = {"model": {"preset": "tiny-moe"}, "training": {"steps": 10}}


def resolved(*overrides: str, **tables: Any) -> RunConfig:
    return resolve_run(*read_recipe(merge(MINIMAL, tables), overrides))


def test_a_preset_is_expanded_and_its_vocabulary_is_the_tokenizer_s() -> None:
    config = resolved()
    assert config.model == expand(resolve({"preset": "tiny-moe"}, "test"))
    assert config.data.vocab_size == config.model.vocab_size == 2048


def test_a_preset_with_overrides_keeps_the_rest() -> None:
    config = resolved(
        "model.hidden_size=32",
        "model.feed_forward.experts_per_token=3",
        "training.tokens_per_step=1024",
        "name=other",
        model={"num_layers": 2},
    )
    assert config.name == "other"
    assert config.model.hidden_size == 32
    assert len(config.model.blocks) == 2
    layer = config.model.blocks[1].feed_forward
    assert (layer.experts_per_token, layer.num_routed_experts) == (3, 63)
    assert config.training.total_steps == 10


def test_another_kind_replaces_a_table_whole() -> None:
    config = resolved(model={"feed_forward": {"kind": "dense", "ffn_hidden_size": 64}})
    assert config.model.moe_layers == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeed=1", "unknown key `seeed`, did you mean `seed`?"),
        ("training.step=5", "`training.step`, did you mean `steps`?"),
        ("data.sequence_lenght=5", "`data.sequence_lenght`, did you mean `sequence_length`?"),
        ("data.corpus={kind='stdlib', include_test=true}", "did you mean `include_tests`?"),
        ("optimizer.learning_rat=1", "did you mean `learning_rate`?"),
        ("schedule={kind='cosine', warmup=0.1}", "did you mean `warmup_share`?"),
        ("kernels.expert='loop'", "did you mean `experts`?"),
        ("model.hidden_sise=64", "did you mean `hidden_size`?"),
        ("model.attention.num_head=2", "did you mean `num_heads`?"),
        ("model.feed_forward.expert_per_token=2", "did you mean `experts_per_token`?"),
        ("model.feed_forward.router.normalise_gates=true", "did you mean `normalize_gates`?"),
        ("model.feed_forward.balance.experts=1", "did you mean `expert`?"),
    ],
)
def test_an_unknown_key_at_any_level_suggests_the_one_that_was_meant(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.tokens=9000", "training.steps=3"], "exactly one of `tokens`, `steps` and `epochs`"),
        (
            ["training.tokens=9000", "training.max_tokens=8500"],
            "`tokens` 9000 and `max_tokens` 8500 exclude each other",
        ),
        (["training.max_tokens=0"], "`training.max_tokens` must be greater than 0"),
        (
            ["training.tokens_per_step=1000"],
            "tokens_per_step 1000 is not a multiple of data.sequence_length 256: try 768",
        ),
        (["training.tokens_per_step=100"], "is not a multiple of data.sequence_length 256: try 256"),
        (["training.micro_batch_tokens=300"], "micro_batch_tokens 300 is not a multiple"),
        (
            [
                "method.kind='grpo'",
                "data.sequence_length=32",
                "method.answer_tokens=8",
                "training.tokens_per_step=1000",
            ],
            "tokens_per_step 1000 is not a multiple of data.sequence_length 32: try 1024",
        ),
        (
            [
                "method.kind='grpo'",
                "data.sequence_length=32",
                "method.answer_tokens=8",
                "method.group=7",
                "training.tokens_per_step=4096",
            ],
            "the 128 answers of a rollout are no whole groups of method.group 7: try method.group 8, or "
            "training.tokens_per_step 4032",
        ),
        (
            ["method.kind='grpo'", "method.rewards.0.kind='anser'"],
            "`method.rewards` must be a list in [ ]; one entry of a list that is there is named by its number, from 0",
        ),
        (["data.vocab_size=1000"], "data.vocab_size 1000 and model.vocab_size 2048 differ"),
        (["optimizer.learning_rate=-1"], "`optimizer.learning_rate`"),
        (["optimizer.learning_rate=nan"], "`optimizer.learning_rate`"),
        (["schedule.kind='cosin'"], "unknown `schedule.kind` 'cosin', did you mean `cosine`?"),
        (
            ["data.corpus.max_bytes=9"],
            "`data.corpus.kind` is required and missing; known: stdlib, interpreter, problems, files",
        ),
        (["training.device='tpu'"], "`training.device`"),
        (["model.preset='tiny-mo'"], "did you mean `tiny-moe`?"),
        (["model.feed_forward.experts_per_token=64"], "experts_per_token 64 is above num_routed_experts 63"),
    ],
)
def test_impossible_values_name_the_field_and_the_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*overrides)
    assert message in str(caught.value)


def test_one_value_of_a_table_keeps_the_other_defaults() -> None:
    config = resolved("schedule.warmup_share=0.1", "optimizer.weight_decay=0.0")
    assert (config.schedule.kind, config.schedule.warmup_share) == ("multi_step", 0.1)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (DEFAULT_LEARNING_RATE, 0.0)


def test_a_length_is_required() -> None:
    with pytest.raises(ConfigError, match="exactly one of `tokens`, `steps` and `epochs`"):
        resolve_run({"model": {"preset": "tiny-moe"}, "training": {}}, "recipe")


def test_less_than_one_step_of_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.tokens 8191 is less than one step of 8192"):
        resolve_run({"model": {"preset": "tiny-moe"}, "training": {"tokens": 8191}}, "recipe")


@pytest.mark.parametrize(("tokens", "steps"), [(8192, 1), (16_383, 1), (16_384, 2)])
def test_tokens_become_whole_steps(tokens: int, steps: int) -> None:
    config = resolve_run({"model": {"preset": "tiny-moe"}, "training": {"tokens": tokens}}, "recipe")
    assert config.training.total_steps == steps


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"`model` is missing; start with \[model\] preset"),
        ({"model": "tiny-moe"}, "`model` and `data` must be tables"),
        ({"model": {"preset": "tiny-moe"}, "data": 3}, "`model` and `data` must be tables"),
        ({"model": {"preset": "tiny-moe"}}, "`training` is required and missing"),
        ({"model": {"hidden_size": 4}, "training": {"steps": 1}}, "`vocab_size` is required and missing"),
    ],
)
def test_what_is_missing_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_run(raw, "recipe")


@pytest.mark.parametrize(
    ("per_step", "micro", "sequences"), [(8192, None, 32), (65_536, None, 64), (8192, 512, 2), (256, None, 1)]
)
def test_micro_batches_in_sequences(per_step: int, micro: int | None, sequences: int) -> None:
    training = {"tokens_per_step": per_step, "micro_batch_tokens": micro}
    assert resolved(training=training).micro_batch_sequences == sequences


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_config_json_reads_back_equal(tmp_path: Path, preset: str) -> None:
    config = resolve_run({"model": {"preset": preset}, "training": {"tokens": 10**6}}, preset)
    (tmp_path / "config.json").write_text(to_json(config))
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {}}'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: not the configuration of a run"):
        read_config(tmp_path / "config.json")


def test_a_recipe_file_gives_its_name_and_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npreset = "tiny-dense"\n[training]\nsteps = 3\n')
    raw, source = read_recipe(path, ["seed=5"])
    config = resolve_run(raw, source)
    assert (config.name, config.seed, config.training.total_steps) == ("mine", 5, 3)
    assert source == str(path)


@pytest.mark.parametrize("length", [{"epochs": 2}, {"tokens": 16384}, {"steps": 10}], ids=str)
@pytest.mark.parametrize("given", ["training.steps=2", "training.tokens=16384", "training.epochs=1.5"])
def test_a_length_that_is_set_replaces_that_of_the_recipe(length: dict[str, Any], given: str, tmp_path: Path) -> None:
    raw = {**MINIMAL, "training": {**length, "threads": 1}}
    key, value = given.removeprefix("training.").split("=")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(raw))
    for source in (raw, path):
        training = resolve_run(*read_recipe(source, [given])).training.model_dump()
        lengths = {one: training[one] for one in ("tokens", "steps", "epochs") if training[one] is not None}
        assert lengths == {key: float(value)}
        assert training["threads"] == 1
    assert raw["training"] == {**length, "threads": 1}  # whose it is, it stays


@pytest.mark.parametrize(
    ("given", "most"), [("training.steps=2", 5), ("training.epochs=1.5", 5), ("training.tokens=16384", None)]
)
def test_a_length_in_tokens_alone_takes_the_place_of_a_bound(given: str, most: int | None) -> None:
    raw = {**MINIMAL, "training": {"steps": 10, "max_tokens": 5}}
    training = resolve_run(*read_recipe(raw, [given])).training
    assert training.max_tokens == most
    assert training.epochs is not None or training.total_tokens == (most or 16384)
    assert resolve_run(*read_recipe(raw, [given.replace("tokens", "steps"), "training.max_tokens=9"])).training == (
        training.model_copy(update={"max_tokens": 9, **({"tokens": None, "steps": 16384} if most is None else {})})
    )


def test_two_lengths_at_once_are_refused_still() -> None:
    for given in (["training.steps=2", "training.epochs=1"], []):
        raw = {**MINIMAL, "training": {"epochs": 1, "steps": 2}}
        with pytest.raises(ConfigError, match="give exactly one of `tokens`, `steps` and `epochs`"):
            resolve_run(*read_recipe(raw, given))


def test_a_missing_choice_is_named_with_what_can_be_chosen() -> None:
    with pytest.raises(ConfigError, match=r"`trainable\.mode` is required and missing; known: 'F', 'D'"):
        resolved(trainable={"kind": "child"})
