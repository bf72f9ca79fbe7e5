"""Methods on conversations, and what may move, on whole tiny runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finemoe.checkpoint.language_model import open_language_model
from finemoe.checkpoint.open import load_chat_template, load_tokenizer, read_model_config
from finemoe.core.errors import ConfigError, DataError
from finemoe.methods.reference import Reference
from finemoe.methods.reward import figures_of, label_ids, labels_for, rewards
from finemoe.methods.trainables.experts import ExpertRows
from finemoe.runs.config import resolve_run
from finemoe.runs.run import resume, train
from finemoe.runs.start import build_method
from finemoe.text.turns import encode_turns
from methods.tiny_talks import LENGTH, adapting, run, select, weights, write_pairs
from runs.tiny_runs import checkpoints, corpus, records, steps

__all__ = ["corpus"]


def test_a_preference_begins_at_the_logarithm_of_two_and_no_margin(base: Path, tmp_path: Path) -> None:
    first = steps(run(base, tmp_path / "run", "dpo", training={"steps": 1}))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["terms"]["margin"]) < 1e-4
    assert first["terms"]["chosen_length"] > first["terms"]["rejected_length"] > 1


def test_the_reference_is_computed_once_for_the_same_weights_and_pairs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: dict[str, Any] = {"training": {"steps": 1}, "data": {"cache_dir": str(tmp_path / "cache")}}
    first = run(base, tmp_path / "first", "dpo", **tables)
    monkeypatch.setattr(Reference, "_compute", lambda *_: pytest.fail("computed again"))
    second = run(base, tmp_path / "second", "dpo", {"beta": 0.7}, **tables)
    found = [load_file(checkpoints(one)[-1] / "method.safetensors")["reference/logprobs"] for one in (first, second)]
    assert torch.equal(*(one.nan_to_num() for one in found))
    known = (found[0] < 0).all(dim=1)
    assert 4 <= known.sum() < len(known)  # the pairs of one step, and those held out, and no others
    assert found[0][~known].isnan().all()
    raw = adapting(first, base.parent / "pairs.jsonl", {"kind": "dpo"}, **tables)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        train(raw, out=tmp_path / "third", quiet=True)


def test_a_longer_run_asks_the_first_model_for_the_pairs_that_are_new(base: Path, tmp_path: Path) -> None:
    tables: dict[str, Any] = {"data": {"cache_dir": str(tmp_path / "cache")}}
    short = run(base, tmp_path / "short", "dpo", training={"steps": 2}, **tables)
    resume(short, overrides=["training.steps=6"], quiet=True)
    tables["data"]["cache_dir"] = str(tmp_path / "other")
    whole = run(base, tmp_path / "whole", "dpo", **tables)
    found = [load_file(checkpoints(one)[-1] / "method.safetensors")["reference/logprobs"] for one in (short, whole)]
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert steps(short)[-1]["loss"] == pytest.approx(steps(whole)[-1]["loss"], rel=1e-3)  # batches are cut otherwise


def test_only_the_chosen_experts_have_gradients_and_moments(base: Path, tmp_path: Path) -> None:
    chosen = select(base, tmp_path / "selection.json", {1: (6, 2)})
    found = run(base, tmp_path / "run", trainable={"kind": "experts", "selection": str(chosen)})
    moments = load_file(checkpoints(found)[-1] / "optimizer.safetensors")
    shapes = {name.rpartition("/")[0]: tuple(tensor.shape) for name, tensor in moments.items() if "exp_avg" in name}
    assert shapes == {
        "blocks.1.feed_forward.experts.gate_up_proj.rows": (2, 12, 16),
        "blocks.1.feed_forward.experts.down_proj.rows": (2, 16, 6),
    }
    before, after = weights(base), weights(found)
    for name, tensor in before.items():
        if name.startswith("blocks.1.feed_forward.experts."):
            others = [expert for expert in range(8) if expert not in (6, 2)]
            assert torch.equal(tensor[others], after[name][others])
            assert not torch.equal(tensor[[6, 2]], after[name][[6, 2]])
        else:
            assert torch.equal(tensor, after[name]), name


def test_rows_apart_are_the_stack_with_the_others_put_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle: train whole stacks, without clipping, and after every update put all but the chosen rows back."""
    chosen = select(base, tmp_path / "selection.json", {1: (6, 2)})
    tables: dict[str, Any] = {
        "trainable": {"kind": "experts", "selection": str(chosen)},
        "optimizer": {"weight_decay": 0.3, "max_gradient_norm": 1e9},
    }
    found = weights(run(base, tmp_path / "rows", **tables))
    kept: dict[str, torch.Tensor] = {}

    def whole(self: ExpertRows, model: Any, selected: list[Any]) -> list[Any]:
        kept.update({one.name: one.parameter.detach().clone() for one in selected})
        self._rows.clear()
        return selected

    def put_back(self: ExpertRows, model: Any, *_: Any) -> None:
        for name, parameter in model.named_parameters():
            if name in kept:
                others = [expert for expert in range(8) if expert not in (6, 2)]
                parameter.data[others] = kept[name][others]

    monkeypatch.setattr(ExpertRows, "__call__", whole)
    monkeypatch.setattr(ExpertRows, "after_update", put_back)
    expected = weights(run(base, tmp_path / "stacks", **tables))
    assert kept
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_prediction_modules_are_frozen_trained_or_left_out(base: Path, tmp_path: Path) -> None:
    before = weights(base)
    ahead = {name for name in before if name.startswith("mtp.")}
    assert ahead
    frozen, trained, dropped = (run(base, tmp_path / how, own={"mtp": how}) for how in ("freeze", "train", "drop"))
    assert all(torch.equal(before[name], weights(frozen)[name]) for name in ahead)
    moved = {name for name in ahead if not torch.equal(before[name], weights(trained)[name])}
    assert any("projection" in name for name in moved)
    assert {"mtp_1", "mtp_2"} <= steps(trained)[0]["terms"].keys()
    assert not ahead & set(weights(dropped))
    assert read_model_config(dropped).mtp == ()


