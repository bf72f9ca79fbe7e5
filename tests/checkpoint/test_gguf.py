"""GGUF files out and in again: weights, tokenizer, template, shards, older layouts, interruptions."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoint.gguf_files import (
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
from finemoe.checkpoint.gguf import exporting
from finemoe.checkpoint.gguf.codec import element_types
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import import_gguf, load_gguf, open_gguf
from finemoe.checkpoint.storage import store
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.errors import CheckpointError, ConfigError, DataError
from finemoe.model.transformer import Transformer

gguf = pytest.importorskip("gguf")


def exported(folder: Path, model: Transformer, dtype: str = "F32", **options: Any) -> Path:
    out = folder / f"{dtype}.gguf"
    export_gguf(import_folder(folder / f"from-{dtype}", model, **options), out, dtype=dtype, quiet=True)
    return out


def state_of(model: Transformer) -> dict[str, Tensor]:
    return dict(model.state_dict())


def stored(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors as the `gguf` package reads them."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in reader.tensors}


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


def test_queries_and_keys_are_interleaved_as_llama_cpp_rotates_them(tmp_path: Path) -> None:
    model = random_model(MODELS["llama-tied-bias"])
    tensors = stored(exported(tmp_path, model))
    ours = state_of(model)
    for letter, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            plain = ours[f"blocks.1.attention.{letter}_proj.{kind}"].numpy().reshape(heads, 24, -1)
            found = tensors[f"blk.1.attn_{letter}.{kind}"].reshape(heads, 24, -1)
            for pair in range(12):  # components pair and pair + 12 of a head turn together
                np.testing.assert_array_equal(found[:, 2 * pair], plain[:, pair])
                np.testing.assert_array_equal(found[:, 2 * pair + 1], plain[:, pair + 12])
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], ours["blocks.1.attention.v_proj.weight"].numpy())


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("qwen", "olmoe"))])
def test_where_halves_turn_queries_and_keys_are_as_they_are(tmp_path: Path, name: str) -> None:
    model = random_model(MODELS[name])
    tensors, ours = stored(exported(tmp_path, model)), state_of(model)
    for letter in "qkv":
        theirs = tensors[f"blk.1.attn_{letter}.weight"]
        np.testing.assert_array_equal(theirs, ours[f"blocks.1.attention.{letter}_proj.weight"].numpy())


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    """As the `gguf` package lists them: the tensors of the architecture, and keys that exist at all."""
    path = exported(tmp_path, random_model(MODELS[name]))
    architecture = open_gguf(path).architecture
    (kind,) = (arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    names = {re.sub(r"blk\.\d+\.", "blk.{bid}.", stored).removesuffix(".weight") for stored in open_gguf(path).tensors}
    assert {stored.removesuffix(".bias") for stored in names} <= known
    groups = (vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type))
    keys = {key.replace("{arch}", architecture) for group in groups for key in group if isinstance(key, str)}
    written = {key for key in open_gguf(path).metadata if key.startswith(f"{architecture}.")}
    assert written <= keys


def test_the_up_projection_of_latents_is_split_and_its_keys_transposed(tmp_path: Path) -> None:
    model = random_model(MODELS["deepseek2-v3"])
    tensors = stored(exported(tmp_path, model))
    up = state_of(model)["blocks.2.attention.kv_up_proj.weight"].numpy().reshape(4, 32 + 16, 64)
    np.testing.assert_array_equal(tensors["blk.2.attn_k_b.weight"], up[:, :32].transpose(0, 2, 1))
    np.testing.assert_array_equal(tensors["blk.2.attn_v_b.weight"], up[:, 32:])


def test_experts_are_stacked_in_tensors_of_their_own(tmp_path: Path) -> None:
    model = random_model(MODELS["deepseek2-v3"])
    tensors = stored(exported(tmp_path, model))
    gate_up = state_of(model)["blocks.1.feed_forward.experts.gate_up_proj"].numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate_exps.weight"], gate_up[:, :32])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"], gate_up[:, 32:])
    bias = state_of(model)["blocks.1.feed_forward.router.selection_bias"].numpy()
    np.testing.assert_array_equal(tensors["blk.1.exp_probs_b.bias"], bias)


def rewritten(
    path: Path,
    out: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """The same file with other tensors and some other metadata (None removes), by the `gguf` package alone."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents(), **options)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or metadata.get(key, 0) is None:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, metadata.get(key, field.contents()), field.types[0], sub)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("both", [False, True])
