"""What becomes small: the weights that lie there now, whole, and all that is known of the model beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import finemoe
from checkpoint.adapters.tuned_runs import base_of
from checkpoint.gguf.gguf_files import MODELS, companions, import_folder, random_model
from finemoe.checkpoint.doctor import values
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import open_gguf
from finemoe.checkpoint.language_model import Weights, open_language_model
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.run_state.state import newest_checkpoint
from finemoe.checkpoint.sizes import bytes_in_memory
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.storage.workspace import partial_of
from finemoe.checkpoint.weights.small import may_be_small
from finemoe.cli.doctor import _exports
from finemoe.compression import quantize as quantising
from finemoe.core.errors import CheckpointError, ConfigError, DataError
from finemoe.evaluation.runner import describe_model
from finemoe.model.quantised.making import quantise
from finemoe.server.models import Models, Options

pytest.importorskip("gguf")
WEIGHTS: tuple[Weights, ...] = ("auto", "stored", "fp32", "bf16", "int8", "int4")


def interrupted(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call leaves that ends at its fourth product."""
    made: list[int] = []

    def until(values: torch.Tensor, kind: Any) -> torch.Tensor:
        made.append(values.numel())
        if len(made) == 4:
            raise KeyboardInterrupt
        return quantise(values, kind)

    with monkeypatch.context() as patch:
        patch.setattr(quantising, "quantise", until)
        with pytest.raises(KeyboardInterrupt):
            finemoe.quantize(model, out, quiet=True)
    assert partial_of(out).is_dir()


def other_numbers(file: Path) -> None:
    """Exchange the weights of a file, in the same bytes, by a later one."""
    data = file.read_bytes()
    fresh = file.with_name("fresh")
    fresh.write_bytes(data[:-4] + bytes(4))
    fresh.replace(file)


@pytest.mark.parametrize("kind", ["imported", "huggingface", "gguf", "run"])
def test_other_weights_at_the_same_place_are_not_mixed_in(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["llama"]))
    if kind == "huggingface":
        finemoe.export(folder, tmp_path / "model")
    elif kind == "gguf":
        export_gguf(folder, tmp_path / "model.gguf", dtype="F32", quiet=True)
    model = {
        "imported": folder,
        "huggingface": tmp_path / "model",
        "gguf": tmp_path / "model.gguf",
        "run": base_of(tmp_path, "v3") if kind == "run" else folder,
    }[kind]
    interrupted(model, tmp_path / "out", monkeypatch)
    home = newest_checkpoint(model) if kind == "run" else model
    file = model if model.is_file() else next(home.glob("model*.safetensors"))
    other_numbers(file)
    if kind == "run":  # its checksums are those of the new numbers
        monkeypatch.setattr("finemoe.checkpoint.run_state.state.find_damage", lambda folder: None)
    with pytest.raises(CheckpointError, match="left by an interrupted conversion of another source"):
        finemoe.quantize(model, tmp_path / "out", quiet=True)
    shutil.rmtree(partial_of(tmp_path / "out"))
    finemoe.quantize(model, tmp_path / "out", quiet=True)
    made, wanted = load_model(tmp_path / "out", small="stored"), load_model(model, small="int8")
    assert all(torch.equal(one, made.state_dict()[name]) for name, one in wanted.state_dict().items())


def test_a_missing_tokenizer_costs_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["llama"]))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(quantising, "quantise", lambda values, kind: pytest.fail("work was done"))
    with pytest.raises(DataError, match="tokenizer"):
        finemoe.quantize(folder, tmp_path / "out", quiet=True)
    assert [one.name for one in tmp_path.iterdir()] == ["imported"]


def test_a_number_that_no_block_can_hold_is_told_with_its_place(tmp_path: Path) -> None:
    model = random_model(MODELS["llama"])
    name = "blocks.1.feed_forward.up_proj.weight"
    with torch.no_grad():
        model.state_dict()[name][3, 5] = 1e9
    folder = import_folder(tmp_path / "imported", model)
    with pytest.raises(CheckpointError, match=rf"imported: tensor '{name}': a weight is no finite number"):
        finemoe.quantize(folder, tmp_path / "out", quiet=True)
    with pytest.raises(CheckpointError, match=f"tensor '{name}': a weight is no finite number"):
        load_model(folder, small="int8")


