"""GGUF files out and in again: weights, tokenizer, template, shards, interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.gguf.gguf_files import (
    LATENT,
    MODELS,
    QUERIES,
    TEMPLATE,
    companions,
    import_folder,
    moe,
    random_model,
    recipe,
    small_tokenizer,
)
from checkpoint.gguf.written import exported, rewritten, state_of, stored
from finemoe.checkpoint.gguf import exporting
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import import_gguf, load_gguf, open_gguf
from finemoe.checkpoint.storage import store
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.errors import CheckpointError, ConfigError, DataError

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", MODELS)
def test_a_float32_file_gives_back_the_model_exactly(tmp_path: Path, name: str) -> None:
    model = random_model(MODELS[name])
    path = exported(tmp_path, model)
    back = load_gguf(path)
    assert back.config == model.config
    assert not back.training
    for key, tensor in state_of(model).items():
        assert torch.equal(back.state_dict()[key], tensor), key


ROUNDING = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11, "Q4_0": 1 / 8 + 2**-11}  # scales are F16 themselves
"""Largest error, of the largest value in a block."""


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["llama", "deepseek", "deepseek2-v3"])
def test_a_rounded_file_is_as_near_as_its_type_allows(tmp_path: Path, name: str, dtype: str) -> None:
    model = random_model(MODELS[name])
    path = exported(tmp_path, model, dtype)
    back = state_of(load_gguf(path))
    changed = 0
    for key, tensor in state_of(model).items():
        if tensor.dim() == 1 or ".router." in key:
            assert torch.equal(back[key], tensor), key
        else:
            assert (back[key] - tensor).abs().max() <= ROUNDING[dtype] * tensor.abs().max() * 1.01, key
            changed += not torch.equal(back[key], tensor)
    assert changed > 10
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == ("Q8_0" if dtype == "Q4_0" else dtype)
    assert kinds["blk.1.attn_output.weight"] == dtype


def test_rows_that_are_no_whole_blocks_fall_back_with_a_note(tmp_path: Path) -> None:
    attention = {**LATENT, "qk_nope_head_dim": 12}
    source = import_folder(
        tmp_path / "source", random_model(recipe(attention, {"kind": "dense", "ffn_hidden_size": 90}))
    )
    report = export_gguf(source, tmp_path / "out.gguf", dtype="Q8_0", quiet=True)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_k_b.weight"] == kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("6 tensors have rows that are no multiple of 32 and are F16" in note for note in report.notes)
    assert report.kinds["F16"] == 6


def test_element_types_of_an_import_follow_one_rule(tmp_path: Path) -> None:
    model = random_model(MODELS["llama"])
    for dtype, expected in {"F16": "F16", "BF16": "BF16", "Q8_0": "F32", "F32": "F32"}.items():
        out = tmp_path / f"imported-{dtype}"
        import_gguf(exported(tmp_path, model, dtype), out, quiet=True)
        imported = read_imported(out, checksums=True)
        names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        assert imported.tensors.info("blocks.0.attention.q_proj.weight").dtype == names[expected]
        assert imported.tensors.info("blocks.0.attention_norm.weight").dtype == torch.float32


@pytest.mark.parametrize("name", ["llama-tied-bias", "deepseek2-v3"])
def test_a_file_comes_out_of_its_import_as_it_went_in(tmp_path: Path, name: str) -> None:
    first = exported(tmp_path, random_model(MODELS[name]))
    before = hashlib.sha256(first.read_bytes()).hexdigest()
    report = import_gguf(first, tmp_path / "from-F32-again" / "from-F32", quiet=True)
    again = tmp_path / "again.gguf"
    export_gguf(report.path, again, dtype="F32", quiet=True)
    assert again.read_bytes() == first.read_bytes()
    assert hashlib.sha256(first.read_bytes()).hexdigest() == before
    imported = read_imported(report.path, checksums=True)
    assert (imported.family, imported.format) == (open_gguf(first).architecture, "gguf")
    record = imported.source()
    assert record["config"]["general.architecture"] == imported.family
    assert {entry["status"] for entry in record["tensors"].values()} == {"loaded"}
    assert set(record["tensors"]) == set(open_gguf(first).tensors)
    norm = record["tensors"]["output_norm.weight"]
    raw = state_of(load_gguf(first))["norm.weight"].numpy().tobytes()
    assert norm == {"status": "loaded", "dtype": "F32", "shape": [64], "sha256": hashlib.sha256(raw).hexdigest()}


def test_tokenizer_and_template_travel_with_the_file(tmp_path: Path) -> None:
    path = exported(tmp_path, random_model(MODELS["llama"]))
    source = open_gguf(path)
    tokenizer, original = source.tokenizer(), small_tokenizer()
    sample = "in the a\tcan of 3 cans 床\n"
    assert tokenizer.encode(sample) == original.encode(sample)
    assert tokenizer.encode_prompt("a") == original.encode_prompt("a")
    assert tokenizer.encode_prompt("a")[0] == 0
    assert tokenizer.stop_ids == {1}
    template = source.chat_template()
    assert template is not None
    assert template.render([{"role": "user", "content": "hello"}]) == "<s>hello</s>"
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 288
    import_gguf(path, tmp_path / "imported", quiet=True)
    files = {file.name for file in (tmp_path / "imported").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= files
    assert (tmp_path / "imported" / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tmp_path / "imported" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_model_without_tokenizer_is_written_for_token_ids(tmp_path: Path) -> None:
    path = exported(tmp_path, random_model(MODELS["llama"]), files={})
    assert open_gguf(path).metadata["tokenizer.ggml.model"] == "none"
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_gguf(path).tokenizer()
    report = import_gguf(path, tmp_path / "imported", quiet=True)
    assert any("holds no tokenizer" in note for note in report.notes)


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    facts = json.loads(companions()["tokenizer.json"])
    facts["normalizer"] = {"type": "Lowercase"}
    files = {**companions(), "tokenizer.json": json.dumps(facts).encode()}
    source = import_folder(tmp_path / "source", random_model(MODELS["llama"]), files)
    with pytest.raises(DataError, match="Lowercase"):
        export_gguf(source, tmp_path / "out" / "model.gguf", quiet=True)
    assert not (tmp_path / "out").exists()


def test_shards_are_read_from_the_first(tmp_path: Path) -> None:
    model = random_model(MODELS["llama"])
    path = exported(tmp_path, model)
    rewritten(path, tmp_path / "model.gguf", {}, stored(path), split_max_tensors=8)
    shards = sorted(tmp_path.glob("model-*.gguf"))
    assert len(shards) == 4
    assert len(open_gguf(shards[0]).files) == 4
    back = state_of(load_gguf(shards[0]))
    assert all(torch.equal(back[name], tensor) for name, tensor in state_of(model).items())
    with pytest.raises(CheckpointError, match="give the first"):
        open_gguf(shards[1])
    shards[2].unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00004\.gguf: no such file"):
        open_gguf(shards[0])


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(tmp_path, random_model(MODELS["deepseek"]))
    written: list[str] = []
    original = store.TensorStore.write

    def interrupted(self: store.TensorStore, name: str, *rest: Any, **facts: Any) -> None:
        if len(written) == 25:
            raise KeyboardInterrupt
        written.append(name)
        original(self, name, *rest, **facts)

    monkeypatch.setattr(store.TensorStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, tmp_path / "imported", quiet=True)
    assert not (tmp_path / "imported").exists()
    monkeypatch.undo()
    report = import_gguf(path, tmp_path / "imported", quiet=True)
    assert report.resumed > 3
    import_gguf(path, tmp_path / "at-once", quiet=True)
    for name in ("model.safetensors", "source.json", "manifest.json"):
        assert (tmp_path / "imported" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()


def test_an_export_leaves_nothing_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(MODELS["llama"])
    state_of(model)["blocks.2.attention.o_proj.weight"][3, 5] = 1e6
    source = import_folder(tmp_path / "source", model)
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(CheckpointError, match=r"blk\.2\.attn_output.*1e\+06.*F16 cannot hold"):
        export_gguf(source, out, dtype="F16", quiet=True)
    assert not out.parent.exists()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, out, dtype="F32", quiet=True)
    assert [file.name for file in out.parent.iterdir()] == ["model.gguf.partial"]
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="with other options"):
        export_gguf(source, out, dtype="BF16", quiet=True)
    export_gguf(source, out, dtype="F32", quiet=True)
    assert [file.name for file in out.parent.iterdir()] == ["model.gguf"]
    with pytest.raises(CheckpointError, match="exists already"):
        export_gguf(source, out, dtype="F32", quiet=True)


@pytest.mark.parametrize("cut", [None, "end", "header", "line", "damaged line", "too many", "another end"])
def test_an_interrupted_export_goes_on_after_what_was_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str | None
) -> None:
    source = import_folder(tmp_path / "source", random_model(MODELS["llama"]))
    straight, out = tmp_path / "straight.gguf", tmp_path / "model.gguf"
    export_gguf(source, straight, dtype="F32", quiet=True)
    monkeypatch.setattr(exporting, "_SYNC_BYTES", 2000)
    write, written = exporting._write, 0

    def counted(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 12:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(exporting, "_write", counted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, out, dtype="F32", quiet=True)
    partial, journal = tmp_path / "model.gguf.partial" / "model.gguf", tmp_path / "model.gguf.partial" / ".written"
    if cut == "end":  # a power cut took what was not synced
        with partial.open("r+b") as file:
            file.truncate(int(journal.read_text().split()[-1]))
    elif cut == "header":
        partial.write_bytes(b"x" + partial.read_bytes()[1:])
    elif cut == "line":
        journal.write_text(journal.read_text() + "11 99")
    elif cut == "damaged line":
        journal.write_bytes(journal.read_bytes() + b"1\x00 \xff9\n")
    elif cut == "too many":  # another number than was written
        journal.write_text(re.sub(r"^\d+", "99", journal.read_text(), flags=re.MULTILINE))
    elif cut == "another end":
        journal.write_text("1 64\n")
    written = 100
    export_gguf(source, out, dtype="F32", quiet=True)
    assert out.read_bytes() == straight.read_bytes()
    again = written - 100
    monkeypatch.undo()
    tensors = len(open_gguf(out).tensors)
    assert again == tensors if cut in ("header", "too many", "another end") else 0 < again < tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source", "straight.gguf"]


def test_impossible_exports_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = import_folder(tmp_path / "source", random_model(MODELS["llama"]))
    for out, dtype, words in (
        (tmp_path / "x.gguf", "Q4_K", "'Q4_K' is not written"),
        (source / "x.gguf", "F16", "lies in the source"),
    ):
        with pytest.raises(CheckpointError, match=words):
            export_gguf(source, out, dtype=dtype, quiet=True)
        assert not out.exists()


def test_a_folder_whose_name_is_no_utf8_gives_its_file_a_name(tmp_path: Path) -> None:
    source = import_folder(tmp_path / os.fsdecode(b"caf\xe9"), random_model(MODELS["llama"]))
    export_gguf(source, tmp_path / "out.gguf", dtype="F32", quiet=True)
    assert open_gguf(tmp_path / "out.gguf").metadata["general.name"] == "caf\\udce9"


def test_mtp_modules_are_left_out_with_a_note(tmp_path: Path) -> None:
    model = random_model({**MODELS["deepseek2-v3"], "mtp_depth": 1})
    source = import_folder(tmp_path / "source", model)
    report = export_gguf(source, tmp_path / "out.gguf", dtype="F32", quiet=True)
    assert any("prediction modules are left out" in note for note in report.notes)
    back = load_gguf(tmp_path / "out.gguf")
    assert back.config == model.config.model_copy(update={"mtp": ()})
    assert all(torch.equal(tensor, state_of(model)[name]) for name, tensor in state_of(back).items())


def test_an_interleaved_model_comes_back_half_split_and_computes_the_same(tmp_path: Path) -> None:
    model = random_model(recipe({**QUERIES, "rope": {"layout": "interleaved"}}, moe({"kind": "softmax_topk"})))
    back = load_gguf(exported(tmp_path, model))
    assert back.config.blocks[0].attention.rope.layout == "half_split"
    tokens = torch.randint(0, 288, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).hidden, model(tokens).hidden, rtol=1e-4, atol=1e-5)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"finemoe\[gguf\]"):
        open_gguf(tmp_path / "x.gguf")
