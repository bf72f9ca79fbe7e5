"""Malformed and hostile checkpoints: a plain sentence each, and nothing is written."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.huggingface.published import LLAMA, MIXTRAL, V3_FP8, publish, tensors_of, write_weights
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.core.errors import CheckpointError, FinemoeError

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
SCALED = "model.layers.0.mlp.up_proj.weight"


def edit(folder: Path, name: str, **changes: Any) -> None:
    table = json.loads((folder / name).read_text())
    table.update(changes)
    (folder / name).write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads((folder / INDEX).read_text())
    change(table["weight_map"])
    (folder / INDEX).write_text(json.dumps(table))


def replace(raw: dict[str, Any], **tensors: torch.Tensor | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        contents: dict[str, Any] = tensors_of(raw) | tensors
        write_weights(folder, {key: tensor for key, tensor in contents.items() if tensor is not None}, 3)

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def only_pickles(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """What a hostile pickle is: opening it runs a command."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def link_out(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


def with_nan(value: float) -> torch.Tensor:
    weight = tensors_of(LLAMA)["model.layers.1.mlp.up_proj.weight"].clone()
    weight[3, 4] = value
    return weight


Damage = Callable[[Path], Any]
NORM = "model.norm.weight"
MALFORMED: dict[str, tuple[dict[str, Any], Damage, str]] = {
    "no config": (LLAMA, lambda f: (f / "config.json").unlink(), r"no config\.json in it"),
    "empty config": (LLAMA, text("config.json", ""), "not valid JSON"),
    "config is a list": (LLAMA, text("config.json", "[]"), "holds a JSON list"),
    "config is deep": (LLAMA, text("config.json", '{"a":' * 100_000), "levels deep"),
    "config is huge": (LLAMA, lambda f: os.truncate(f / "config.json", 1 << 30), "such a file has at most"),
    "config is a pipe": (
        LLAMA,
        a_pipe,
        "not a regular file",
    ),
    "config has NaN": (LLAMA, text("config.json", '{"rms_norm_eps": NaN}'), "NaN is not a JSON number"),
    "config says twice": (LLAMA, text("config.json", '{"a": 1, "a": 2}'), "occurs twice"),
    "no model type": (LLAMA, lambda f: edit(f, "config.json", model_type=...), "no `model_type`"),
    "unknown model type": (LLAMA, lambda f: edit(f, "config.json", model_type="gpt2"), "gpt2"),
    "model type is a list": (LLAMA, lambda f: edit(f, "config.json", model_type=["llama"]), "model_type"),
    "layers without end": (LLAMA, lambda f: edit(f, "config.json", num_hidden_layers=10**9), "layers"),
    "experts without end": (MIXTRAL, lambda f: edit(f, "config.json", num_local_experts=10**9), "experts"),
    "far more experts than there are": (
        MIXTRAL,
        lambda f: edit(f, "config.json", num_hidden_layers=400, num_local_experts=240),
        "asks for more than 288,400 tensors, and the weights hold 35",
    ),
    "a vocabulary without end": (LLAMA, lambda f: edit(f, "config.json", vocab_size=2**31 - 1), "another shape"),
    "half a layer": (LLAMA, lambda f: edit(f, "config.json", num_hidden_layers=2.5), "num_hidden_layers"),
    "other quantisation": (
        LLAMA,
        lambda f: edit(f, "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised by 'gptq'",
    ),
    "other blocks": (
        V3_FP8,
        lambda f: edit(f, "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
        r"42 tensors are of another shape than blocks of 64 x 64 have factors: .*\(\[1, 2\] instead of \[1, 3\]",
    ),
    "truncated shard": (LLAMA, cut(SHARD, 500), "truncated"),
    "shard cut in its header": (LLAMA, cut(SHARD, 50), "ends within its header"),
    "empty shard": (LLAMA, cut(SHARD, 0), "truncated"),
    "shard with more": (
        LLAMA,
        lambda f: os.truncate(f / SHARD, (f / SHARD).stat().st_size + 1),
        "more bytes than its header says",
    ),
    "header bomb": (LLAMA, text(SHARD, (99 << 20).to_bytes(8, "little") + b'{"a":' * 1000), "ends within its header"),
    "shard is no safetensors": (LLAMA, text(SHARD, b"PK\x03\x04" * 100), "not safetensors"),
    "shard is gone": (LLAMA, lambda f: (f / SHARD).unlink(), f"names {SHARD}, not in the folder"),
    "index is gone": (LLAMA, lambda f: (f / INDEX).unlink(), "shards but no"),
    "index names more": (
        LLAMA,
        lambda f: edit_index(f, lambda m: m.update(x="model-00004-of-00003.safetensors")),
        "names model-00004-of-00003.safetensors, not in the folder",
    ),
    "index leads out": (
        LLAMA,
        lambda f: edit_index(f, lambda m: m.update({NORM: "../model.safetensors"})),
        "only .safetensors files in the folder itself",
    ),
    "index leads to the root": (
        LLAMA,
        lambda f: edit_index(f, lambda m: m.update({NORM: "/etc/x.safetensors"})),
        "only .safetensors files in the folder itself",
    ),
    "index names a pickle": (
        LLAMA,
        lambda f: edit_index(f, lambda m: m.update({NORM: "model.bin"})),
        "only .safetensors files in the folder itself",
    ),
    "index maps to numbers": (LLAMA, lambda f: edit_index(f, lambda m: m.update({NORM: 3})), "weight_map"),
    "index is empty": (LLAMA, text(INDEX, "{}"), "weight_map"),
    "pickles alone": (LLAMA, only_pickles, "only pickle weights"),
    "weights link out": (LLAMA, link_out(SHARD), "leads out of the folder"),
    "config links out": (LLAMA, link_out("config.json"), "leads out of the folder"),
    "tokenizer links out": (LLAMA, link_out("tokenizer.json"), "leads out of the folder"),
    "template links out": (LLAMA, link_out("chat_template.jinja"), "leads out of the folder"),
    "a tensor is missing": (LLAMA, replace(LLAMA, **{NORM: None}), rf"1 tensor is missing: {NORM}"),
    "many are missing": (
        LLAMA,
        lambda f: edit(f, "config.json", num_hidden_layers=3),
        r"9 tensors are missing: model\.layers\.2\..* and 4 more",
    ),
    "a tensor too many": (
        LLAMA,
        replace(LLAMA, **{"model.layers.0.x": torch.ones(1)}),
        r"known to no part.*\.x F32 \[1\]",
    ),
    "a wrong shape": (LLAMA, replace(LLAMA, **{NORM: torch.ones(17)}), rf"{NORM} \(\[17\] instead of \[16\]\)"),
    "turned round": (
        LLAMA,
        replace(LLAMA, **{"model.layers.0.mlp.up_proj.weight": torch.ones(16, 24)}),
        r"\[16, 24\] instead of \[24, 16\]",
    ),
    "integers": (LLAMA, replace(LLAMA, **{NORM: torch.ones(16, dtype=torch.int32)}), rf"{NORM} \(I32\)"),
    "FP8 without factors": (
        LLAMA,
        replace(LLAMA, **{NORM: torch.ones(16).to(torch.float8_e4m3fn)}),
        r"F8_E4M3 without model\.norm\.weight_scale_inv",
    ),
    "E5M2": (LLAMA, replace(LLAMA, **{NORM: torch.ones(16).to(torch.float8_e5m2)}), "F8_E5M2"),
    "factors of another shape": (
        V3_FP8,
        replace(V3_FP8, **{f"{SCALED}_scale_inv": torch.ones(1, 1)}),
        r"scale_inv \(\[1, 1\] instead of \[2, 2\]\)",
    ),
    "factors missing": (V3_FP8, replace(V3_FP8, **{f"{SCALED}_scale_inv": None}), "F8_E4M3 without"),
    "factors of nothing": (LLAMA, replace(LLAMA, **{f"{NORM}_scale_inv": torch.ones(1, 1)}), "known to no part"),
    "NaN": (
        LLAMA,
        replace(LLAMA, **{"model.layers.1.mlp.up_proj.weight": with_nan(math.nan)}),
        r"model\.layers\.1\.mlp\.up_proj\.weight: 1 elements are NaN or infinite",
    ),
    "infinity": (
        LLAMA,
        replace(LLAMA, **{"model.layers.1.mlp.up_proj.weight": with_nan(-math.inf)}),
        r"model\.layers\.1\.mlp\.up_proj\.weight: 1 elements are NaN or infinite",
    ),
    "NaN in FP8": (
        V3_FP8,
        replace(V3_FP8, **{SCALED: torch.full((140, 136), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}),
        rf"{SCALED}: 19040 elements are NaN",
    ),
    "NaN among the factors": (
        V3_FP8,
        replace(V3_FP8, **{f"{SCALED}_scale_inv": torch.full((2, 2), math.nan)}),
        rf"{SCALED}_scale_inv: a block's factor .* is not finite",
    ),
    "factors that overflow": (
        V3_FP8,
        replace(V3_FP8, **{f"{SCALED}_scale_inv": torch.full((2, 2), 3e38)}),
        rf"{SCALED}: \d+ elements are NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_it_is_refused_in_plain_words_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    raw, damage, reason = MALFORMED[name]
    source = publish(tmp_path / "source", raw, shards=3)
    damage(source)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=reason) as caught:
        import_hf("source", tmp_path / "a" / "out", quiet=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert "source" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_tensor_without_elements_is_carried_and_stops_nothing(tmp_path: Path) -> None:
    """transformers writes such for shared experts of which there are none."""
    source = publish(tmp_path / "source", LLAMA, shards=3)
    replace(LLAMA, **{"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(0, 16)})(source)
    report = import_hf(source, tmp_path / "out", quiet=True)
    assert report.path == tmp_path / "out"


def test_pickles_beside_safetensors_are_ignored_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "source", LLAMA)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    monkeypatch.chdir(tmp_path)
    report = import_hf(source, tmp_path / "out", quiet=True)
    assert any("pytorch_model.bin: pickle files are never opened" in note for note in report.notes)
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_code_in_the_repository_is_left_where_it_is(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", {**LLAMA, "auto_map": {"AutoModel": "evil.Model"}})
    (source / "evil.py").write_text("raise SystemExit")
    report = import_hf(source, tmp_path / "out", quiet=True)
    assert "not taken along: README.md, evil.py" in report.notes
    assert not (tmp_path / "out" / "evil.py").exists()


def test_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    plain = publish(tmp_path / "plain", LLAMA, shards=3)
    home = tmp_path / "models--x--y"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    import_hf(snapshot, tmp_path / "out", quiet=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def edit_native(folder: Path, name: str, content: bytes) -> None:
    """Change a file of an import, and its manifest with it, as a hostile one would."""
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name]["bytes"] = len(content)
        (folder / "manifest.json").write_text(json.dumps(manifest))


NATIVE: dict[str, tuple[str, bytes, str]] = {
    "manifest is a list": ("manifest.json", b"[]", "holds a JSON list"),
    "manifest lists nothing": ("manifest.json", b"{}", "must list `files`"),
    "manifest leads out": ("manifest.json", b'{"files": {"../x": {"bytes": 1}}}', "not a plain file name"),
    "manifest without sizes": ("manifest.json", b'{"files": {"config.json": {}}}', "gives no size"),
    "config of something else": ("config.json", b'{"a": 1}', "must hold `model` and `source`"),
    "config without family": ("config.json", b'{"model": {}, "source": {}}', "must name `family`"),
    "no model": ("config.json", b'{"model": {}, "source": {"family": "llama", "format": "huggingface"}}', "vocab_size"),
    "source of something else": ("source.json", b'{"config": {}}', "must hold `config` and `tensors`"),
    "source says too little": ("source.json", b'{"config": {}, "tensors": {"x": {}}}', "says too little"),
    "source config is none": ("source.json", b'{"config": {}, "tensors": {}}', ""),
    "tokenizer config is none": ("tokenizer_config.json", b"[]", "holds a JSON list"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_malformed_import_is_not_exported(tmp_path: Path, name: str) -> None:
    file, content, reason = NATIVE[name]
    imported = import_hf(publish(tmp_path / "source", LLAMA), tmp_path / "imported", quiet=True).path
    edit_native(imported, file, content)
    before = sorted(tmp_path.rglob("*"))
    if reason:
        with pytest.raises(FinemoeError, match=reason):
            export_hf(imported, tmp_path / "out", quiet=True)
        assert sorted(tmp_path.rglob("*")) == before
    else:  # nothing is known of the source: a new config.json
        assert not export_hf(imported, tmp_path / "out", quiet=True).verbatim_config


def test_weights_that_do_not_fit_the_configuration_are_not_exported(tmp_path: Path) -> None:
    imported = import_hf(publish(tmp_path / "source", LLAMA), tmp_path / "imported", quiet=True).path
    table = json.loads((imported / "config.json").read_text())
    table["model"]["vocab_size"] = 25
    edit_native(imported, "config.json", json.dumps(table).encode())
    with pytest.raises(CheckpointError, match=r"embedding\.weight is \[24, 16\] instead of \[25, 16\]"):
        export_hf(imported, tmp_path / "out", quiet=True)