@pytest.mark.parametrize("packing", ["join", "isolate"])
def test_a_run_made_small_is_read_as_the_run_is(tmp_path: Path, packing: str) -> None:
    run = base_of(tmp_path, "v3")
    file = run / "config.json"
    table = json.loads(file.read_text())
    table["data"]["packing"] = packing
    file.write_text(json.dumps(table))
    finemoe.quantize(run, tmp_path / "small", quiet=True)
    whole, small = open_language_model(run, "int8"), open_language_model(tmp_path / "small")
    for opened in (whole, small):
        assert (opened.own, opened.isolated) == (True, packing == "isolate")
    assert small.reach == whole.reach
    assert small.first_id == whole.first_id
    assert small.model.config == whole.model.config
    assert small.tokenizer.fingerprint() == whole.tokenizer.fingerprint()
    assert small.encode("cat dog") == whole.encode("cat dog")


@pytest.mark.parametrize("kind", ["imported", "run"])
def test_a_gguf_file_of_it_says_what_one_of_the_model_says(tmp_path: Path, kind: str) -> None:
    """Ends of texts and lengths, too, though the sources have them in files of different kinds."""
    if kind == "run":
        model = base_of(tmp_path, "v3")
    else:
        files = {**companions(), "generation_config.json": b'{"eos_token_id": 2}'}
        model = import_folder(tmp_path / "imported", random_model(MODELS["llama"]), files)
    finemoe.quantize(model, tmp_path / "small", quiet=True)
    assert open_language_model(tmp_path / "small").tokenizer.stop_ids == open_language_model(model).tokenizer.stop_ids
    facts = []
    for one in (model, tmp_path / "small"):
        export_gguf(one, tmp_path / f"{one.name}.gguf", quiet=True)
        facts.append(dict(open_gguf(tmp_path / f"{one.name}.gguf").metadata))
    for found in facts:
        for key in ("general.name", "general.file_type"):
            del found[key]
    assert facts[0] == facts[1]


def test_the_doctor_says_where_blocks_go_and_looks_into_them(tmp_path: Path) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["olmoe"]))
    finemoe.quantize(folder, tmp_path / "small", "int4", quiet=True)
    facts = examine(tmp_path / "small", deep=True, quiet=True).facts
    assert [one["format"] for one in facts["exports"] if one["possible"]] == ["gguf"]
    tensors = TensorFolder.open(tmp_path / "small").tensors
    assert facts["values"]["looked_at"] == facts["values"]["of"] == len(tensors)
    said = " ".join(_exports(facts["exports"]).split())
    assert "Hugging Face: no, it was made small, in blocks of few bits that no Hugging Face class reads" in said
    info = tensors["blocks.1.feed_forward.experts.down_proj"]
    with info.path.open("r+b") as file:
        file.seek(info.offset + 5 * info.shape[-1])
        file.write(b"\x00\x7e")  # NaN of float16
    for deep in (False, True):
        problems = [one.text for one in examine(tmp_path / "small", deep=deep, quiet=True).problems]
        assert f"1 tensor holds NaN or infinity: {info.name} (scales of its blocks)" in problems


def test_large_blocks_are_left_to_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["llama"]))
    finemoe.quantize(folder, tmp_path / "small", quiet=True)
    monkeypatch.setattr(values, "_SMALL", 1 << 10)
    tensors = TensorFolder.open(tmp_path / "small").tensors.values()
    facts = examine(tmp_path / "small", deep=False, quiet=True).facts["values"]
    assert facts["of"] == len(tensors)
    assert facts["looked_at"] == sum(one.nbytes <= 1 << 10 for one in tensors) < len(tensors)


