"""What a newcomer trains runs elsewhere: transformers gives our logits and ids, a GGUF file keeps the ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import load_gguf, open_gguf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.portability import portability
from finemoe.core.errors import DataError
from finemoe.model.config import expand
from finemoe.model.presets import PRESETS, resolve
from finemoe.runs.run import train
from finemoe.text import Tokenizer, vocabulary_of
from finemoe.text.fidelity import AWKWARD

_MIXED = "aZ 09'sStT\n\r\t.,=()<>_#-|é\u0301\u0938\u093f床の가ſ\u00a0\u2003\u0085\u2028\ufeff🙂👩\u200d½²٣€"
_TEXT = "def f(x):\n    if x:\n        return 'it' + \"don't\"  # I'LL 3.14159\n\nnaïve café 床前明月光 हिन्दी\n"


def texts() -> list[str]:
    draw = random.Random(1)
    mixed = ["".join(draw.choice(_MIXED) for _ in range(draw.randint(1, 30))) for _ in range(300)]
    return [*AWKWARD, _TEXT, "<|end_of_text|>", *mixed]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    with (home / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{i} {_TEXT}" * 4}) + "\n" for i in range(60))
    recipe = {
        "model": {"preset": "tiny-lite", "vocab_size": 400},
        "data": {
            "corpus": {"kind": "files", "paths": [str(home / "corpus.jsonl")]},
            "sequence_length": 32,
            "cache_dir": str(home / "cache"),
        },
        "training": {"steps": 20, "tokens_per_step": 256},
    }
    return train(recipe, out=home / "run", quiet=True).directory


def test_transformers_reads_the_export_as_we_read_the_run(run: Path, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    export_hf(run, tmp_path / "out", quiet=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.load(run)
    for text in texts():
        assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours.encode(text), text
    ids = torch.tensor([ours.encode(_TEXT)[:64]])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    mine = load_model(run)
    with torch.no_grad():
        expected, found = mine.logits(mine(ids).hidden), model.eval()(ids, use_cache=False).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_gguf_file_of_it_gives_the_same_ids_and_logits(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export_gguf(run, tmp_path / "out.gguf", dtype="F32", quiet=True)
    ours, theirs = Tokenizer.load(run), open_gguf(tmp_path / "out.gguf").tokenizer()
    assert vocabulary_of(ours).pre == "qwen2"
    for text in texts():
        if "ſ" not in text:  # a published tokenizer of Qwen, which the file is read as, takes it for an s after '
            assert theirs.encode(text) == ours.encode(text), text
    assert theirs.end_of_text_id == ours.end_of_text_id
    ids = torch.tensor([ours.encode(_TEXT)[:64]])
    mine, again = load_model(run), load_gguf(tmp_path / "out.gguf")
    with torch.no_grad():
        assert torch.equal(again.logits(again(ids).hidden), mine.logits(mine(ids).hidden))


def test_the_splitting_of_old_runs_has_no_name_elsewhere() -> None:
    old = Tokenizer.train([_TEXT * 5], 300, "finemoe")
    assert old.decode(old.encode(_TEXT)) == _TEXT
    with pytest.raises(DataError, match="GGUF has no name for"):
        vocabulary_of(old)


@pytest.mark.parametrize(
    ("name", "short", "words"),
    [
        ("tiny-lite", "TL", "transformers runs it (deepseek_v2); llama.cpp runs it (deepseek2)"),
        ("tiny-dense", "TL", "transformers runs it (llama); llama.cpp runs it (llama)"),
        ("tiny-moe", "L", "transformers has no class for it (deepseek); llama.cpp runs it (deepseek)"),
        ("tiny-v2", "T", "transformers runs it (deepseek_v2); not llama.cpp: "),
        ("hash-2b", "–", "no Hugging Face family computes it; not llama.cpp: "),
    ],
)
def test_where_a_model_runs_is_known_before_it_is_trained(name: str, short: str, words: str) -> None:
    found = portability(expand(resolve(PRESETS[name].model, name)))
    assert found.short == short
    assert found.sentence().startswith(f"when exported: {words}")
