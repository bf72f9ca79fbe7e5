"""Whole tensors one after the other are those of the model that is opened at once, whatever the path holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.checkpoint.conversion import import_hf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.open import load_model, load_tensors
from finemoe.checkpoint.weights.build import Part, one_by_one
from finemoe.runs.run import train
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def places(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in all the ways in which it may lie on a disk."""
    home = tmp_path_factory.mktemp("places")
    run = train(recipe(corpus, "v3"), out=home / "run", quiet=True).directory
    export_hf(run, home / "huggingface", quiet=True)
    import_hf(home / "huggingface", home / "imported", quiet=True)
    return {"run": run, "huggingface": home / "huggingface", "imported": home / "imported"}


@pytest.mark.parametrize("kind", ["run", "huggingface", "imported"])
def test_they_are_the_tensors_of_the_model(places: dict[str, Path], kind: str) -> None:
    same(places[kind])


def test_they_are_those_of_a_gguf_file(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from finemoe.checkpoint.gguf.exporting import export_gguf

    attention: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "qk_norm": "head"}
    raw = recipe(corpus, "deepseek-moe", model={"attention": attention})
    raw["model"]["feed_forward"] |= {
        "num_shared_experts": 0,
        "router": {"kind": "softmax_topk", "normalize_gates": True},
    }
    run = train(raw, out=tmp_path / "run", quiet=True).directory
    export_gguf(run, tmp_path / "model.gguf", quiet=True)
    same(tmp_path / "model.gguf")


def same(path: Path) -> None:
    expected = load_model(path)
    config, tensors = load_tensors(path)
    found = dict(tensors)
    wanted = expected.state_dict()
    assert config == expected.config
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)


def test_a_tensor_is_given_as_soon_as_its_last_part_has_come() -> None:
    """Parts of two in turn: both have begun, and none is held when it has been given."""
    shapes, types = {"a": (2, 3), "b": (2, 3)}, {"a": torch.float16, "b": torch.float32}
    come: list[str] = []

    def parts() -> Iterator[Part]:
        for name, row in (("a", 1), ("b", 0), ("a", 0), ("b", 1)):
            come.append(f"{name}{row}")
            yield name, (row,), torch.full((3,), float(row + 1))

    found: list[tuple[str, Tensor]] = []
    for name, tensor in one_by_one(shapes, types, parts(), torch.float32):
        found.append((name, tensor))
        assert come[-1] == {"a": "a0", "b": "b1"}[name]
    assert [name for name, _ in found] == ["a", "b"]
    assert all(one.tolist() == [[1.0] * 3, [2.0] * 3] and one.dtype == torch.float32 for _, one in found)
