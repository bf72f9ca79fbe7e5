"""The size of what has no weights: a configuration alone, its path, the header of a GGUF file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from checkpoint.gguf.gguf_files import MODELS, import_folder, random_model
from checkpoint.huggingface.published import LLAMA, V3_FP8, publish
from checkpoint.huggingface.released_configs import RELEASED
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import open_gguf
from finemoe.checkpoint.kinds import CONFIG
from finemoe.checkpoint.open import read_model_config
from finemoe.core.errors import CheckpointError, FinemoeError
from finemoe.model.config import expand
from finemoe.model.presets import resolve
from finemoe.model.size import measure
from finemoe.runs.planning.sizing import size


def test_a_config_json_is_enough(tmp_path: Path) -> None:
    raw = RELEASED["deepseek-v3"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = size(tmp_path)
    assert found.total_parameters == 671_026_419_200
    assert size(tmp_path / "config.json") == found
    other = tmp_path / "deepseek_v3.json"  # under any name, as from a browser
    other.write_text(json.dumps(raw))
    assert size(other) == found


def test_weights_that_are_damaged_do_not_stop_a_size(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("finemoe"), "propagate", True)
    folder = publish(tmp_path / "there", V3_FP8)
    whole = size(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert not caplog.records
    assert size(folder) == whole
    assert caplog.messages[0].startswith(str(weights)), "they might have said otherwise"
    assert caplog.messages[0].endswith("what follows is of the config.json alone")
    weights.unlink()
    assert size(folder) == whole
    assert len(caplog.records) == 1, "a config.json that was fetched alone is no reason for a word"
    (folder / "model.safetensors.index.json").write_text("{")
    assert size(folder / CONFIG) == whole


def test_of_mistral_as_its_model_card_has_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["mistral-7b-instruct-v0.3"]))
    assert size(tmp_path).total_parameters == 7_248_023_552


@pytest.mark.parametrize("name", ["nomt.json", "config.json"])
def test_a_foreign_configuration_without_a_model_type_is_told_which_to_write(tmp_path: Path, name: str) -> None:
    raw = {key: value for key, value in RELEASED["deepseek-v3"].items() if key != "model_type"}
    (tmp_path / name).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=rf'{name}: .*no `model_type`.* set `"model_type": "deepseek_v3"`'):
        size(tmp_path / name)
    del raw["architectures"]
    (tmp_path / name).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=rf"{name}: .*no `model_type`.* set it to one of llama, "):
        size(tmp_path / name)


def test_of_a_gguf_file_the_header_is_enough(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "whole.gguf"
    export_gguf(import_folder(tmp_path / "from", random_model(MODELS["llama-3"])), path, dtype="F32", quiet=True)
    whole = size(path)
    assert whole == measure(read_model_config(path), 512)
    first = min(tensor.offset for tensor in open_gguf(path).tensors.values())
    header = tmp_path / "header.gguf"
    header.write_bytes(path.read_bytes()[:first])
    assert size(header) == whole
    with pytest.raises(FinemoeError, match="truncated"):
        read_model_config(header)
    header.write_bytes(path.read_bytes()[: first // 2])
    with pytest.raises(FinemoeError, match="within its header"):
        size(header)


def test_a_configuration_and_a_preset_too_large_for_any_machine() -> None:
    config = expand(resolve({"preset": "deepseek-v3", "num_layers": 4000}, "here"))
    assert size(config).total_parameters > 40e12
    assert size("deepseek-v3").total_parameters == 671_026_419_200


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", json.dumps({**LLAMA, "model_type": "mamba"}), "mamba"),
        ("config.json", json.dumps({"weight_map": {}}), r"no \[model\] table"),
        ("weights.safetensors", "", "config.json"),
        ("nothing.json", None, "no such file"),
        ("nothing.gguf", None, "no such file"),
        ("nothing", None, "neither a recipe"),
    ],
)
def test_what_describes_no_model_is_refused(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FinemoeError, match=says):
        size(tmp_path / name)
