"""Small models: made while they are opened, written once for all, or as their file has them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finemoe
from checkpoint.adapters.tuned_runs import base_of
from checkpoint.gguf.gguf_files import MODELS, import_folder, random_model
from checkpoint.gguf.written import exported
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.language_model import open_language_model
from finemoe.checkpoint.open import load_model, load_tensors, stored_small
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.weights.small import may_be_small
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.generation import Engine, SamplingConfig
from finemoe.model.config import Kernels
from finemoe.model.quantised.blocks import dequantise, format_of, is_quantised
from finemoe.model.quantised.making import quantise
from finemoe.model.transformer import Transformer

gguf = pytest.importorskip("gguf")
FAMILIES = ["llama-tied-bias", "olmoe", "qwen2moe", "deepseek", "deepseek2-v2", "deepseek2-v3"]
WIDE = {
    "kind": "moe",
    "num_routed_experts": 64,
    "experts_per_token": 2,
    "expert_hidden_size": 256,
    "num_shared_experts": 0,
    "router": {"kind": "softmax_topk"},
}
RESIDENT = """
import re, sys, torch
from finemoe.checkpoint.open import load_model

def kibibytes():
    areas = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())
    ours = [area for area in areas if sys.argv[1] in area.splitlines()[0]]
    return [sum(int(re.search(f"\\n{key}: +(\\\\d+)", area)[1]) for area in ours) for key in ("Rss", "Size")]

model = load_model(sys.argv[1], small="stored")
before, mapped = kibibytes()
with torch.inference_mode():
    model(torch.tensor([[5, 9]]), cache=model.new_cache(1, 4))
