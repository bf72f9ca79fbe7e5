"""Whatever else uses a model, given a small one: renewed weights, judges, losses, proofs, mixed files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import finemoe
from checkpoint.gguf.gguf_files import MODELS, import_folder, random_model
from checkpoint.gguf.written import exported, rewritten, stored
from finemoe.checkpoint.language_model import open_language_model, weights_for
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.weights.imported import ImportedWriter, read_imported
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.model.backends import EXPERT_KERNELS, NATIVE, TORCH
from finemoe.model.config import Kernels
from finemoe.model.quantised.blocks import FORMATS, dequantise, is_quantised
from finemoe.model.quantised.making import quantise
from finemoe.model.transformer import Transformer

gguf = pytest.importorskip("gguf")
TOKENS = torch.randint(288, (2, 12), generator=torch.Generator().manual_seed(0))


def scores(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden)


def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of two models of one shape, and the first one made small."""
    first, second = random_model(MODELS["deepseek"]), random_model(MODELS["deepseek"])
    with torch.no_grad():
        for tensor in second.state_dict().values():
            tensor.mul_(0.9)
    folders = import_folder(tmp_path / "first", first), import_folder(tmp_path / "second", second)
    finemoe.quantize(folders[0], tmp_path / "small", "int4", quiet=True)
    return (*folders, tmp_path / "small")


def test_new_weights_become_blocks_as_the_old_ones_are(tmp_path: Path) -> None:
    """As a server does that follows a training run."""
    _, second, small = pair(tmp_path)
    opened = open_language_model(small)
    opened.model.load_state_dict(weights_for(opened, second))
    assert torch.equal(scores(opened.model), scores(load_model(second, small="int4")))
    finemoe.quantize(second, tmp_path / "small2", "int4", quiet=True)
    again = weights_for(open_language_model(small), tmp_path / "small2")
    assert all(torch.equal(one, opened.model.state_dict()[name]) for name, one in again.items())
    full = open_language_model(second)
    assert not any(map(is_quantised, weights_for(full, small).values()))


def test_blocks_that_are_only_read_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model = random_model(MODELS["llama"])
    plain = exported(tmp_path, model, "F32")
    tensors = stored(plain)
    kinds = {name: gguf.GGMLQuantizationType.Q4_1 for name in tensors if "ffn_up" in name}
    packed = {
        name: gguf.quants.quantize(values, kinds[name]) if name in kinds else values for name, values in tensors.items()
    }
    path = rewritten(plain, tmp_path / "q41.gguf", {}, packed, kinds)
    opened = open_language_model(path)
    before = scores(opened.model)
    with pytest.raises(CheckpointError, match=r"is to become Q4_1.*open that model with"):
        weights_for(opened, plain)
    assert torch.equal(scores(opened.model), before)


def test_rows_of_a_small_output_matrix_are_numbers(tmp_path: Path) -> None:
    _, _, small = pair(tmp_path)
    model = load_model(small, small="stored")
    rows = dequantise(model.head_weight, model.config.hidden_size)
    assert torch.equal(model.head_rows([3, 5]), rows[[3, 5]])
    assert torch.equal(model.head_rows(slice(7)), rows[:7])


@pytest.mark.parametrize("backend", [TORCH, NATIVE], ids=["torch", "native"])
def test_a_loss_over_a_small_output_matrix(backend: object) -> None:
    torch.manual_seed(0)
    head, hidden = torch.randn(50, 64), torch.randn(9, 64)
    small = quantise(head, FORMATS["Q8_0"])
    targets, weights = torch.randint(50, (9,)), torch.rand(9)
    found = backend.cross_entropy_sum(hidden, small, targets, weights)  # type: ignore[attr-defined]
    each = torch.nn.functional.cross_entropy(hidden @ dequantise(small, 64).t(), targets, reduction="none")
    torch.testing.assert_close(found, (each * weights).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("learns", [False, True])
def test_experts_of_which_one_matrix_is_small(kernel: str, learns: bool) -> None:
    """As in a Q5_K_M file, whose gates are of a format that becomes float32."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 64, 40), quantise(torch.randn(3, 40, 32), FORMATS["Q8_0"])
    rows, counts = torch.randn(6, 40, requires_grad=learns), torch.tensor([4, 0, 2])
    found = EXPERT_KERNELS[kernel](rows, counts, gate_up, down, None)
    wanted = EXPERT_KERNELS["loop"](rows, counts, gate_up, dequantise(down, 32), None)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    if learns:
        found.sum().backward()
        assert rows.grad is not None


def test_a_small_model_takes_one_handle_a_file(tmp_path: Path) -> None:
    _, _, small = pair(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    model = load_model(small, small="stored")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert scores(model).isfinite().all()


def test_a_gguf_file_of_a_small_folder_is_proved(tmp_path: Path) -> None:
    _, _, small = pair(tmp_path)
    facts = finemoe.export(small, tmp_path / "out.gguf", verify=True, quiet=True)
    assert facts["checks"][0]["sound"], facts["checks"]


def test_blocks_of_another_format_are_rounded_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _, _ = pair(tmp_path)
    finemoe.quantize(first, tmp_path / "eight", "int8", quiet=True)
    model = load_model(tmp_path / "eight", small="int4")
    name = "blocks.1.attention.q_proj.weight"
    eight = dequantise(load_model(tmp_path / "eight", small="stored").state_dict()[name], 64)
    assert torch.equal(model.state_dict()[name], quantise(eight, FORMATS["Q4_0"]))
    assert "rounded a second time" in caplog.text


def test_plain_torch_reads_a_whole_small_model(tmp_path: Path) -> None:
    _, _, small = pair(tmp_path)
    by_torch = load_model(small, Kernels(products="torch"), small="stored")
    torch.testing.assert_close(scores(by_torch), scores(load_model(small, small="stored")), rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    _, _, small = pair(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype=torch\.bfloat16 with small='int8': what is not small is float32"):
        load_model(small, dtype=torch.bfloat16, small="int8")
    wrong = tmp_path / "wrong"
    name = "blocks.1.attention.q_proj.weight"
    imported = read_imported(small)
    state = {key: imported.tensors.read(key) for key in imported.tensors.tensors}
    state[name] = torch.cat((state[name], state[name]), dim=1)
    wrong.mkdir()
    specs = [TensorSpec(key, one.dtype, tuple(one.shape)) for key, one in state.items()]
    with ImportedWriter(wrong, specs, []) as writer:
        for key, one in state.items():
            writer.weights.write(key, one)
        files = {one.name: one.read_bytes() for one in small.glob("tokenizer*.json")}
        about = {"family": "quantised", "format": "int4"}
        writer.finish(imported.config, about, {"config": {}, "tensors": {}}, files)
    with pytest.raises(CheckpointError, match=rf"wrong: tensor '{name}' is \[64, 4, 18\] instead of \[64, 2, 18\]"):
        load_model(wrong, small="stored")
    with pytest.raises(CheckpointError, match=f"tensor '{name}': rows of 4 blocks of Q4_0"):
        load_model(wrong)
    shutil.rmtree(wrong)
