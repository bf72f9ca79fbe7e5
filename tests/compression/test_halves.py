"""Weights in bfloat16: half the memory, the float32 answers to the last bit, mapped where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import finemoe
from checkpoint.gguf.gguf_files import MODELS, import_folder, random_model
from checkpoint.gguf.written import exported, rewritten, stored
from compression.test_quantize import scores
from finemoe.checkpoint import language_model
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.language_model import Weights, open_language_model, weights_for
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.sizes import bytes_in_memory
from finemoe.checkpoint.weights import build
from finemoe.checkpoint.weights.small import may_be_small
from finemoe.core.errors import CheckpointError
from finemoe.model.quantised.blocks import format_of, is_quantised
from finemoe.model.transformer import Transformer

gguf = pytest.importorskip("gguf")
ODD = {**MODELS["mixtral"], "hidden_size": 80}
"""Rows of two and a half blocks."""


def in_halves(folder: Path, raw: dict[str, object]) -> Path:
    """An imported folder in bfloat16, but for routers."""
    model = random_model(raw)
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.bfloat16()
    return import_folder(folder, model)


def kinds(model: Transformer) -> set[str]:
    """Formats of the products, and "" for one that is plain."""
    products = [tensor for name, tensor in model.state_dict().items() if may_be_small(name)]
    return {format_of(one).name if is_quantised(one) else "" for one in products}


@pytest.mark.parametrize("raw", [MODELS["deepseek2-v3"], MODELS["llama-tied-bias"], ODD], ids=["v3", "llama", "odd"])
def test_what_is_stored_so_stays_and_computes_the_same(raw: dict[str, object], tmp_path: Path) -> None:
    folder = in_halves(tmp_path / "halves", raw)
    whole = open_language_model(folder)
    assert kinds(whole.model) == {""}
    ways: tuple[Weights, ...] = ("stored", "bf16")
    for weights in ways:
        opened = open_language_model(folder, weights)
        assert kinds(opened.model) == {"BF16"}
        assert torch.equal(scores(opened.model), scores(whole.model)), weights
        others = [tensor for name, tensor in opened.model.state_dict().items() if not may_be_small(name)]
        assert {tensor.dtype for tensor in others} == {torch.float32}


def test_nothing_is_copied_where_rows_are_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = in_halves(tmp_path / "halves", MODELS["deepseek2-v3"])
    wanted = scores(open_language_model(folder).model)
    made: list[int] = []
    real = build.quantise
    monkeypatch.setattr(build, "quantise", lambda values, kind: (made.append(values.numel()), real(values, kind))[1])
    opened = open_language_model(folder, "stored")
    assert not made
    assert torch.equal(scores(opened.model), wanted)
    open_language_model(folder, "bf16")
    assert made


def test_a_hugging_face_folder_in_bfloat16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = in_halves(tmp_path / "halves", MODELS["qwen2moe"])
    finemoe.export(folder, tmp_path / "theirs", dtype="bf16", quiet=True)
    opened = open_language_model(tmp_path / "theirs", "stored")
    assert kinds(opened.model) == {"BF16"}
    assert torch.equal(scores(opened.model), scores(open_language_model(folder).model))
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 285}))
    assert not caplog.messages
    bytes_in_memory(tmp_path / "theirs", "stored")
    open_language_model(tmp_path / "theirs", "stored")
    (said,) = caplog.messages  # once, though headers are read several times
    assert "`vocab_size` is 285" in said


@pytest.mark.parametrize("raw", [MODELS["deepseek2-v3"], ODD], ids=["v3", "odd"])
def test_a_gguf_file_in_bfloat16(raw: dict[str, object], tmp_path: Path) -> None:
    """It opens small by itself, where its rows are whole blocks."""
    export_gguf(in_halves(tmp_path / "halves", raw), tmp_path / "plain.gguf", dtype="BF16", quiet=True)
    opened = open_language_model(tmp_path / "plain.gguf")
    assert kinds(opened.model) == ({"BF16", ""} if raw is ODD else {"BF16"})
    assert torch.equal(scores(opened.model), scores(load_model(tmp_path / "plain.gguf")))


def test_a_gguf_file_in_bfloat16_is_not_one_of_few_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It can be made small, by one call and once for all, and gives a model that is small its weights."""
    folder = in_halves(tmp_path / "halves", MODELS["llama"])
    path = exported(tmp_path, load_model(folder), "BF16")
    made, wanted = load_model(path, small="int8"), load_model(folder, small="int8").state_dict()
    assert open_language_model(path, "bf16").model.embedding.weight.dtype is torch.uint8
    assert not caplog.records
    assert all(torch.equal(one, wanted[name]) for name, one in made.state_dict().items())
    opened = open_language_model(path, "int8")
    assert all(torch.equal(one, wanted[name]) for name, one in weights_for(opened, path).items())
    finemoe.quantize(path, tmp_path / "small", quiet=True)
    assert all(
        torch.equal(one, wanted[name])
        for name, one in load_model(tmp_path / "small", small="stored").state_dict().items()
    )


@pytest.mark.parametrize(("dtype", "small"), [("BF16", None), ("Q8_0", "stored")])
def test_what_is_not_of_few_bits_goes_to_the_gpu(
    dtype: str, small: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path, random_model(MODELS["llama"]), dtype)
    model, asked = load_model(path), []
    here = bytes_in_memory(path, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Transformer, "to", lambda self, device: self)
    monkeypatch.setattr(language_model, "load_model", lambda *_, **how: (asked.append(how.get("small")), model)[1])
    open_language_model(path)
    assert asked == [small]
    numbers = sum(one.numel() for one in model.state_dict().values())
    assert bytes_in_memory(path, "auto") == (here if small else 4 * numbers)


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    plain = exported(tmp_path, random_model(MODELS["llama"]), "BF16")
    tensors, kind = stored(plain), gguf.GGMLQuantizationType.BF16
    name = next(one for one in tensors if "attn_q" in one)  # rows are turned, so that it is copied
    packed = {one: gguf.quants.quantize(values, kind) if values.ndim > 1 else values for one, values in tensors.items()}
    packed[name][1, 6:8] = 0xFF  # a NaN
    path = rewritten(plain, tmp_path / "nan.gguf", {}, packed, {one: kind for one in packed if tensors[one].ndim > 1})
    with pytest.raises(CheckpointError, match=f"{name}: numbers or scales are NaN or infinite"):
        open_language_model(path)
