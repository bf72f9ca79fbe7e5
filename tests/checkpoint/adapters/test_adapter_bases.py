"""An adapter goes into the model that it tuned and no other, and takes along how the tuned model speaks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.adapters.tuned_runs import base_of, select, tune
from finemoe.checkpoint.adapters.files import export_adapter, merge
from finemoe.checkpoint.open import load_chat_template, load_model, load_tokenizer
from finemoe.core.errors import CheckpointError
from finemoe.runs.run import train
from methods.tiny_talks import adapting, write_pairs

TALK = [{"role": "user", "content": "ant bee?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def selection(folder: Path) -> str:
    return select(folder / "selection.json", load_model(base_of(folder, "v3")).config)


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    return tune(folder, "v3", "lora", kind="lora", rank=2)


@pytest.fixture(scope="module")
def esft(folder: Path, selection: str) -> Path:
    """Of the same base: its routers and embeddings, and other experts."""
    return tune(folder, "v3", "esft", kind="experts", selection=selection)


@pytest.mark.parametrize("kind", ["lora", "experts"])
def test_the_template_that_a_run_learnt_goes_with_its_adapter(
    kind: str, folder: Path, selection: str, tmp_path: Path
) -> None:
    base, chosen = base_of(folder, "v3"), {"selection": selection} if kind == "experts" else {}
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    raw = adapting(base, pairs, {"kind": "sft"}, trainable={"kind": kind, **chosen}, training={"steps": 2})
    run = train(raw, out=tmp_path / "run", quiet=True).directory
    learnt = load_chat_template(run)
    assert learnt is not None
    assert load_chat_template(base) is None
    (run / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    export_adapter(run, tmp_path / "adapter")
    assert (tmp_path / "adapter/chat_template.jinja").read_bytes() == (run / "chat_template.jinja").read_bytes()
    assert not (tmp_path / "adapter/tokenizer.json").exists()
    merge(base, tmp_path / "adapter", tmp_path / "merged", quiet=True)
    merged = load_chat_template(tmp_path / "merged")
    assert merged is not None
    assert merged.render(TALK, True) == learnt.render(TALK, True)
    assert load_tokenizer(tmp_path / "merged").stop_ids == load_tokenizer(run).stop_ids >= {7, 9}


def test_a_damaged_companion_is_left_out_and_told(
    folder: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_adapter(lora, tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_bytes(b"\x00\x01")
    merge(base_of(folder, "v3"), tmp_path / "adapter", tmp_path / "merged", quiet=True)
    assert not (tmp_path / "merged/chat_template.jinja").exists()
    assert "its chat template is lost" in caplog.text


@pytest.mark.parametrize("name", ["lora", "esft"])
def test_a_model_of_the_same_routers_and_embeddings_is_refused(
    name: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of the two runs is what the other one is not made for."""
    other = {"lora": "esft", "esft": "lora"}[name]
    export_adapter(request.getfixturevalue(name), tmp_path / "adapter")
    model = request.getfixturevalue(other)
    caplog.clear()
    with pytest.raises(CheckpointError, match="has the right shape and other weights"):
        merge(model, tmp_path / "adapter", tmp_path / "merged", quiet=True)
    assert not (tmp_path / "merged").exists()
    assert caplog.text == ""


def test_an_adapter_that_says_less_is_merged_with_a_warning(
    folder: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One made before all weights were told, and one of PEFT."""
    export_adapter(lora, tmp_path / "adapter")
    about = tmp_path / "adapter/finemoe.json"
    table: dict[str, Any] = json.loads(about.read_text())
    del table["base"]["weights_sha256"]
    about.write_text(json.dumps(table))
    merge(base_of(folder, "v3"), tmp_path / "adapter", tmp_path / "one", quiet=True)
    assert "does not say all weights of the model that it tuned" in caplog.text
    about.unlink()
    merge(base_of(folder, "v3"), tmp_path / "adapter", tmp_path / "other", quiet=True)
    assert "does not say which model it tuned" in caplog.text


@pytest.mark.parametrize("trainable", ["lora", "experts"])
def test_a_start_that_has_changed_is_told_when_the_adapter_is_written(
    trainable: str, folder: Path, selection: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = {"selection": selection} if trainable == "experts" else {"targets": ["attention"]}
    run = tune(folder, "v3", f"moved-{trainable}", kind=trainable, **chosen)
    for file in [run / "config.json", *run.glob("checkpoints/*/config.json")]:
        table = json.loads(file.read_text())
        table["start_from"] = str(folder / "elsewhere")
        file.write_text(json.dumps(table))
    for file in run.glob("checkpoints/*/manifest.json"):  # its sums are not what is tested
        table = json.loads(file.read_text())
        held = (file.parent / "config.json").read_bytes()
        table["files"]["config.json"] = {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}
        file.write_text(json.dumps(table))
    export_adapter(run, tmp_path / "adapter")
    assert "does not hold the model any more" in caplog.text
    about = tmp_path / "adapter" / ("delta.json" if trainable == "experts" else "finemoe.json")
    assert json.loads(about.read_text())["base"]["weights_sha256"] is None
