"""Published vocabularies with the ids that llama.cpp gives their test texts; skipped where the files are not."""

from __future__ import annotations

import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from finemoe.text import Tokenizer, fidelity, require_faithful, tokenizer_from_vocabulary, vocabulary_of

SHARED = Path(os.environ.get("FINEMOE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
FOLDER = SHARED / "tokenizers"
SEPARATOR = "\n__ggml_vocab_test__\n"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no tokenizers in {FOLDER}")]


def cases(name: str) -> list[tuple[str, list[int]]]:
    texts = (FOLDER / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    ids = (FOLDER / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    assert len(texts) == len(ids) == 47  # the last is empty
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, ids, strict=True)]


def read(name: str) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(FOLDER / f"ggml-vocab-{name}.gguf").fields
    return {key.split(".")[-1]: field.contents() for key, field in fields.items() if key.startswith("tokenizer.ggml.")}


@pytest.mark.parametrize("name", ["deepseek-llm", "deepseek-coder", "gpt-2"])
def test_ids_are_llama_cpps_and_the_vocabulary_comes_back(name: str) -> None:
    facts = read(name)
    tokenizer = tokenizer_from_vocabulary(
        facts["tokens"],
        facts["merges"],
        facts["token_type"],
        facts["pre"],
        bos_id=facts["bos_token_id"],
        eos_id=facts["eos_token_id"],
        add_bos=facts.get("add_bos_token"),
    )
    wrong = [text for text, ids in cases(name) if tokenizer.encode(text) != ids]
    assert not wrong
    assert fidelity(tokenizer).problems == ()
    require_faithful(tokenizer, (text for text, _ in cases(name)))
    assert tokenizer.adds_bos == name.startswith("deepseek")
    assert tokenizer.vocab_size == len(facts["tokens"])
    back = vocabulary_of(tokenizer)
    assert back.pre == name
    assert list(back.tokens) == facts["tokens"]
    assert list(back.token_types) == [int(kind) for kind in facts["token_type"]]
    assert list(back.merges) == facts["merges"]
    assert (back.bos_id, back.eos_id) == (facts["bos_token_id"], facts["eos_token_id"])


def test_a_tokenizer_json_of_deepseek_llm_gives_the_same_ids() -> None:
    with lzma.open(FOLDER / "deepseek_llm_tokenizer.json.xz", "rt", encoding="utf-8") as file:
        tokenizer = Tokenizer.parse(file.read(), "deepseek-llm")
    assert [text for text, ids in cases("deepseek-llm") if tokenizer.encode(text) != ids] == []
    assert tokenizer.encode_template("<｜begin▁of▁sentence｜>") == [100000] == [tokenizer.bos_id]
    assert 100000 not in tokenizer.encode("<｜begin▁of▁sentence｜>")
