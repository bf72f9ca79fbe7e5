"""Exports: what was imported comes out as it was, and what was trained in every type and family that holds it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.huggingface.foreign_folders import ALL, listing
from checkpoint.huggingface.published import (
    LLAMA,
    V3,
    V3_FP8,
    contents_of,
    publish,
    tensors_of,
)
from finemoe.checkpoint.huggingface import exporting
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.fp8 import dequantize
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.weights.exportable import open_exportable
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.config import to_json
from finemoe.core.errors import CheckpointError
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_round_trip_is_bit_exact(tmp_path: Path, name: str, shards: int) -> None:
    source = publish(tmp_path / "source", ALL[name], shards=shards)
    before = listing(source)
    imported = import_hf(source, tmp_path / "imported", quiet=True)
    exported = export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert listing(source) == before
    assert contents_of(tmp_path / "exported") == contents_of(source)
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == ALL[name]
    assert exported.verbatim_config
    for file in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "exported" / file).read_bytes() == before[file]
    settings = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "x"}
    assert any("tokenizer_class LlamaTokenizerFast is now" in note for note in exported.notes)
    assert imported.loaded + len(imported.carried) == len(contents_of(source))
    assert (imported.family, exported.family) == (ALL[name]["model_type"],) * 2
    assert "not taken along: README.md" in imported.notes
    assert sum(path.stat().st_size for path in (tmp_path / "exported").iterdir()) == exported.nbytes
    again = import_hf(tmp_path / "exported", tmp_path / "again", quiet=True)
    assert contents_of(tmp_path / "again") == contents_of(tmp_path / "imported")
    assert again.config == imported.config


def as_run(folder: Path, raw: dict[str, Any], change: float = 0.0) -> Path:
    """A run directory whose model has the weights of the published checkpoint, in fp32."""
    source = publish(folder / "published", raw)
    report = import_hf(source, folder / "imported", quiet=True)
    weights = {k: t.float() + change for k, t in load_file(report.path / "model.safetensors").items()}
    config = {"model": json.loads(to_json(report.config)), "data": {"sequence_length": 32}}
    for step in (1, 2):
        saved = run_state.RunState({k: t * step for k, t in weights.items()}, {}, {"step": step}, json.dumps(config))
        run_state.save(folder / "run" / "checkpoints", step, saved, keep=2)
    Tokenizer.train(["abc abd " * 9], 260).save(folder / "run" / "tokenizer.json")
    return folder / "run"


@pytest.mark.parametrize("name", ["tied", "mixtral", "v3"])
def test_a_run_is_exported_from_its_newest_checkpoint(tmp_path: Path, name: str) -> None:
    run = as_run(tmp_path, ALL[name])
    report = export_hf(run, tmp_path / "exported", quiet=True)
    out = load_file(tmp_path / "exported" / "model.safetensors")
    theirs = tensors_of(ALL[name])
    assert report.family == ALL[name]["model_type"]
    assert not report.verbatim_config
    assert out.keys() == theirs.keys()
    assert all(torch.equal(out[key], theirs[key].float() * 2) for key in theirs)
    raw = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (
        FAMILIES[name if name in FAMILIES else ALL[name]["model_type"]].to_config(raw)
        == read_imported(tmp_path / "imported").config
    )
    end = Tokenizer.load(run).end_of_text_id
    assert raw["torch_dtype"] == "float32"
    assert raw["eos_token_id"] == end
    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text()) == {"eos_token_id": end}
    settings = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["eos_token"] == "<|end_of_text|>"
    import_hf(tmp_path / "exported", tmp_path / "back", quiet=True)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = as_run(tmp_path, LLAMA)
    os.truncate(run / "checkpoints" / "step-00000002" / "model.safetensors", 1000)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        export_hf(run, tmp_path / "exported", quiet=True)
    assert "step-00000002 is damaged" in caplog.text
    theirs = tensors_of(LLAMA)
    out = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(out[key], theirs[key].float()) for key in theirs)
    single = export_hf(run / "checkpoints" / "step-00000001", tmp_path / "single", quiet=True)
    assert contents_of(single.path) == contents_of(tmp_path / "exported")
    os.truncate(run / "checkpoints" / "step-00000001" / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        export_hf(run, tmp_path / "third", quiet=True)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_types_are_converted_but_not_the_routers(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    import_hf(publish(tmp_path / "source", V3_FP8), tmp_path / "imported", quiet=True)
    report = export_hf(tmp_path / "imported", tmp_path / "exported", dtype=dtype, quiet=True)
    out, theirs = load_file(tmp_path / "exported" / "model.safetensors"), tensors_of(V3_FP8)
    assert out.keys() == {key for key in theirs if not key.endswith("_scale_inv")}
    for key, tensor in out.items():
        whole = theirs[key]
        if whole.dtype == torch.float8_e4m3fn:
            whole = dequantize(whole, theirs[f"{key}_scale_inv"])
        router = ".mlp.gate." in key
        assert torch.equal(tensor, whole if router else whole.to(torch_dtype))
    raw = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert raw == {**V3, "torch_dtype": str(torch_dtype).removeprefix("torch.")}
    assert any("came as FP8 and are written out in full" in note for note in report.notes)


def test_a_fresh_model_is_written_as_fp8(tmp_path: Path) -> None:
    import_hf(publish(tmp_path / "source", V3), tmp_path / "imported", quiet=True)
    report = export_hf(tmp_path / "imported", tmp_path / "exported", fp8=True, quiet=True)
    out, theirs = load_file(tmp_path / "exported" / "model.safetensors"), tensors_of(V3)
    assert {key for key, tensor in out.items() if tensor.dtype == torch.float8_e4m3fn} == {
        key for key, tensor in tensors_of(V3_FP8).items() if tensor.dtype == torch.float8_e4m3fn
    }
    assert (report.fp8_kept, report.fp8_new) == (0, sum(t.numel() for k, t in out.items() if k.endswith("_inv")))
    for key, tensor in theirs.items():
        if out[key].dtype == torch.float8_e4m3fn:
            back = dequantize(out[key], out[f"{key}_scale_inv"], torch.float32)
            assert (back - tensor.float()).abs().max() <= tensor.float().abs().max() / 16
        else:
            assert torch.equal(out[key], tensor)
    raw = json.loads((tmp_path / "exported" / "config.json").read_text())
    left = raw["quantization_config"].pop("modules_to_not_convert")
    assert raw == V3_FP8
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"} <= set(left)
    import_hf(tmp_path / "exported", tmp_path / "again", quiet=True)
    export_hf(tmp_path / "again", tmp_path / "twice", quiet=True)
    assert contents_of(tmp_path / "twice") == contents_of(tmp_path / "exported")


def test_trained_fp8_blocks_get_new_factors_and_the_others_keep_theirs(tmp_path: Path) -> None:
    imported = import_hf(publish(tmp_path / "source", V3_FP8), tmp_path / "imported", quiet=True).path
    weights = load_file(imported / "model.safetensors")
    name, key = "blocks.0.feed_forward.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    weights[name][139, 135] += 1.0  # in the last, ragged block
    save_file(weights, imported / "model.safetensors")
    manifest = json.loads((imported / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = (imported / "model.safetensors").stat().st_size
    (imported / "manifest.json").write_text(json.dumps(manifest))
    report = export_hf(imported, tmp_path / "exported", quiet=True)
    assert report.fp8_new == 1
    old, new = contents_of(tmp_path / "source"), contents_of(tmp_path / "exported")
    assert {k for k in old if old[k] != new[k]} == {key, f"{key}_scale_inv"}
    out = load_file(tmp_path / "exported" / "model.safetensors")
    changed = out[f"{key}_scale_inv"] != tensors_of(V3_FP8)[f"{key}_scale_inv"]
    assert changed.tolist() == [[False, False], [False, True]]


def test_powers_of_two_stay_powers_of_two(tmp_path: Path) -> None:
    raw = {**V3_FP8, "quantization_config": {**V3_FP8["quantization_config"], "scale_fmt": "ue8m0"}}
    imported = import_hf(publish(tmp_path / "source", raw), tmp_path / "imported", quiet=True).path
    assert exporting._plan(open_exportable(imported), None, None, False).power_of_two


def test_a_model_of_no_family_is_told_each_reason_once(tmp_path: Path) -> None:
    config = expand(resolve({"preset": "tiny-lite", "vocab_size": 300, "mtp_depth": 1}, "test"))
    model = Transformer(config)
    initialize(model, seed=1)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    run_state.save(tmp_path / "run" / "checkpoints", 1, run_state.RunState(model.state_dict(), {}, {}, text), keep=1)
    with pytest.raises(CheckpointError) as raised:
        export_hf(tmp_path / "run", tmp_path / "exported", quiet=True)
    told = str(raised.value)
    assert "no family computes this model. llama, mistral" in told
    assert told.count("a GGUF file leaves them out") == 1
    assert "deepseek_v3, kimi_k2: its router is softmax_topk" in told
    assert not (tmp_path / "exported").exists()


def test_another_family_that_computes_the_same(tmp_path: Path) -> None:
    import_hf(publish(tmp_path / "source", LLAMA), tmp_path / "imported", quiet=True)
    report = export_hf(tmp_path / "imported", tmp_path / "exported", family="llama", quiet=True)
    assert report.verbatim_config
    with pytest.raises(CheckpointError, match="cannot be written as mixtral"):
        export_hf(tmp_path / "imported", tmp_path / "other", family="mixtral", quiet=True)
    with pytest.raises(CheckpointError, match=r"family 'lama' is not supported, did you mean `llama`\?"):
        export_hf(tmp_path / "imported", tmp_path / "other", family="lama", quiet=True)
    with pytest.raises(CheckpointError, match="dtype 'bf61' is not written, did you mean `bf16`"):
        export_hf(tmp_path / "imported", tmp_path / "other", dtype="bf61", quiet=True)
    assert not (tmp_path / "other").exists()


def test_values_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    large = torch.full((24, 16), 1e30, dtype=torch.bfloat16)
    source = publish(tmp_path / "source", LLAMA, extra={"lm_head.weight": large})
    import_hf(source, tmp_path / "imported", quiet=True)
    with pytest.raises(CheckpointError, match=r"head\.weight as torch\.float16: 384 elements are NaN or infinite"):
        export_hf(tmp_path / "imported", tmp_path / "exported", dtype="fp16", quiet=True)
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "exported.partial").exists()