def test_biases_move_in_fine_tuning_alone_unless_a_recipe_says_so(base: Path, tmp_path: Path) -> None:
    name = "blocks.1.feed_forward.router.selection_bias"
    start = weights(base)[name]
    assert not torch.equal(start, weights(run(base, tmp_path / "sft"))[name])
    assert torch.equal(start, weights(run(base, tmp_path / "dpo", "dpo"))[name])
    moved = run(base, tmp_path / "moved", "dpo", balancing={"rate": 0.01})
    assert not torch.equal(start, weights(moved)[name])
    with pytest.raises(ConfigError, match=r"\[balancing\] is set, and trainable.kind 'everything' leaves routers"):
        run(base, tmp_path / "no", trainable={"freeze": ["routers"]}, balancing={"rate": 0.01})


def test_what_is_live_is_said(base: Path) -> None:
    def notes(method: str, **tables: Any) -> str:
        raw = adapting(base, base.parent / "pairs.jsonl", {"kind": method}, **tables)
        return "\n".join(build_method(resolve_run(raw, "recipe")).notes)

    assert "added to the loss: selection bias by sign at 0.001" in notes("sft", balance={})
    assert "sequence 0.01" in notes("sft")
    assert "selection bias that stays as it is" in notes("dpo")
    assert "a reward is the logit of" in notes("reward")
    assert "the model has no chat template: it learns the plain one" in notes("sft")
    assert "frozen: norms" in notes("sft", trainable={"freeze": ["norms"]})


def test_the_model_is_asked_as_it_was_taught(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path / "run", training={"evaluate_every": 3})
    template, tokenizer = load_chat_template(found), load_tokenizer(found)
    assert template is not None
    asked = [{"role": "user", "content": "1 ant?"}]
    _, ids = open_language_model(found).encode_chat(asked)
    turns = encode_turns(template, tokenizer, [*asked, {"role": "assistant", "content": "ant."}])
    first = turns.trained.index(True)
    assert list(turns.ids[:first]) == ids
    assert turns.ids[-1] == tokenizer.end_of_text_id
    assert turns.trained[-1]
    measured = [record for record in records(found) if record["kind"] == "validation"]
    assert [record["step"] for record in measured] == [0, 3, 6]
    for sample in measured[-1]["samples"]:
        assert set(sample) == {"prompt", "answer", "ended"}
        assert sample["prompt"].startswith("User:\n")
    raw = adapting(found, base.parent / "pairs.jsonl", {"kind": "sft"})
    again = train(raw, out=tmp_path / "again", quiet=True).directory  # what has learnt the plain template keeps it
    kept = load_chat_template(again)
    assert kept is not None
    assert kept.sources == template.sources
    assert "plain" not in json.loads((again / "data.json").read_text())["template"]


def test_epochs_become_steps_when_the_data_is_read(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": "sft"})
    raw["training"] = {**raw["training"], "epochs": 2}
    del raw["training"]["steps"]
    with pytest.raises(ConfigError, match=r"training.epochs: how many steps that is depends on the data"):
        _ = resolve_run(raw, "recipe").training.total_steps
    caplog.set_level("INFO", logger="finemoe")
    found = train(raw, out=tmp_path / "run")
    bins = json.loads((found.directory / "data.json").read_text())["bins"]
    assert json.loads((found.directory / "config.json").read_text())["training"]["steps"] == round(2 * bins / 4)
    assert found.summary["steps"] == round(2 * bins / 4)
    said = [one.getMessage() for one in caplog.records if " to train and validate on" in one.getMessage()]
    assert len(said) == 1


def test_nothing_is_dropped_for_want_of_room(corpus: Path, tmp_path: Path) -> None:
    """A model that was trained with a capacity is adapted without: else it is not the one that is measured."""
    write_pairs(tmp_path / "pairs.jsonl")
    capacity = {"capacity_factor": 0.5}
    from runs.tiny_runs import recipe

    raw = recipe(corpus, "deepseek-moe", model={"feed_forward": capacity}, training={"steps": 2})
    limited = train(raw, out=tmp_path / "limited", quiet=True).directory
    assert steps(limited)[0]["dropped"] > 0
    assert all(not record.get("dropped") for record in steps(run(limited, tmp_path / "run")))


def test_there_must_be_a_model_to_adapt(base: Path, corpus: Path) -> None:
    from runs.tiny_runs import recipe

    with pytest.raises(ConfigError, match="adapts a model that was trained before: name it as start_from"):
        build_method(resolve_run(recipe(corpus, method={"kind": "sft"}), "recipe"))


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("dpo", {"loss": "ipo", "label_smoothing": 0.1}, 'label_smoothing does nothing with loss = "ipo"'),
        ("dpo", {"reference": "none"}, "without a reference the shorter answer would win"),
        ("dpo", {"mtp": "train"}, "`method.mtp`"),
        ("sft", {"beta": 1}, "unknown key `method.beta`"),
    ],
)
def test_what_makes_no_sense_is_refused(base: Path, method: str, own: dict[str, Any], message: str) -> None:
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": method, **own})
    with pytest.raises(ConfigError) as error:
        resolve_run(raw, "recipe")
    assert message in str(error.value)