@pytest.mark.parametrize("name", ["llama-tied-bias", "olmoe", "deepseek2-v3"])
def test_a_result_says_how_many_numbers_there_are_and_in_which_form(tmp_path: Path, name: str) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS[name]))
    whole = open_language_model(folder)
    parameters = sum(one.numel() for one in whole.model.parameters())
    described = describe_model(whole, "k")
    assert (described["parameters"], described["dtype"]) == (parameters, "float32")
    for weights, form in (("int8", "Q8_0"), ("int4", "Q4_0"), ("bf16", "BF16")):
        described = describe_model(open_language_model(folder, weights), "k")  # type: ignore[arg-type]
        assert (described["parameters"], described["dtype"]) == (parameters, form)
    small = open_language_model(folder, "int4")
    largest = max((one for one in small.model.state_dict() if may_be_small(one)), key=lambda one: one.startswith("bl"))
    shape = whole.model.state_dict()[largest].shape
    home, _, last = largest.rpartition(".")
    setattr(small.model.get_submodule(home), last, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    assert describe_model(small, "k")["dtype"] == "mixed"


@pytest.mark.parametrize("name", ["llama-tied-bias", "mixtral", "deepseek2-v3"])
def test_room_is_made_for_what_is_opened(tmp_path: Path, name: str) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS[name]))
    finemoe.quantize(folder, tmp_path / "small", "int4", quiet=True)
    export_gguf(folder, tmp_path / "model.gguf", dtype="Q8_0", quiet=True)
    for path in (folder, tmp_path / "small", tmp_path / "model.gguf"):
        for weights in WEIGHTS:
            model = open_language_model(path, weights).model
            held = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
            assert bytes_in_memory(path, weights) == held, (path.name, weights)
            assert Models({"m": path}, Options(weights, cache_bytes=1000))._estimate("m") == held + 1000


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mixtral", {"hidden_size": 80}), ("llama", {"hidden_size": 80}), ("mixtral", {})],
    ids=str,
)
def test_the_doctor_counts_the_tensors_that_an_export_to_gguf_makes_wider(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Those of the file: what is one tensor here may be two there."""
    folder = import_folder(tmp_path / "imported", random_model({**MODELS[name], **changes}))
    finemoe.quantize(folder, tmp_path / "small", "int4", quiet=True)
    (entry,) = [e for e in examine(tmp_path / "small", quiet=True).facts["exports"] if e["format"] == "gguf"]
    said = [text for text in entry["lost"] if "F16" in text]
    report = export_gguf(tmp_path / "small", tmp_path / "small.gguf", quiet=True)
    wider = report.kinds["F16"]
    assert said == ([f"{wider} tensors in F16, with rows that are no multiple of 32"] if wider else [])
    assert bool(wider) == bool(changes)


def test_a_type_that_is_asked_for_is_for_all_that_is_not_blocks(tmp_path: Path) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["deepseek2-v3"]))
    finemoe.quantize(folder, tmp_path / "small", quiet=True)
    plain = export_gguf(tmp_path / "small", tmp_path / "plain.gguf", quiet=True)
    asked = export_gguf(tmp_path / "small", tmp_path / "asked.gguf", dtype="BF16", quiet=True)
    assert asked.kinds["BF16"] > 0 == plain.kinds["BF16"] == plain.kinds["F16"]
    assert asked.kinds["Q8_0"] == plain.kinds["Q8_0"]
    said = "keep the blocks that `finemoe quantize` made of them; BF16 is for all else"
    assert [said in note for note in asked.notes].count(True) == 1
    assert not any(said in note for note in plain.notes)


def test_a_folder_is_not_named_like_a_file(tmp_path: Path) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["llama"]))
    with pytest.raises(CheckpointError, match="quantize makes a folder, of which `finemoe export FOLDER small"):
        finemoe.quantize(folder, tmp_path / "small.gguf", quiet=True)
    assert not (tmp_path / "small.gguf").exists()


def test_weights_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    folder = import_folder(tmp_path / "imported", random_model(MODELS["llama"]))
    with pytest.raises(ConfigError, match="weights must be one of auto, fp32, bf16, stored, int8, int4, not 'int2'"):
        finemoe.load(folder, "int2")  # type: ignore[arg-type]
