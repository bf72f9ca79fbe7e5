"""Token streams on disk: written in blocks by a thread, read back through the memory map, refused when foreign."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data.documents import document
from finemoe.data import shards as shards_module
from finemoe.data.cache import DamagedError
from finemoe.data.shards import TokenWriter, open_streams
from finemoe.text import END_OF_TEXT, Tokenizer


def test_long_texts_are_encoded_in_pieces_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_BLOCK_CHARS", 100)
    tokenizer = Tokenizer.train([document(1)], 300)
    texts = ["line\n" * 95, "no line ends " * 50, "short", "x" * 100]
    with TokenWriter(tmp_path, ["a", "b"], tokenizer) as writer:
        for text in texts:
            writer.add("a", text)
        writer.finish()
    opened = open_streams(tmp_path)
    assert tokenizer.decode(opened["a"].tolist()) == END_OF_TEXT.join([*texts, ""])
    assert (opened["a"] == tokenizer.end_of_text_id).sum() == 4
    assert isinstance(opened["a"], np.memmap)
    assert opened["a"].dtype == np.uint16
    assert len(opened["b"]) == 0


def test_blocks_are_written_in_order_whatever_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train([document(1)], 300)
    documents = [("ab"[(i * i) % 3 % 2], document(i, 1 + i % 7)) for i in range(60)]
    expected: dict[str, list[int]] = {"a": [], "b": []}
    for name, text in documents:
        expected[name] += [*tokenizer.encode(text), tokenizer.end_of_text_id]
    for chars, texts in ((1, 1), (37, 1000), (1 << 20, 7), (1 << 20, 60), (1 << 20, 1000)):
        monkeypatch.setattr(shards_module, "_BLOCK_CHARS", chars)
        monkeypatch.setattr(shards_module, "_BLOCK_TEXTS", texts)
        monkeypatch.setattr(shards_module, "_pieces", lambda text: [text])  # whose tokens depend on where it is cut
        folder = tmp_path / f"{chars}-{texts}"
        folder.mkdir()
        with TokenWriter(folder, ["a", "b"], tokenizer) as writer:
            for name, text in documents:
                writer.add(name, text)
            writer.finish()
        assert {name: ids.tolist() for name, ids in open_streams(folder).items()} == expected
        monkeypatch.undo()


def test_an_error_in_the_thread_that_tokenises_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
        raise MemoryError("too much")

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    before = threading.active_count()
    with TokenWriter(tmp_path, ["a"], Tokenizer.train(["x"], 300)) as writer:
        writer.add("a", "text")
        with pytest.raises(MemoryError, match="too much"):
            writer.finish()
    assert threading.active_count() == before


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: 70_000 + i for i, char in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    with TokenWriter(tmp_path, ["a"], tokenizer) as writer:
        writer.add("a", "text")
        writer.finish()
    opened = open_streams(tmp_path)["a"]
    assert opened.dtype == np.uint32
    assert tokenizer.decode(opened[:4].tolist()) == "text"
    assert opened.min() >= 256


def test_a_foreign_format_is_damage(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"format": 0, "dtype": "<u2", "streams": {}}))
    with pytest.raises(DamagedError, match="format 0"):
        open_streams(tmp_path)
