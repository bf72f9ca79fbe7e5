"""Folders in FP8 with factors of other types, or for other blocks, than DeepSeek's own; and factors that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.huggingface.published import FP8_SETTINGS, V3, V3_FP8, contents_of, publish, tensors_of, write_weights
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.fp8 import scale_shape
from finemoe.checkpoint.huggingface.importing import import_hf, open_source
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.proof.written import compare_export, compare_import
from finemoe.core.errors import CheckpointError

SUFFIX = "_scale_inv"


def with_factors(dtype: torch.dtype, block: tuple[int, int]) -> dict[str, Tensor]:
    weights = tensors_of(V3_FP8)
    draw = torch.Generator().manual_seed(1)
    for name in [name for name in weights if name.endswith(SUFFIX)]:
        shape = scale_shape(weights[name.removesuffix(SUFFIX)].shape, block)
        weights[name] = (torch.rand(shape, generator=draw) * 1e-3 + 1e-4).to(dtype)
    return weights


def folder_of(path: Path, weights: dict[str, Tensor], block: tuple[int, int] = (128, 128), **settings: Any) -> Path:
    raw = {**V3, "quantization_config": {**FP8_SETTINGS, "weight_block_size": list(block), **settings}}
    publish(path, raw)
    write_weights(path, weights)
    return path


def dequantised(weights: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """Row by row and column by column, as the format says."""
    plain = {}
    for name, weight in weights.items():
        if not name.endswith(SUFFIX):
            plain[name] = weight.float()
            if name + SUFFIX in weights:
                factors = weights[name + SUFFIX].float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                plain[name] = (weight.float() * factors[: weight.shape[0], : weight.shape[1]]).bfloat16().float()
    return plain


@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        (torch.bfloat16, (128, 128)),
        (torch.float8_e8m0fnu, (128, 128)),
        (torch.float16, (128, 128)),
        (torch.float32, (64, 64)),
        (torch.bfloat16, (1, 128)),
        (torch.float8_e8m0fnu, (32, 8)),
    ],
)
def test_factors_of_other_types_and_blocks(tmp_path: Path, dtype: torch.dtype, block: tuple[int, int]) -> None:
    weights = with_factors(dtype, block)
    source = folder_of(tmp_path / "source", weights, block, scale_fmt="ue8m0" if dtype.itemsize == 1 else None)
    wanted = load_model(folder_of(tmp_path / "plain", dequantised(weights, block))).state_dict()
    found = load_model(source).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [f.text for f in examine(source).problems if f.about != "tokenizer"] == []
    import_hf(source, tmp_path / "in", quiet=True)
    assert compare_import(source, tmp_path / "in").sound
    assert examine(tmp_path / "in").facts["fp8"]["block"] == list(block)
    report = export_hf(tmp_path / "in", tmp_path / "out", quiet=True)
    assert compare_export(tmp_path / "in", tmp_path / "out").sound
    assert report.fp8_new == 0
    assert contents_of(tmp_path / "out") == contents_of(source)


@pytest.mark.parametrize("bad", [0.0, -1e-3, math.nan, math.inf])
def test_a_factor_that_is_no_number_above_0_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    weights = with_factors(torch.float32, (128, 128))
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    weights[name][0, 0] = bad
    source = folder_of(tmp_path / "source", weights)
    for opener in (load_model, lambda path: import_hf(path, tmp_path / "in", quiet=True)):
        with pytest.raises(CheckpointError, match=rf"{name}: a block's factor"):
            opener(source)
    assert not (tmp_path / "in").exists()
    (problem,) = [f.text for f in examine(source).problems if f.about == "fp8"]
    assert name in problem
    assert ("0 or less" in problem) == math.isfinite(bad)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [128]}, "two whole numbers"),
        ({"weight_block_size": [0, 128]}, "two whole numbers"),
        ({"weight_block_size": [True, 128]}, "two whole numbers"),
        ({"fmt": "e5m2"}, "only e4m3"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    raw = {**V3, "quantization_config": {**FP8_SETTINGS, **settings}}
    with pytest.raises(CheckpointError, match=says):
        open_source(publish(tmp_path / "source", raw))


def test_another_shape_than_the_blocks_give(tmp_path: Path) -> None:
    weights = with_factors(torch.bfloat16, (128, 128))
    with pytest.raises(CheckpointError, match=r"blocks of 8 x 8 have factors: .*instead of"):
        open_source(folder_of(tmp_path / "source", weights, (8, 8)))


def test_a_changed_configuration_says_the_blocks_that_are_written(tmp_path: Path) -> None:
    weights = with_factors(torch.float32, (64, 64))
    for name in [name for name in weights if name.endswith(SUFFIX)]:
        weights[name] = weights[name].log2().round().exp2()  # as DeepSeek-V3.1, whose kernels want powers of two
    source = folder_of(tmp_path / "source", weights, (64, 64), scale_fmt="ue8m0")
    import_hf(source, tmp_path / "in", quiet=True)
    config = tmp_path / "in" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"norm_eps": 1e-06', '"norm_eps": 2e-06'))
    assert config.read_text() != before
    report = export_hf(tmp_path / "in", tmp_path / "out", quiet=True)
    assert not report.verbatim_config
    assert report.fp8_new == 0
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert written["quantization_config"]["weight_block_size"] == [64, 64]
    assert written["quantization_config"]["scale_fmt"] == "ue8m0", "or new factors would be any numbers"
    found, wanted = load_model(tmp_path / "out").state_dict(), load_model(tmp_path / "in").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_settings_that_outlived_the_fp8_weights_give_no_blocks(tmp_path: Path) -> None:
    plain = dequantised(with_factors(torch.float32, (64, 64)), (64, 64))
    source = folder_of(tmp_path / "source", plain, (64, 64))
    import_hf(source, tmp_path / "in", quiet=True)
    export_hf(tmp_path / "in", tmp_path / "out", fp8=True, quiet=True)
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert written["quantization_config"]["weight_block_size"] == [128, 128]
    assert load_model(tmp_path / "out")
