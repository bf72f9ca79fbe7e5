"""Published folders in and out again: bit for bit, every key accounted for, interrupted or not."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.huggingface.published import (
    COPIES,
    LLAMA,
    MIXTRAL,
    TIED,
    V3,
    V3_FP8,
    contents_of,
    publish,
    tensors_of,
    write_weights,
)
from finemoe.checkpoint.huggingface import exporting, importing
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.fp8 import dequantize
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.kinds import is_imported
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.storage import store
from finemoe.checkpoint.storage.safetensors import TensorFolder, raw_bytes
from finemoe.checkpoint.weights import imported
from finemoe.checkpoint.weights.exportable import open_exportable
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.config import to_json
from finemoe.core.errors import CheckpointError, RunError
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer

ALL = {"llama": LLAMA, "tied": TIED, "mixtral": MIXTRAL, "v3": V3, "v3_fp8": V3_FP8}


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


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


def test_a_head_that_is_stored_though_tied(tmp_path: Path) -> None:
    embedding = tensors_of(TIED)["model.embed_tokens.weight"]
    for name, head in (("same", embedding.clone()), ("other", embedding + 1)):
        source = publish(tmp_path / name, TIED, extra={"lm_head.weight": head})
        report = import_hf(source, tmp_path / f"{name}.in", quiet=True)
        export_hf(tmp_path / f"{name}.in", tmp_path / f"{name}.out", quiet=True)
        assert contents_of(tmp_path / f"{name}.out") == contents_of(source)
        assert ("lm_head.weight" in report.carried) == (name == "other")
        assert any("should equal" in note for note in report.notes) == (name == "other")


def test_promised_prediction_modules_that_are_not_there(tmp_path: Path) -> None:
    """As transformers writes DeepSeek-V3."""
    source = publish(tmp_path / "source", V3)
    kept = {key: tensor for key, tensor in tensors_of(V3).items() if not key.startswith("model.layers.2.")}
    write_weights(source, kept)
    report = import_hf(source, tmp_path / "imported", quiet=True)
    assert report.config.mtp == ()
    assert any("multi-token prediction" in note for note in report.notes)
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


def test_nothing_is_written_into_the_source_or_over_anything(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", LLAMA)
    before = listing(source)
    with pytest.raises(CheckpointError, match="lies in the source"):
        import_hf(source, source / "imported", quiet=True)
    with pytest.raises(CheckpointError, match="exists already"):
        import_hf(source, source, quiet=True)
    assert listing(source) == before
    done = import_hf(source, tmp_path / "imported", quiet=True).path
    with pytest.raises(CheckpointError, match="is complete already"):
        import_hf(source, done, quiet=True)
    with pytest.raises(CheckpointError, match="lies in the source"):
        export_hf(done, done / "exported", quiet=True)
    read_imported(done, checksums=True)


@pytest.mark.parametrize("part", ["source", "imported"])
def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    source = publish(tmp_path / "source", V3_FP8)
    convert = lambda: import_hf(source, tmp_path / "imported", quiet=True)  # noqa: E731
    if part == "imported":
        convert()
        convert = lambda: export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)  # type: ignore[assignment, return-value] # noqa: E731
    pwrite, count = os.pwrite, 0

    def limited(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count > 30:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", limited)
        with pytest.raises(RunError, match="disk is full"):
            convert()
    assert convert().resumed > 0
    if part == "source":
        export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert contents_of(tmp_path / "exported") == contents_of(source)


def work(source: Path, out: Path, counted: Path) -> None:
    """An import, or an export when `source` is an imported folder, slow enough to be killed in the middle."""
    original = store.Part.check_full

    def slow(self: store.Part) -> None:
        with counted.open("a") as file:
            file.write("x")
        time.sleep(0.003)
        original(self)

    store.Part.check_full = slow  # type: ignore[method-assign]
    (export_hf if is_imported(source) else import_hf)(source, out, quiet=True)


def converted_through_kills(source: Path, out: Path, counted: Path) -> int:
    """The number of kills that it took."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["finemoe.checkpoint.huggingface.importing", "torch._dynamo"]
    )  # the latter by any meta model
    counted.touch()
    for kills in range(50):
        before = counted.stat().st_size
        process = context.Process(target=work, args=(source, out, counted))
        process.start()
        while process.is_alive() and counted.stat().st_size < before + 40:
            time.sleep(0.001)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if out.exists():
            return kills
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("it never ends")


def test_killed_imports_and_exports_go_on(tmp_path: Path) -> None:
    source, counted = publish(tmp_path / "source", V3_FP8, shards=2), tmp_path / "counted"
    assert converted_through_kills(source, tmp_path / "imported", counted) >= 2
    read_imported(tmp_path / "imported", checksums=True)
    import_hf(source, tmp_path / "straight", quiet=True)
    assert listing(tmp_path / "imported") == listing(tmp_path / "straight")
    assert converted_through_kills(tmp_path / "imported", tmp_path / "exported", counted) >= 2
    assert contents_of(tmp_path / "exported") == contents_of(source)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, after: int) -> None:
    load, count = importing._load, 0

    def limited(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return load(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(importing, "_load", limited)
        with pytest.raises(KeyboardInterrupt):
            import_hf(source, out, quiet=True)


def test_an_interrupted_import_goes_on_only_with_the_same_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = publish(tmp_path / "source", LLAMA)
    interrupt(monkeypatch, source, tmp_path / "imported", 5)
    assert "imported.partial; give the same command again to go on" in caplog.text
    assert not (tmp_path / "imported").exists()
    with pytest.raises(CheckpointError, match="interrupted conversion of another source"):
        import_hf(publish(tmp_path / "other", LLAMA, seed=1), tmp_path / "imported", quiet=True)
    assert import_hf(source, tmp_path / "imported", quiet=True).resumed == 5
    read_imported(tmp_path / "imported", checksums=True)


def test_progress_says_how_much_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("finemoe.core.logs._PLAIN_INTERVAL", 0.0)
    with caplog.at_level(logging.INFO, logger="finemoe"):
        import_hf(publish(tmp_path / "source", LLAMA), tmp_path / "imported")
    assert "importing source: " in caplog.text
    assert "MiB" in caplog.text


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
        export_hf(tmp_path, tmp_path / "out", quiet=True)
    assert not is_imported(tmp_path)


def test_memory_is_a_slice_whatever_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slices of 4 kB the largest tensor in memory is far below the embedding's 39 kB."""
    largest = 0
    read = TensorFolder.read

    def watched(folder: TensorFolder, name: str, index: Any = ()) -> Tensor:
        nonlocal largest
        tensor = read(folder, name, index)
        largest = max(largest, tensor.nbytes)
        return tensor

    source = publish(tmp_path / "source", {**V3, "vocab_size": 144})
    chunks = TensorFolder.chunks
    monkeypatch.setattr(TensorFolder, "read", watched)
    monkeypatch.setattr(
        TensorFolder,
        "chunks",
        lambda folder, name, index=(), multiple=1: chunks(folder, name, index, max_bytes=4000, multiple=multiple),
    )
    import_hf(source, tmp_path / "imported", quiet=True)
    export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert largest <= 4000
    assert contents_of(tmp_path / "exported") == contents_of(source)
    assert imported.MANIFEST == "manifest.json"
    assert len(raw_bytes(torch.ones(2))) == 8