print(before, kibibytes()[0], mapped)
"""
TOKENS = torch.randint(288, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


def source(home: Path, name: str) -> Path:
    folder = home / name
    return folder if folder.exists() else import_folder(folder, random_model(MODELS[name]))


def quantised(home: Path, name: str, weights: str) -> Path:
    out = home / f"{name}-{weights}"
    if not out.exists():
        finemoe.quantize(source(home, name), out, weights, quiet=True)  # type: ignore[arg-type]
    return out


def in_full(small: Transformer) -> Transformer:
    """The float32 model of what the blocks of a small one stand for."""
    shapes = {name: tensor.shape for name, tensor in Transformer(small.config).state_dict().items()}
    full = Transformer(small.config, small.kernels)
    state = {
        name: dequantise(tensor, shapes[name][-1]) if is_quantised(tensor) else tensor
        for name, tensor in small.state_dict().items()
    }
    full.load_state_dict(state)
    return full.eval()


def scores(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden)


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_model_computes_what_its_blocks_stand_for(home: Path, name: str, weights: str) -> None:
    """The same bits: of whole texts, and token by token through the engine, whose pass is one native call."""
    small = load_model(source(home, name), small=weights)  # type: ignore[arg-type]
    full = in_full(small)
    assert torch.equal(scores(small), scores(full))
    prompts = [tuple(range(5, 15)), (7,), tuple(range(40, 110))]
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=12, seed=1)
    found, wanted = (Engine(one, end_of_text_id=0).generate(prompts, sampling) for one in (small, full))
    assert [one.completion for one in found] == [one.completion for one in wanted]


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_torch_computes_it_too(home: Path, name: str) -> None:
    small = load_model(source(home, name), Kernels(products="torch", experts="loop"), small="int8")
    torch.testing.assert_close(
        scores(small), scores(load_model(source(home, name), small="int8")), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_large_products_are_small_and_nothing_else(home: Path, name: str) -> None:
    model = load_model(source(home, name), small="int4")
    kinds = {key: format_of(one).name for key, one in model.state_dict().items() if is_quantised(one)}
    large = {key for key, one in random_model(MODELS[name]).state_dict().items() if may_be_small(key)}
    assert set(kinds) == large
    assert {kinds[key] for key in kinds if key.startswith(("embedding", "head"))} == {"Q8_0"}
    assert {kinds[key] for key in kinds if key.startswith("blocks")} == {"Q4_0"}
    left = [key for key in model.state_dict() if key not in kinds]
    assert all(any(word in key for word in ("norm", "router", "bias", "kv_", "shared_gate")) for key in left)
    assert not any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_is_written_opens_where_it_lies(home: Path, weights: str) -> None:
    folder = quantised(home, "deepseek2-v3", weights)
    assert stored_small(folder)
    assert not stored_small(source(home, "deepseek2-v3"))
    made, opened = load_model(source(home, "deepseek2-v3"), small=weights), open_language_model(folder)  # type: ignore[arg-type]
    assert opened.model.state_dict().keys() == made.state_dict().keys()
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name
    assert examine(folder, deep=True, quiet=True).problems == ()


def test_a_file_is_mapped_and_not_copied(home: Path) -> None:
    """What is not read costs nothing: bytes that change in the file change in the model that has them mapped."""
    folder = home / "mapped"
    shutil.copytree(quantised(home, "deepseek", "int8"), folder)
    model = load_model(folder, small="stored")
    info = TensorFolder.open(folder).info("blocks.2.feed_forward.experts.down_proj")
    weight = model.state_dict()[info.name]
    before = int(weight.flatten()[100])
    with info.path.open("r+b") as file:
        file.seek(info.offset + 100)
        file.write(bytes([before ^ 1]))
    assert int(weight.flatten()[100]) == before ^ 1


def test_in_float32_it_is_what_the_blocks_stand_for(home: Path) -> None:
    """So that it can be trained further and merged, and analysed."""
    folder = quantised(home, "qwen2moe", "int8")
    small, full = load_model(folder, small="stored"), load_model(folder)
    assert not any(is_quantised(one) for one in full.state_dict().values())
    assert all(torch.equal(one, full.state_dict()[name]) for name, one in in_full(small).state_dict().items())
    assert all(torch.equal(one, full.state_dict()[name]) for name, one in load_tensors(folder)[1])
    assert open_language_model(folder, "fp32").model.embedding.weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_a_gguf_file_stay_as_they_are(home: Path, tmp_path: Path, name: str, dtype: str) -> None:
    path = exported(tmp_path, random_model(MODELS[name]), dtype)
    small, full = load_model(path, small="stored"), load_model(path)
    assert any(is_quantised(one) for one in small.state_dict().values())
    assert torch.equal(scores(small), scores(full))
    assert open_language_model(path).model.embedding.weight.dtype is torch.uint8
    with pytest.raises(CheckpointError, match="has products in blocks already"):
        finemoe.quantize(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_folder_becomes_a_gguf_file_of_the_same_bytes(home: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "small.gguf"
    export_gguf(quantised(home, name, "int4"), out, dtype="F32", quiet=True)
    found, wanted = (
        load_model(out, small="stored").state_dict(),
        load_model(quantised(home, name, "int4"), small="stored"),
    )
    for key, one in wanted.state_dict().items():
        if is_quantised(one) and not is_quantised(found[key]):  # rows that are no whole blocks
            assert torch.equal(found[key], dequantise(one, found[key].shape[-1]).half().float()), key
        else:
            assert torch.equal(found[key], one), key
    reader = gguf.GGUFReader(out)
    assert int(reader.fields["general.file_type"].contents()) == 2  # Q4_0
    assert {"Q4_0", "Q8_0"} <= {tensor.tensor_type.name for tensor in reader.tensors}


def test_a_small_folder_is_refused_as_a_hugging_face_one(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no Hugging Face class reads: export the model that .* export it as OUT\.gguf"
    ):
        finemoe.export(quantised(home, "deepseek", "int8"), tmp_path / "out")


def test_a_run_is_made_small(tmp_path: Path) -> None:
    run = base_of(tmp_path, "v3")
    facts = finemoe.quantize(run, tmp_path / "small", "int8", quiet=True)
    assert facts["bytes"] < facts["bytes_before"]
    opened = open_language_model(tmp_path / "small")
    assert opened.reach == open_language_model(run).reach
    made = load_model(run, small="int8")
    assert all(torch.equal(one, opened.model.state_dict()[name]) for name, one in made.state_dict().items())
    text = finemoe.generate(tmp_path / "small", ["cat dog"], max_new_tokens=4)
    assert text


def test_what_cannot_be_is_refused_and_nothing_written(home: Path, tmp_path: Path) -> None:
    folder = source(home, "llama-tied-bias")
    with pytest.raises(ConfigError, match="weights must be one of int8, int4, stored, not 'int3'"):
        finemoe.quantize(folder, tmp_path / "out", "int3")  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="there"):
        finemoe.quantize(folder, tmp_path / "there")
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


def test_a_folder_that_was_cut_short_is_refused(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(quantised(home, "deepseek", "int4"), folder)
    weights = next(folder.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged: it has"):
        load_model(folder, small="stored")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][weights.name]["bytes"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(folder, small="stored")


def test_an_interrupted_call_goes_on_where_it_was(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finemoe.compression import quantize as quantising

    made: list[int] = []

    def until(stop: int | None) -> None:
        def counted(values: torch.Tensor, kind: object) -> torch.Tensor:
            made.append(values.numel())
            if len(made) == stop:
                raise KeyboardInterrupt
            return quantise(values, kind)  # type: ignore[arg-type]

        monkeypatch.setattr(quantising, "quantise", counted)

    until(5)
    with pytest.raises(KeyboardInterrupt):
        finemoe.quantize(source(home, "deepseek"), tmp_path / "out", "int8", quiet=True)
    assert not (tmp_path / "out").exists()
    first = len(made)
    made.clear()
    until(None)
    finemoe.quantize(source(home, "deepseek"), tmp_path / "out", "int8", quiet=True)
    whole = TensorFolder.open(quantised(home, "deepseek", "int8"))
    assert len(made) == sum(info.dtype is torch.uint8 for info in whole.tensors.values()) - (first - 1)
    again = TensorFolder.open(tmp_path / "out")
    assert all(torch.equal(whole.read(name), again.read(name)) for name in whole.tensors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_experts_that_no_token_chooses_are_not_read(tmp_path: Path) -> None:
    """A process of its own opens a file that nobody has in memory, and reads two tokens."""
    model = random_model({**MODELS["mixtral"], "hidden_size": 256, "num_layers": 2, "feed_forward": WIDE})
    finemoe.quantize(import_folder(tmp_path / "wide", model), tmp_path / "small", quiet=True)
    with (tmp_path / "small" / "model.safetensors").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 1 << 20, os.RWF_NOWAIT)
        except BlockingIOError:  # it has to be read from the disk
            pass
        else:
            pytest.skip("the file stays in memory here")
    program = [sys.executable, "-c", RESIDENT, str(tmp_path / "small")]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    before, after, mapped = map(int, done.stdout.split())
    assert before < 0.05 * mapped, "opening reads nothing"
    assert 0.05 * mapped < after < 0.5 * mapped, "two prompt tokens choose at most four of 64 experts a layer"
