"""Blocks of a GGUF file are used where they lie, where they lie as in the model, or kept in a folder where all do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import finemoe
from checkpoint.gguf.gguf_files import MODELS, import_folder, random_model
from checkpoint.gguf.written import exported, rewritten, stored
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.opening import open_gguf
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.generation import Engine, SamplingConfig
from finemoe.model.quantised.blocks import FORMATS, is_quantised

gguf = pytest.importorskip("gguf")
TURNED, HALVED = r"\.[qk]_proj\.weight$", r"experts\.gate_up_proj$"
MOVED = {"llama": TURNED, "deepseek": f"{TURNED}|{HALVED}", "deepseek2-v3": HALVED}
"""Rows that llama.cpp has in another order, or in two tensors."""


def lies_in(path: Path, tensor: Tensor) -> bool:
    """Whether its first byte is one of a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = (int(one, 16) for one in line.split()[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return True
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
@pytest.mark.parametrize("name", MOVED)
def test_what_lies_as_in_the_model_is_not_copied(name: str, kind: str, tmp_path: Path) -> None:
    path = exported(tmp_path, random_model(MODELS[name]), kind)
    model = load_model(path, small="stored")
    small = {key: tensor for key, tensor in model.state_dict().items() if is_quantised(tensor)}
    lying = {key for key, tensor in small.items() if lies_in(path, tensor)}
    assert {key for key in small if not re.search(MOVED[name], key)} == lying
    assert len(small) > len(lying) > len(small) // 3
    plain = load_model(path)
    tokens = torch.randint(plain.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        ours, theirs = (one.logits(one(tokens).hidden) for one in (model, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", [*MOVED, "qwen2moe"])
def test_a_folder_of_a_file_has_the_same_blocks_and_copies_none(name: str, kind: str, tmp_path: Path) -> None:
    path, out = exported(tmp_path, random_model(MODELS[name]), kind), tmp_path / "small"
    facts = finemoe.quantize(path, out, "stored", quiet=True)
    ours, theirs = (load_model(one, small="stored").state_dict() for one in (out, path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    small = {key: tensor for key, tensor in ours.items() if is_quantised(tensor)}
    assert facts["small"] == len(small) > 0
    assert facts["bytes_before"] == sum(one.n_bytes for one in gguf.GGUFReader(path).tensors)
    assert all(lies_in(out / "model.safetensors", tensor) for tensor in small.values())
    assert examine(out, deep=True, quiet=True).problems == ()
    assert finemoe.generate(str(out), "ab", max_new_tokens=4) == finemoe.generate(str(path), "ab", max_new_tokens=4)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K"])
def test_a_file_of_such_a_folder_has_the_blocks_of_the_first(kind: str, tmp_path: Path) -> None:
    """Of formats that finemoe does not make, in rows of 256 numbers that were drawn."""
    config = MODELS["mixtral"]
    experts = {**config["feed_forward"], "expert_hidden_size": 256}
    model = random_model({**config, "hidden_size": 256, "num_layers": 1, "feed_forward": experts})
    plain, number = exported(tmp_path, model, "F32"), gguf.GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[number]
    draw, tensors = np.random.default_rng(0), stored(plain)
    kinds = {one: number for one in tensors if re.search(r"attn_[qkv]\.|_exps|token_embd", one)}
    for name in kinds:
        *rows, columns = tensors[name].shape
        blocks = draw.integers(0, 256, (*rows, columns // size, width), np.uint8)
        for first in FORMATS[kind].halves:  # scales
            blocks[..., first : first + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        tensors[name] = blocks.reshape(*rows, -1)
    path = rewritten(plain, tmp_path / "first.gguf", {}, tensors, kinds)
    finemoe.quantize(path, tmp_path / "small", "stored", quiet=True)
    finemoe.export(tmp_path / "small", tmp_path / "second.gguf", quiet=True)
    files = (tmp_path / "second.gguf", path)
    ours, theirs = ({one.name: one for one in gguf.GGUFReader(file).tensors} for file in files)
    assert ours.keys() == theirs.keys()
    for name in kinds:
        assert ours[name].tensor_type == number
        assert np.array_equal(ours[name].data, theirs[name].data), name


@pytest.mark.parametrize("kind", ["F32", "BF16", "folder"])
def test_what_has_no_blocks_keeps_none(kind: str, tmp_path: Path) -> None:
    model = random_model(MODELS["llama"])
    source = import_folder(tmp_path / "in", model) if kind == "folder" else exported(tmp_path, model, kind)
    with pytest.raises(ConfigError, match=r"keeps the blocks of a GGUF file, and .* has none of a format"):
        finemoe.quantize(source, tmp_path / "out", "stored", quiet=True)
    assert not (tmp_path / "out").exists()


def test_blocks_are_not_rounded_again_unless_they_are_asked_for_as_they_are(tmp_path: Path) -> None:
    path = exported(tmp_path, random_model(MODELS["llama"]), "Q4_0")
    with pytest.raises(CheckpointError, match="or --weights stored, which keeps its blocks"):
        finemoe.quantize(path, tmp_path / "out", "int4", quiet=True)


def damaged(tmp_path: Path, name: str) -> Path:
    """A scale in the middle of a tensor is no number."""
    path = exported(tmp_path, random_model(MODELS["llama"]), "Q8_0")
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == name)
    data = bytearray(path.read_bytes())
    data[tensor.data_offset + 34 : tensor.data_offset + 36] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    return path


def test_a_scale_that_is_no_number_is_refused_where_it_is_read_and_told_where_it_is_used(tmp_path: Path) -> None:
    """A copy is looked through when it is made; of what is mapped nothing is read before it is used."""
    (tmp_path / "one").mkdir()
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_q\.weight: numbers or scales are NaN or infinite"):
        load_model(damaged(tmp_path / "one", "blk.1.attn_q.weight"), small="stored")
    path = damaged(tmp_path, "blk.1.ffn_up.weight")
    model = load_model(path, small="stored")
    with pytest.raises(CheckpointError, match=r"not finite: its weights are damaged.*finemoe doctor MODEL --deep"):
        Engine(model).generate([(5, 9, 4)], SamplingConfig(max_new_tokens=2))
    problems = examine(path, deep=True, quiet=True).problems
    assert any("blk.1.ffn_up.weight" in one.text for one in problems), problems


def test_a_file_that_is_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, random_model(MODELS["llama"]), "Q8_0")
    opened = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ends within tensor '.*'; it was cut short"):
        opened.lying(opened.formats())
