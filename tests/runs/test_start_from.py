"""A run that begins with the weights of another folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from finemoe.checkpoint.open import load_model, load_tokenizer
from finemoe.core.errors import CheckpointError, ConfigError, RunError
from finemoe.runs.config import read_recipe, resolve_run
from finemoe.runs.run import Run, resume, train
from runs.tiny_runs import FEED_FORWARDS, recipe, steps


@pytest.fixture(scope="module")
def first(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe(corpus), out=tmp_path_factory.mktemp("first") / "run", quiet=True)


def further(corpus: Path, first: Run, **tables: object) -> dict[str, object]:
    """The recipe of a run that goes on from `first`: no model, no tokenizer of its own."""
    table = recipe(corpus, **tables)
    table.pop("model")
    table["data"].pop("vocab_size")  # type: ignore[attr-defined]
    return {**table, "start_from": str(first.directory)}


def test_the_first_loss_is_where_the_other_run_ended(corpus: Path, first: Run, tmp_path: Path) -> None:
    table = further(corpus, first, optimizer={"learning_rate": 1e-12})
    ran = train(table, out=tmp_path / "run", quiet=True)
    assert ran.summary["final_validation_loss"] == pytest.approx(first.summary["final_validation_loss"], abs=1e-4)
    for name, weight in load_model(first.directory).state_dict().items():
        torch.testing.assert_close(load_model(ran.directory).state_dict()[name], weight, rtol=0, atol=1e-6)
    assert (ran.directory / "tokenizer.json").read_bytes() == (first.directory / "tokenizer.json").read_bytes()


def test_the_resolved_configuration_is_complete_and_resumes(corpus: Path, first: Run, tmp_path: Path) -> None:
    ran = train(further(corpus, first), out=tmp_path / "run", quiet=True)
    config = json.loads((ran.directory / "config.json").read_text())
    assert config["model"] == json.loads((first.directory / "config.json").read_text())["model"]
    (ran.directory / "summary.json").unlink()
    newest = max((ran.directory / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    assert resume(ran.directory, quiet=True).summary["final_validation_loss"] == ran.summary["final_validation_loss"]


def test_what_belongs_to_the_tokenizer_comes_along(corpus: Path, first: Run, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    shutil.copytree(first.directory, opened)
    (opened / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ran = train({**further(corpus, first), "start_from": str(opened)}, out=tmp_path / "run", quiet=True)
    assert (ran.directory / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert not (ran.directory / "generation_config.json").exists()


@pytest.mark.parametrize("generation", [None, {"temperature": 0.6}, {"eos_token_id": 7}])
def test_stops_that_config_json_names_come_along(
    corpus: Path, first: Run, generation: dict[str, object] | None, tmp_path: Path
) -> None:
    opened = tmp_path / "opened"
    shutil.copytree(first.directory, opened)
    config = json.loads((opened / "config.json").read_text())
    (opened / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, 6]}))  # as in an imported folder
    if generation is not None:
        (opened / "generation_config.json").write_text(json.dumps(generation))
    ran = train({**further(corpus, first), "start_from": str(opened)}, out=tmp_path / "run", quiet=True)
    assert load_tokenizer(ran.directory).stop_ids == load_tokenizer(opened).stop_ids
    assert load_tokenizer(ran.directory).stop_ids >= ({7} if generation and "eos_token_id" in generation else {5, 6})
    written = json.loads((ran.directory / "generation_config.json").read_text())
    assert written == {"eos_token_id": [5, 6], **(generation or {})}


def test_one_checkpoint_of_a_run_brings_the_tokenizer_of_the_run(corpus: Path, first: Run, tmp_path: Path) -> None:
    checkpoint = max((first.directory / "checkpoints").iterdir())
    ran = train({**further(corpus, first), "start_from": str(checkpoint)}, out=tmp_path / "run", quiet=True)
    assert (ran.directory / "tokenizer.json").read_bytes() == (first.directory / "tokenizer.json").read_bytes()


def test_a_gguf_file_is_to_be_imported_first(corpus: Path, first: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finemoe import"):
        train({**further(corpus, first), "start_from": "some.gguf"}, out=tmp_path / "run")


def test_balance_losses_may_be_set_anew(corpus: Path, first: Run, tmp_path: Path) -> None:
    table = further(corpus, first, optimizer={"learning_rate": 1e-12}, training={"steps": 1})
    ran = train({**table, "balance": {"expert": 0.5, "z": 0.25}}, out=tmp_path / "run", quiet=True)
    config = json.loads((ran.directory / "config.json").read_text())
    assert {block["feed_forward"]["balance"]["expert"] for block in config["model"]["blocks"]} == {0.5}
    terms = steps(ran.directory)[0]["terms"]
    assert terms["expert"] > 0.9  # 0.5 for each of two layers, and more where the load is uneven
    assert terms["z"] > 0
    for name, weight in load_model(first.directory).state_dict().items():
        torch.testing.assert_close(load_model(ran.directory).state_dict()[name], weight, rtol=0, atol=1e-6)


def test_a_model_with_a_capacity_on_devices_is_opened(corpus: Path, tmp_path: Path) -> None:
    dropping = {"capacity_factor": 1.0, "capacity_level": "device", "balance": {"num_devices": 3, "device": 0.05}}
    table = recipe(corpus, training={"steps": 1})
    table["model"]["feed_forward"] = {**table["model"]["feed_forward"], **dropping}
    source = train(table, out=tmp_path / "source", quiet=True)
    ran = train(further(corpus, source, training={"steps": 1}), out=tmp_path / "run", quiet=True)
    assert ran.summary["steps"] == 1


def test_layers_that_learn_no_routing_take_no_balance(corpus: Path, tmp_path: Path) -> None:
    table = recipe(corpus, training={"steps": 1})
    table["model"]["leading"] = {"count": 1, "feed_forward": FEED_FORWARDS["hash"]}
    source = train(table, out=tmp_path / "source", quiet=True)
    config = resolve_run(*read_recipe({**further(corpus, source), "balance": {"expert": 0.5}}))
    assert [block.feed_forward.balance.expert for block in config.model.blocks] == [0.0, 0.5]
    hashed = train(recipe(corpus, "hash", training={"steps": 1}), out=tmp_path / "hash", quiet=True)
    with pytest.raises(ConfigError, match="no layer of the model learns to route"):
        resolve_run(*read_recipe({**further(corpus, hashed), "balance": {"expert": 0.5}}))


@pytest.mark.parametrize(
    ("balance", "words"),
    [({"expret": 0.1}, "did you mean `expert`"), ({"device": 0.1}, "num_devices"), ("none", "must be a table")],
)
def test_balance_that_does_not_fit_is_refused(balance: object, words: str, corpus: Path, first: Run) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_run(*read_recipe({**further(corpus, first), "balance": balance}))


def test_balance_without_start_from_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.feed_forward\.balance"):
        resolve_run(*read_recipe({**recipe(corpus), "balance": {"expert": 0.1}}))


def test_a_model_table_beside_it_is_refused(corpus: Path, first: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave \\[model\\] out"):
        train({**recipe(corpus), "start_from": str(first.directory)}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(corpus: Path, first: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing here"):
        train({**further(corpus, first), "start_from": str(tmp_path / "none")}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_model_was_replaced_is_refused(corpus: Path, first: Run, tmp_path: Path) -> None:
    config = resolve_run(*read_recipe(further(corpus, first)))
    other = config.model_copy(update={"model": config.model.model_copy(update={"norm_eps": 1e-3})})
    with pytest.raises(RunError, match="does not hold the model"):
        train(other, out=tmp_path / "run", quiet=True)