@pytest.mark.parametrize(("kind", "field"), [("names", "train"), ("everything", "freeze")])
def test_a_part_that_is_not_there_is_named(base: Path, tmp_path: Path, kind: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainable\.{field}: 'atention' matches no parameter .* use embeddings"):
        run(base, tmp_path / "run", trainable={"kind": kind, field: ["atention"]})


def test_items_that_are_all_too_long_say_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all \d+ are longer than data.sequence_length 8: raise it"):
        run(base, tmp_path / "run", data={"sequence_length": 8}, training={"tokens_per_step": 32})


def test_a_judge_learns_which_answer_is_better(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path / "run", "reward", training={"steps": 60, "checkpoint_every": 60})
    last = [record for record in records(found) if record["kind"] == "validation"][-1]
    assert last["validation_accuracy"] >= 0.8
    assert last["validation_accuracy_low"] < last["validation_accuracy"] <= last["validation_accuracy_high"] + 1e-9
    asked = {"role": "user", "content": "3 ant bee?"}
    better, worse = ([asked, {"role": "assistant", "content": text}] for text in ("ant bee.", "jay"))
    first, second = rewards(open_language_model(found), [better, worse])
    assert first > second
    assert rewards(found, [better, worse]) == rewards(str(found), [better, worse]) == [first, second]


def test_labels_are_words_that_are_a_token_each(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert labels_for(tokenizer, None) == ("A", "B")  # good and yes are several tokens of this vocabulary
    assert labels_for(tokenizer, ("x", "y")) == ("x", "y")
    with pytest.raises(ConfigError, match=r"method.labels: 'good' is \d tokens .*choose a word that is one"):
        label_ids(tokenizer, ("good", "B"))
    with pytest.raises(ConfigError, match="the same token"):
        label_ids(tokenizer, ("A", "A"))


def test_calibration_is_the_gap_between_sure_and_right() -> None:
    import numpy as np

    apart = np.array([[2.0, 0.0]] * 8 + [[0.0, 2.0]] * 2)
    found = figures_of(apart)
    sure = 1 / (1 + math.exp(-2))
    assert found["validation_accuracy"] == pytest.approx(0.8)
    assert found["validation_calibration_error"] == pytest.approx(sure - 0.8)
    assert found["validation_brier"] == pytest.approx(0.8 * (1 - sure) ** 2 + 0.2 * sure**2)
    assert found["validation_accuracy_low"] < 0.8 < found["validation_accuracy_high"]
    assert figures_of(np.zeros((4, 2)))["validation_accuracy"] == 0.5


def test_a_longer_row_has_no_room_for_padding(base: Path) -> None:
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": "sft"})
    method = build_method(resolve_run(raw, "recipe"))
    batch = method.data.batch(0, 4)
    assert batch.num_sequences == 4
    assert batch.num_tokens == batch.rows.tokens.numel() <= 4 * LENGTH
    assert batch.rows.documents[0].diff().min() >= 0


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_what_is_forgotten_is_measured_beside(base: Path, corpus: Path, tmp_path: Path, method: str) -> None:
    general = {"kind": "files", "paths": [str(corpus / "train")], "validation_paths": [str(corpus / "validation.txt")]}
    found = run(base, tmp_path / "run", method, {"general": general}, training={"evaluate_every": 3})
    losses = [record["general_loss"] for record in records(found) if record["kind"] == "validation"]
    before = json.loads((base / "summary.json").read_text())["final_validation_loss"]
    assert losses[0] == pytest.approx(before, rel=0.05)  # the same text, cut otherwise
    assert losses[-1] != losses[0]
    assert json.loads((found / "summary.json").read_text())["final_general_loss"] == losses[-1]


def test_prediction_modules_are_no_experts(base: Path, tmp_path: Path) -> None:
    chosen = select(base, tmp_path / "selection.json", {1: (6, 2)})
    with pytest.raises(ConfigError, match=r'method.mtp = "train" trains prediction modules, .* use "freeze" or "drop"'):
        run(base, tmp_path / "run", own={"mtp": "train"}, trainable={"kind": "experts", "selection": str(chosen)})
