"""Comparing what was written with what was read: agreement for every conversion, and every single flipped bit found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.published import LLAMA, TIED, V3, V3_FP8, publish
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import import_gguf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.proof.written import compare_export, compare_import
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.core.errors import CheckpointError
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer

CONFIGS = {"llama": LLAMA, "tied": TIED, "v3": V3, "fp8": V3_FP8}


@pytest.fixture
def imported(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    source = publish(tmp_path / "source", CONFIGS[request.param], shards=2)
    (source / "tokenizer.json").unlink()  # it splits as no GGUF tokenizer does
    import_hf(source, tmp_path / "imported", quiet=True)
    return tmp_path / "imported"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("imported", CONFIGS, indirect=True)
def test_an_import_agrees_and_every_tensor_of_the_source_counts(imported: Path) -> None:
    source = imported.parent / "source"
    opened = TensorFolder.open(source)
    found = compare_import(source, imported)
    assert (found.tensors, found.different, found.sound) == (len(opened.tensors), (), True)
    names = list(opened.tensors)
    for name in (names[0], names[len(names) // 2], names[-1]):
        info = opened.info(name)
        flip(info.path, info.offset)
        other = compare_import(source, imported)
        # A flipped factor changes the matrix that it belongs to as well; the original of a copy both.
        assert name in other.different
        assert not other.sound
        flip(info.path, info.offset)
    assert compare_import(source, imported).sound


@pytest.mark.parametrize("imported", ["v3"], indirect=True)
def test_a_changed_import_does_not_have_its_checksums(imported: Path) -> None:
    flip(imported / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="checksum"):
        compare_import(imported.parent / "source", imported)


@pytest.mark.parametrize("imported", CONFIGS, indirect=True)
@pytest.mark.parametrize("options", [{}, {"dtype": "fp32"}, {"dtype": "bf16"}, {"fp8": True}], ids=str)
def test_a_folder_agrees_with_what_it_was_exported_from(imported: Path, options: dict[str, Any]) -> None:
    out = imported.parent / "out"
    export_hf(imported, out, quiet=True, **options)
    assert compare_export(imported, out).sound
    opened = TensorFolder.open(out)
    for name in list(opened.tensors)[:: max(1, len(opened.tensors) // 4)]:
        info = opened.info(name)
        flip(info.path, info.offset + info.nbytes - 1)  # of the highest byte: a factor stays a number
        different = compare_export(imported, out).different
        assert len(different) >= 1, name
        flip(info.path, info.offset + info.nbytes - 1)


@pytest.mark.parametrize("imported", ["llama", "v3"], indirect=True)
@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_agrees_both_ways(imported: Path, dtype: str) -> None:
    out = imported.parent / "out.gguf"
    export_gguf(imported, out, dtype=dtype, quiet=True)
    assert compare_export(imported, out).sound
    again = imported.parent / "again"
    import_gguf(out, again, quiet=True)
    assert compare_import(out, again).sound
    flip(out, out.stat().st_size // 2)
    assert not compare_export(imported, out).sound
    assert not compare_import(out, again).sound


@pytest.mark.parametrize("imported", ["llama"], indirect=True)
def test_a_config_that_says_something_else_is_found(imported: Path) -> None:
    out = imported.parent / "out"
    export_hf(imported, out, quiet=True)
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 1e-4}))
    with pytest.raises(CheckpointError, match="describes another model"):
        compare_export(imported, out)


@pytest.mark.parametrize(
    "model",
    [
        {"preset": "tiny-v2"},
        {"preset": "tiny-v3"},
        {"preset": "tiny-dense", "attention": {"rope": {"scaling": {"kind": "ntk", "factor": 4}}}},
        {
            "preset": "tiny-dense",
            "attention": {
                "rope": {"scaling": {"kind": "yarn", "factor": 7, "original_max_positions": 64, "mscale": 0.7}}
            },
        },
    ],
    ids=["v2", "v3", "ntk", "yarn"],
)
def test_a_run_agrees_although_training_and_stretching_are_spelt_otherwise(tmp_path: Path, model: Any) -> None:
    config = expand(resolve({**model, "vocab_size": 300}, "test"))
    built = Transformer(config)
    initialize(built, seed=1)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    save(tmp_path / "run" / "checkpoints", 1, RunState(built.state_dict(), {}, {}, text), keep=1)
    export_hf(tmp_path / "run", tmp_path / "out", quiet=True)
    assert compare_export(tmp_path / "run", tmp_path / "out").sound
