"""The tokenizer: nothing is lost, nothing in a text becomes special, streaming agrees with decoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from finemoe.core.errors import DataError
from finemoe.text import END_OF_TEXT, Tokenizer, files, require_faithful

TEXTS = ["def f(x):\n    if x:\n        return x + 12345\n" * 20, "naïve café 床前明月光 " * 20]
TOKENIZER = Tokenizer.train(TEXTS, 300)


def byte_level(special: str, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """A tokenizer as others publish it: byte-level, with its own name for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens([special])
    return inner


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.end_of_text_id not in ids
    assert all(0 <= token_id < TOKENIZER.vocab_size for token_id in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_streaming_any_ids_agrees_with_decoding_them_and_with_the_library(ids: list[int]) -> None:
    stream = TOKENIZER.decoder()
    streamed = "".join([*(stream.push(token_id) for token_id in ids), stream.finish()])
    library = tokenizers.Tokenizer.from_str(TOKENIZER._json).decode(ids, skip_special_tokens=False)
    assert streamed == TOKENIZER.decode(ids) == library


def test_streaming_holds_back_incomplete_characters() -> None:
    byte_ids = [i for i, content in TOKENIZER.token_bytes.items() if content in [b"\xf0", b"\x9f", b"\x99", b"\x82"]]
    by_content = {TOKENIZER.token_bytes[i]: i for i in byte_ids}
    stream = TOKENIZER.decoder()
    pushed = [stream.push(by_content[bytes([byte])]) for byte in "🙂".encode()]
    assert pushed == ["", "", "", "🙂"]
    stream.push(by_content[b"\xf0"])
    assert stream.finish() == "\ufffd"


def test_special_token_in_a_document_is_text() -> None:
    ids = TOKENIZER.encode(END_OF_TEXT)
    assert TOKENIZER.end_of_text_id not in ids
    assert len(ids) > 1
    assert TOKENIZER.decode([TOKENIZER.end_of_text_id]) == END_OF_TEXT


def test_training_is_deterministic_and_complete() -> None:
    again = Tokenizer.train(iter(TEXTS), 300)
    assert again.fingerprint() == TOKENIZER.fingerprint()
    assert again.vocab_size == 300
    single = {content for content in again.token_bytes.values() if len(content) == 1}
    assert single == {bytes([byte]) for byte in range(256)}
    assert Tokenizer.train(TEXTS, 280).fingerprint() != TOKENIZER.fingerprint()


def test_digits_stand_alone_and_indentation_merges() -> None:
    tokenizer = Tokenizer.train(TEXTS[:1], 400)
    contents = [tokenizer.token_bytes[i] for i in tokenizer.encode("x = 12345\n        return")]
    assert [c for c in contents if c.strip().isdigit()] == [b"1", b"2", b"3", b"4", b"5"]
    assert b" " * 7 in contents


def test_training_refuses_a_vocabulary_below_the_bytes() -> None:
    with pytest.raises(DataError, match="vocab_size 256 is too small"):
        Tokenizer.train(TEXTS, 256)


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint() == TOKENIZER.fingerprint()
        assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
        assert loaded.end_of_text_id == TOKENIZER.end_of_text_id
        require_faithful(loaded, TEXTS)


def test_encode_batch_is_encode() -> None:
    texts = ["", "a", *TEXTS, END_OF_TEXT]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_foreign_byte_level_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level("<｜end▁of▁sentence｜>").save(str(path))
    loaded = Tokenizer.load(path)
    assert loaded.end_of_text_id == 256
    require_faithful(loaded)
    assert 256 not in loaded.encode("<｜end▁of▁sentence｜>")


def test_self_test_names_the_text_that_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level("</s>", normalizers.Lowercase()).save(str(path))
    loaded = Tokenizer.load(path)
    with pytest.raises(DataError, match="LOUD"):
        require_faithful(loaded, ["quiet LOUD quiet"])


def test_self_test_finds_normalisation_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level("</s>", normalizers.NFC()).save(str(path))
    with pytest.raises(DataError, match="does not give this text back"):
        require_faithful(Tokenizer.load(path))


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(path)
    byte_level("<unheard-of>").save(str(path))
    with pytest.raises(DataError, match="no end-of-text token"):
        Tokenizer.load(path)
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "decoder": None}))
    with pytest.raises(DataError, match="only byte-level"):
        Tokenizer.load(path)


def test_decoding_an_unknown_id_is_an_error() -> None:
    with pytest.raises(DataError, match="token id 300 is not in the vocabulary"):
        TOKENIZER.decode([300])


def test_a_forked_process_can_encode() -> None:
    code = (
        "import os\n"
        "from finemoe.text import Tokenizer\n"
        "tokenizer = Tokenizer.train(['some text'], 257)\n"
        "expected = tokenizer.encode_batch(['some text'] * 100)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if tokenizer.encode_batch(['some text'] * 100) == expected else 1)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BRACKETS", 1000)
    (tmp_path / "tokenizer.json").write_text('{"model": [' + "[]," * 1000 + "[]]}")
    with pytest.raises(DataError, match="1000 lists and objects"):
        Tokenizer.load(tmp_path)
