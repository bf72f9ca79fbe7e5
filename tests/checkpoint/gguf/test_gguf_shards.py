"""Files of several shards that do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.gguf.gguf_files import spelt
from finemoe.checkpoint.gguf.file import StoredTensor, read_header
from finemoe.core.errors import CheckpointError

pytest.importorskip("gguf")


def shard(folder: Path, number: int, names: str, count: int = 2, **metadata: Any) -> Path:
    """Number from 0; a tensor of 8 numbers for each letter of `names`."""
    table = {"general.architecture": "llama", "split.count": count, "split.no": number, **metadata}
    path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
    path.write_bytes(spelt(table, [(name, (8,), 0, np.full(8, number, "<f4").tobytes()) for name in names]))
    return path


def with_total(total: int) -> dict[str, Any]:
    return {"split.tensors.count": total}


def test_tensors_of_both_are_found_where_they_are(tmp_path: Path) -> None:
    first = shard(tmp_path, 0, "ab", **with_total(3))
    second = shard(tmp_path, 1, "c")
    opened = read_header(first)
    assert opened.files == (first, second)
    assert {name: tensor.read().tolist() for name, tensor in opened.tensors.items()} == {
        "a": [0.0] * 8,
        "b": [0.0] * 8,
        "c": [1.0] * 8,
    }


def test_a_tensor_in_two_of_them(tmp_path: Path) -> None:
    first, second = shard(tmp_path, 0, "ab", **with_total(3)), shard(tmp_path, 1, "b")
    with pytest.raises(CheckpointError, match=f"{second}: tensor 'b' is in another shard too"):
        read_header(first)


@pytest.mark.parametrize("total", [2, 4])
def test_a_number_of_tensors_that_is_not_theirs(tmp_path: Path, total: int) -> None:
    first = shard(tmp_path, 0, "ab", **with_total(total))
    shard(tmp_path, 1, "c")
    with pytest.raises(CheckpointError, match=f"the shards hold 3 tensors, but split.tensors.count is {total}"):
        read_header(first)


def test_a_disk_that_fails_while_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor: StoredTensor = read_header(shard(tmp_path, 0, "a", 1)).tensors["a"]

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        tensor.read()
