"""Safetensors written by hand: what the library reads is what was given, and the digest is the file's."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from finemoe.checkpoint.storage import streaming
from finemoe.checkpoint.storage.safetensors import DTYPES, read_header
from finemoe.checkpoint.storage.streaming import AbandonedError, write_bytes, write_tensors

READ_BY_THE_LIBRARY = sorted(set(DTYPES) - {"C64"})


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes as `dtype`; 0 and 1 where it is bool."""
    torch.manual_seed(seed)
    size = int(torch.tensor(shape).prod()) * dtype.itemsize if shape else dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(READ_BY_THE_LIBRARY), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    piece=st.sampled_from([1, 7, 64, 1 << 20]),
    sync=st.sampled_from([1, 100, 1 << 30]),
)
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]], piece: int, sync: int
) -> None:
    path = tmp_path_factory.mktemp("streamed") / "x.safetensors"
    given_ = {name: filled(DTYPES[kind], tuple(shape), i) for i, (name, (kind, shape)) in enumerate(tensors.items())}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "_PIECE_BYTES", piece)
        patched.setattr(streaming, "_SYNC_BYTES", sync)
        patched.setattr(streaming.os, "fsync", lambda file: None)
        recorded = write_tensors(path, given_)
    found = load_file(path)
    assert found.keys() == given_.keys()
    for name, tensor in given_.items():
        assert (found[name].dtype, found[name].shape, raw(found[name])) == (tensor.dtype, tensor.shape, raw(tensor))
    content = path.read_bytes()
    assert (recorded.nbytes, recorded.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_other_memory_layouts_are_written_in_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    odd = {"transposed": whole.T, "strided": whole[:, ::2], "expanded": torch.ones(1).expand(3), "scalar": whole[1, 2]}
    write_tensors(tmp_path / "x.safetensors", odd)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in odd.items())


def test_the_header_is_one_that_we_believe_and_tools_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)})
    tensors, metadata = read_header(path)
    assert list(tensors) == ["b", "a"]  # wide elements first: every tensor is aligned
    assert metadata == {"format": "pt"}
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


def test_stop_ends_it_and_closes_the_file(tmp_path: Path) -> None:
    stop = threading.Event()
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)}, stop)
    stop.set()
    with pytest.raises(AbandonedError):
        write_tensors(tmp_path / "y.safetensors", {"a": torch.ones(3)}, stop)


def test_large_files_are_synced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 100)
    monkeypatch.setattr(streaming, "_SYNC_BYTES", 400)
    monkeypatch.setattr(streaming.os, "fsync", synced.append)
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1000, dtype=torch.uint8)})
    assert len(synced) == 3  # after the header and 300 bytes or more, twice, and at the end
    assert write_bytes(tmp_path / "y", b"abc").nbytes == 3
    assert len(synced) == 4