def test_the_older_layout_of_latent_attention_is_read(tmp_path: Path, both: bool) -> None:
    model = random_model(MODELS["deepseek2-v2"])
    path = exported(tmp_path, model)
    tensors = stored(path)
    for layer in range(3):
        key, value = (tensors[f"blk.{layer}.attn_{name}_b.weight"] for name in ("k", "v"))
        tensors[f"blk.{layer}.attn_kv_b.weight"] = np.concatenate((key.transpose(0, 2, 1), value), 1).reshape(-1, 64)
        if not both:
            del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
    older = {
        "deepseek2.attention.key_length": 40,
        "deepseek2.attention.value_length": 16,
        "deepseek2.attention.head_count_kv": 4,
        "deepseek2.attention.key_length_mla": None,
        "deepseek2.attention.value_length_mla": None,
        "deepseek2.expert_gating_func": None,
    }
    source = open_gguf(rewritten(path, tmp_path / "older.gguf", older, tensors))
    assert source.config == model.config
    assert len(source.dropped) == (6 if both else 0)
    back = state_of(load_gguf(source.path))
    assert all(torch.equal(back[name], tensor) for name, tensor in state_of(model).items())


def test_fused_experts_and_left_out_biases_are_read(tmp_path: Path) -> None:
    model = random_model(MODELS["deepseek2-v3"])
    path = exported(tmp_path, model)
    tensors = stored(path)
    for layer in (1, 2):
        gate, up = (tensors.pop(f"blk.{layer}.ffn_{name}_exps.weight") for name in ("gate", "up"))
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate((gate, up), axis=1)
        del tensors[f"blk.{layer}.exp_probs_b.bias"]
    out = rewritten(path, tmp_path / "fused.gguf", {}, tensors)
    back = state_of(load_gguf(out))
    for name, tensor in state_of(model).items():
        expected = torch.zeros_like(tensor) if name.endswith("selection_bias") else tensor
        assert torch.equal(back[name], expected), name
    import_gguf(out, tmp_path / "imported", quiet=True)
    imported = read_imported(tmp_path / "imported", checksums=True)
    assert not imported.tensors.read("blocks.1.feed_forward.router.selection_bias").any()


def random_blocks(kind: Any, rows: int, blocks: int) -> np.ndarray:
    """Bytes of a type that dequantise to finite numbers."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    generator = np.random.default_rng(int(kind))
    data = generator.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        for _ in range(20):
            values = gguf.dequantize(data, kind)
            bad = ~np.isfinite(values).all(axis=1) | (np.abs(values).max(axis=1) > 1e6)
            data[bad] = generator.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)
    assert not bad.any()
    return data.reshape(rows, blocks * size)


READABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def test_quantised_tensors_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    dense = {"kind": "dense", "ffn_hidden_size": 256}
    model = random_model({**recipe(QUERIES, dense), "hidden_size": 64, "num_layers": len(READABLE)})
    blocks, kinds = {}, {}
    for layer, kind in enumerate(READABLE):
        name, number = f"blk.{layer}.ffn_down.weight", gguf.GGMLQuantizationType[kind]
        blocks[name] = random_blocks(number, 64, 256 // gguf.GGML_QUANT_SIZES[number][0])
        kinds[name] = number
    path = exported(tmp_path, model)
    out = rewritten(path, tmp_path / "mixed.gguf", {}, {**stored(path), **blocks}, kinds)
    back = state_of(load_gguf(out))
    report = import_gguf(out, tmp_path / "imported", quiet=True)
    assert report.dequantized == len(READABLE)
    imported = TensorFolder.open(tmp_path / "imported")
    for layer, kind in enumerate(READABLE):
        ours, name = f"blocks.{layer}.feed_forward.down_proj.weight", f"blk.{layer}.ffn_down.weight"
        np.testing.assert_array_equal(back[ours].numpy(), gguf.dequantize(blocks[name], kinds[name]), kind)
        assert torch.equal(imported.read(ours), back[ours])
        assert back[ours].abs().max() > 0


def test_every_type_is_readable_or_refused_by_name() -> None:
    kinds = {kind.name: kind for kind in element_types().values()}
    assert {"F32", "F16", "BF16", *READABLE} <= {name for name, kind in kinds.items() if kind.readable}
    assert not kinds["I32"].readable


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
    assert not list(out.parent.iterdir())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, out, dtype="F32", quiet=True)
    assert not list(out.parent.iterdir())
    monkeypatch.undo()
    export_gguf(source, out, dtype="F32", quiet=True)
    assert [file.name for file in out.parent.iterdir()] == ["model.gguf"]
    with pytest.raises(CheckpointError, match="exists already"):
        export_gguf(source, out, dtype="F32", quiet=True)


def test_impossible_exports_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = import_folder(tmp_path / "source", random_model(MODELS["llama"]))
    for out, dtype, words in (
        (tmp_path / "x.gguf", "Q4_K", "'Q4_K' is not written"),
        (source / "x.gguf", "F16", "lies in the source"),
    ):
        with pytest.raises(CheckpointError, match=words):
            export_gguf(source, out, dtype=dtype, quiet=True)
        assert not out.exists()


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
