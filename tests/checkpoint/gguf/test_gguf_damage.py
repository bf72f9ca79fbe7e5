"""GGUF files that are damaged or hostile: a plain sentence each, no traceback, no hang, nothing written."""

from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.gguf.gguf_files import MODELS, companions, import_folder, random_model, spelt, text
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import import_gguf, load_gguf, open_gguf
from finemoe.core.errors import CheckpointError, FinemoeError

pytest.importorskip("gguf")

F32, Q8_0, Q4_K, I32 = 0, 8, 12, 26
META = {"general.architecture": "llama"}


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def tensor(
    name: str, *shape: int, kind: int = F32, data: bytes | None = None
) -> tuple[str, tuple[int, ...], int, bytes]:
    return name, shape, kind, bytes(4 * int(np.prod(shape))) if data is None else data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file of a real model."""
    folder = tmp_path_factory.mktemp("whole")
    model = random_model({**MODELS["deepseek2-v3"], "num_layers": 2})
    export_gguf(import_folder(folder / "source", model, companions()), folder / "out.gguf", dtype="Q8_0", quiet=True)
    return (folder / "out.gguf").read_bytes()


def refusal(path: Path) -> str:
    """What import says; it must leave nothing behind."""
    before = sorted(os.listdir(path.parent))
    with pytest.raises(FinemoeError) as caught:
        import_gguf(path, path.parent / "out", quiet=True)
    assert sorted(os.listdir(path.parent)) == before
    return str(caught.value)


HEAD = b"GGUF" + struct.pack("<I", 3)
HUGE = 1 << 60
CRAFTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated, or not GGUF"),
    "magic": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "does not begin with GGUF"),
    "version 1": (spelt(META, version=1), "GGUF version 1;"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(100), "seems to be big-endian"),
    "many tensors": (spelt(META, counts=(HUGE, 1)), f"{HUGE} tensors; at most"),
    "more tensors than bytes": (spelt(META, counts=(1000, 1)), "no room for 1000 tensors"),
    "many entries": (spelt(META, counts=(0, HUGE)), f"{HUGE} metadata entries"),
    "long key": (HEAD + struct.pack("<QQQ", 0, 1, HUGE) + bytes(100), "bytes in a text"),
    "long text": (spelt({"a": struct.pack("<IQ", 8, 50 << 20)}), "no room for"),
    "long list": (spelt({"a": struct.pack("<IIQ", 9, 4, HUGE)}), "elements in a"),
    "list beyond the end": (spelt({"a": struct.pack("<IIQ", 9, 4, 1 << 20)}), "no room for"),
    "nested list": (spelt({"a": struct.pack("<IIQ", 9, 9, 1) + bytes(64)}), "a is a list of value type 9"),
    "unknown value": (spelt({"a": struct.pack("<I", 77)}), "value type 77"),
    "bad truth": (spelt({"a": struct.pack("<IB", 7, 2)}), "neither 0 nor 1"),
    "bad text": (spelt({"a": struct.pack("<I", 8) + text(b"\xff\xfe")}), "utf-8"),
    "infinite": (spelt({"a": struct.pack("<If", 6, float("inf"))}), "not finite"),
    "twice": (spelt(META, counts=(0, 2)).rstrip(b"\0") + text("general.architecture") + bytes(12), "twice"),
    "alignment": (spelt({"general.alignment": 48}), "power of two"),
    "no dimensions": (spelt(META, [("x", (), F32, b"")]), "0 dimensions"),
    "five dimensions": (spelt(META, [tensor("x", 1, 1, 1, 1, 1)]), "5 dimensions"),
    "zero": (spelt(META, [tensor("x", 0, 4)]), "not possible"),
    "overflow": (spelt(META, [tensor("x", 1 << 40, 1 << 40, data=b"")]), "not possible"),
    "unknown type": (spelt(META, [tensor("x", 4, kind=99)]), "element type 99 is unknown"),
    "unread type": (spelt(META, [tensor("x", 4, kind=I32)]), "element type I32 is not read"),
    "no whole blocks": (spelt(META, [tensor("x", 2, 40, kind=Q8_0)]), "no whole blocks of Q8_0"),
    "beyond the end": (spelt(META, [tensor("x", 1000, 1000, data=bytes(64))]), "truncated: 192 bytes"),
    "gap": (spelt(META, [tensor("x", 8), tensor("y", 8)], shift=32), "leaves a gap or overlaps"),
    "overlap": (spelt(META, [tensor("x", 16), tensor("y", 8)], shift=-32), "leaves a gap or overlaps"),
    "same name": (spelt(META, [tensor("x", 8), tensor("x", 8)]), "is in it twice"),
    "trailing": (spelt(META, [tensor("x", 8)]) + bytes(64), "more bytes than its header says"),
    "no tensors": (spelt(META), "no token_embd.weight"),
    "split": (spelt({**META, "split.count": 3, "split.no": 0}), "shard 1 of 3"),
    "split nonsense": (spelt({**META, "split.count": 3, "split.no": 9}), "no shard"),
    "embedding": (spelt(META, [tensor("token_embd.weight", 8)]), "two dimensions"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_headers_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    data, words = CRAFTED[name]
    path = write(tmp_path, data)
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in message
    assert str(path) in message
    assert peak < 20 << 20


def parts_of(data: bytes) -> Iterator[int]:
    """Lengths to cut at: all over the header, and some in the tensors."""
    yield from range(0, 400, 7)
    yield from range(400, len(data), len(data) // 150)
    yield from range(len(data) - 3, len(data))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, whole: bytes) -> None:
    for length in parts_of(whole):
        path = write(tmp_path, whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            open_gguf(path)
    assert "truncated" in refusal(write(tmp_path, whole[: len(whole) // 2]))


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path, whole: bytes) -> None:
    source = open_gguf(write(tmp_path, whole))
    assert source.config.vocab_size == 288
    os.truncate(source.path, len(whole) - 5000)
    with pytest.raises(CheckpointError, match="cut short"):
        list(source.parts())


def changed(whole: bytes, old: bytes, new: bytes) -> bytes:
    assert whole.count(old) >= 1
    assert len(old) == len(new)
    return whole.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_xy_exps.weight", "are missing: blk.1.ffn_up_exps.weight [8, 32, 64]"),
        (b"blk.0.attn_norm.weight", b"blk.7.attn_norm.weight", "are missing: blk.0.attn_norm.weight"),
        (b"deepseek2.expert_shared_count", b"deepseek2.expert_shared_cuont", "not known here"),
        (b"general.architecture", b"general.architectuer", "general.architecture is None"),
        (
            b"deepseek2.attention.kv_lora_rank",
            b"deepseek2.attention.kv_lora_ramk",
            "has no deepseek2.attention.kv_lora",
        ),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergse", ""),
        (b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokem_type", ""),
    ],
)
def test_names_that_are_wrong_are_named(tmp_path: Path, whole: bytes, old: bytes, new: bytes, words: str) -> None:
    path = write(tmp_path, changed(whole, old, new))
    if words:
        assert words in refusal(path)
    else:  # a tokenizer without merges, or of plain tokens only, is one
        open_gguf(path).tokenizer()


def test_shapes_must_be_those_of_the_metadata(tmp_path: Path, whole: bytes) -> None:
    key = b"deepseek2.expert_feed_forward_length" + struct.pack("<I", 4)
    at = whole.index(key) + len(key)
    path = write(tmp_path, whole[:at] + struct.pack("<I", 64) + whole[at + 4 :])
    message = refusal(path)
    assert "another shape than the metadata give them" in message
    assert "blk.1.ffn_gate_exps.weight ([8, 32, 64] instead of [8, 64, 64])" in message


def test_no_number_in_the_metadata_makes_trouble(tmp_path: Path, whole: bytes) -> None:
    numbers = 0
    for key, value in open_gguf(write(tmp_path, whole)).metadata.items():
        mark = key.encode() + struct.pack("<II", 4, value) if type(value) is int else b""
        if not mark or not key.startswith(("deepseek2.", "general.")):
            continue
        at = whole.index(mark) + len(mark) - 4
        for other in (0, 1, 1 << 16, (1 << 31) - 1, (1 << 32) - 1):
            path = write(tmp_path, whole[:at] + struct.pack("<I", other) + whole[at + 4 :])
            with contextlib.suppress(CheckpointError):
                open_gguf(path).dtypes()
        numbers += 1
    assert numbers > 15


def test_tensors_that_belong_to_nothing_stop_the_import(tmp_path: Path, whole: bytes) -> None:
    key = b"deepseek2.block_count" + struct.pack("<I", 4)
    at = whole.index(key) + len(key)
    assert "belong to nothing" in refusal(write(tmp_path, whole[:at] + struct.pack("<I", 1) + whole[at + 4 :]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_down_exps.weight"])
def test_numbers_that_are_none_stop_the_import(tmp_path: Path, whole: bytes, name: str, value: float) -> None:
    path = write(tmp_path, whole)
    found = open_gguf(path).tensors[name]
    data = bytearray(whole)
    form = "<f" if found.kind.name == "F32" else "<e"  # the first value, or the scale of the first block
    data[found.offset : found.offset + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(data)
    assert f"{name}: " in (message := refusal(path))
    assert "NaN or infinite" in message
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eos_token_id", 5000, "outside"),
        ("add_eos_token", True, "not read"),
        ("tokens", [1, 2, 3], "list of str"),
        ("token_type", ["a"], "list of int"),
        ("model", "rwkv", "'rwkv' is not known"),
        ("pre", "nonsense", "nonsense"),
        ("bos_token_id", "zero", "must be int"),
        ("tokens", ["a", "a"], "2 ids"),
    ],
)
def test_tokenizers_that_are_none_are_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    sound = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "token_type": [1, 3], "eos_token_id": 1}
    values = {f"tokenizer.ggml.{name}": found for name, found in {**sound, key: value}.items()}
    path = write(tmp_path, spelt({**META, **values}))
    with pytest.raises(FinemoeError, match=words):
        open_gguf(path).tokenizer()


def test_a_template_must_be_a_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a text"):
        open_gguf(write(tmp_path, spelt({**META, "tokenizer.chat_template": 3}))).chat_template()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "absent.gguf", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(CheckpointError, match=words):
            open_gguf(path)


@settings(max_examples=max(60, settings().max_examples))
@given(data=st.data())
def test_random_damage_is_harmless(tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject) -> None:
    header = 12_000
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        fresh = data.draw(st.binary(min_size=1, max_size=8))
        damaged[at : at + len(fresh)] = fresh
    folder = tmp_path_factory.mktemp("damaged")
    path = write(folder, bytes(damaged))
    try:
        import_gguf(path, folder / "out", quiet=True)
    except FinemoeError:
        assert os.listdir(folder) == ["model.gguf"]
    else:
        assert sorted(os.listdir(folder)) == ["model.gguf", "out"]
