"""Imports: every tensor in its place or accounted for, damage found out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.huggingface.foreign_folders import ALL
from checkpoint.huggingface.published import (
    COPIES,
    LLAMA,
    MIXTRAL,
    V3,
    contents_of,
    publish,
    tensors_of,
    write_weights,
)
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.fp8 import dequantize
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.kinds import is_imported
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.errors import CheckpointError
from finemoe.model.transformer import Transformer


@pytest.mark.parametrize("name", ALL)
def test_the_imported_folder_holds_our_model(tmp_path: Path, name: str) -> None:
    source = publish(tmp_path / "source", ALL[name], shards=2)
    report = import_hf(source, tmp_path / "imported", quiet=True)
    opened = read_imported(tmp_path / "imported", checksums=True)
    assert is_imported(tmp_path / "imported")
    assert opened.config == report.config == FAMILIES[ALL[name]["model_type"]].to_config(ALL[name])
    assert (opened.family, opened.format) == (ALL[name]["model_type"], "huggingface")
    weights = load_file(tmp_path / "imported" / "model.safetensors")
    Transformer(opened.config).load_state_dict(weights, strict=True)
    theirs = tensors_of(ALL[name])
    assert torch.equal(weights["embedding.weight"], theirs["model.embed_tokens.weight"])
    if name == "mixtral":
        stacked = weights["blocks.1.feed_forward.experts.gate_up_proj"]
        for expert in range(3):
            one = f"model.layers.1.block_sparse_moe.experts.{expert}"
            assert torch.equal(stacked[expert], torch.cat([theirs[f"{one}.w1.weight"], theirs[f"{one}.w3.weight"]]))
            down = weights["blocks.1.feed_forward.experts.down_proj"][expert]
            assert torch.equal(down, theirs[f"{one}.w2.weight"])
    if name == "v3_fp8":
        key = "model.layers.0.mlp.up_proj.weight"
        wanted = dequantize(theirs[key], theirs[f"{key}_scale_inv"])
        assert torch.equal(weights["blocks.0.feed_forward.up_proj.weight"], wanted)
        assert weights["blocks.1.feed_forward.router.selection_bias"].dtype == torch.float32
        assert report.dequantized == sum(tensor.dtype == torch.float8_e4m3fn for tensor in theirs.values()) > 0
    files = {path.name for path in (tmp_path / "imported").iterdir()}
    assert files == {*json.loads((tmp_path / "imported" / "manifest.json").read_text())["files"], "manifest.json"}
    assert sum(path.stat().st_size for path in (tmp_path / "imported").iterdir()) == report.nbytes


@pytest.mark.parametrize("name", ["llama", "v3_fp8"])
def test_the_record_accounts_for_every_tensor(tmp_path: Path, name: str) -> None:
    raw = ALL[name]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)} if name == "llama" else {}
    source = publish(tmp_path / "source", raw, extra=extra)
    report = import_hf(source, tmp_path / "imported", quiet=True)
    record = read_imported(tmp_path / "imported").source()
    assert record["config"] == raw
    theirs = contents_of(source)
    assert record["tensors"].keys() == theirs.keys()
    for key, (_, shape, content) in theirs.items():
        entry = record["tensors"][key]
        assert (entry["shape"], entry["sha256"]) == (list(shape), hashlib.sha256(content).hexdigest())
        carried = "inv_freq" in key or key.endswith("_scale_inv")
        assert entry["status"] == ("carried" if carried else "loaded")
        assert bool(entry.get("reason")) == carried == (key in report.carried)
        assert ("copy_of" in entry) == (key.endswith(COPIES) and "layers" in key)
    export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert contents_of(tmp_path / "exported") == theirs


def test_promised_prediction_modules_that_are_not_there(tmp_path: Path) -> None:
    """As transformers writes DeepSeek-V3."""
    source = publish(tmp_path / "source", V3)
    kept = {key: tensor for key, tensor in tensors_of(V3).items() if not key.startswith("model.layers.2.")}
    write_weights(source, kept)
    report = import_hf(source, tmp_path / "imported", quiet=True)
    assert report.config.mtp == ()
    assert any("multi-token prediction" in warning for warning in report.warnings)
    exported = export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert exported.verbatim_config
    assert contents_of(tmp_path / "exported") == contents_of(source)


def test_experts_of_several_types_share_the_one_that_holds_all(tmp_path: Path) -> None:
    key = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    odd = torch.randn(tensors_of(MIXTRAL)[key].shape)
    source = publish(tmp_path / "source", MIXTRAL, extra={key: odd})
    report = import_hf(source, tmp_path / "imported", quiet=True)
    assert any("down_proj: its parts have several element types; kept as F32" in note for note in report.notes)
    stacked = load_file(tmp_path / "imported" / "model.safetensors")["blocks.1.feed_forward.experts.down_proj"]
    assert torch.equal(stacked[1], odd)
    export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert contents_of(tmp_path / "exported") == contents_of(source)


@pytest.mark.parametrize("change", ["size", "content", "gone", "link"])
def test_a_damaged_import_is_found_out(tmp_path: Path, change: str) -> None:
    out = import_hf(publish(tmp_path / "source", LLAMA), tmp_path / "imported", quiet=True).path
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    if change == "size":
        path.write_bytes(content[:-1])
    if change == "content":
        content[-1] ^= 1
        path.write_bytes(content)
    if change in ("gone", "link"):
        path.rename(tmp_path / "elsewhere")
    if change == "link":
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_imported(out, checksums=change == "content")


def test_what_is_no_finished_import_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        read_imported(tmp_path)
    with pytest.raises(CheckpointError, match="neither an imported folder nor a run"):
        export_hf(tmp_path, tmp_path.parent / "out-of-nothing", quiet=True)
    assert not is_imported(tmp_path)
