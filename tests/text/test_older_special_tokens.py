"""special_tokens_map.json, where older repositories keep the end of a text; and odd ones, which stop nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Bare
from tokenizers import decoders, models, pre_tokenizers

from finemoe.text import Tokenizer
from finemoe.text.chat import ChatTemplate


def folder_of(path: Path, special: Any, config: dict[str, Any] | None = None) -> Path:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<mine>", "<other>"]
    bare = Bare(models.BPE({name: at for at, name in enumerate(names)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(["<mine>", "<other>"])
    bare.save(str(path / "tokenizer.json"))
    (path / "special_tokens_map.json").write_text(special if isinstance(special, str) else json.dumps(special))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "special",
    [
        {"eos_token": "<mine>"},
        {"eos_token": {"content": "<mine>", "lstrip": False}},
        {"eos_token": "<mine>", "bos_token": ["odd"], "pad_token": 3, "additional_special_tokens": ["<other>"]},
    ],
)
@pytest.mark.parametrize("config", [None, {}, {"eos_token": None}])
def test_the_end_of_a_text_is_found_there(tmp_path: Path, special: Any, config: dict[str, Any] | None) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, special, config))
    assert tokenizer.token_bytes[tokenizer.end_of_text_id] == b"<mine>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "a"}]) == "a<mine>"


@pytest.mark.parametrize("special", [{"eos_token": "<mine>"}, {"eos_token": 3}, [], "not json", "[" * 9999])
def test_tokenizer_config_comes_first_and_an_odd_file_stops_nothing(tmp_path: Path, special: Any) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, special, {"eos_token": "<other>"}))
    assert tokenizer.token_bytes[tokenizer.end_of_text_id] == b"<other>"
