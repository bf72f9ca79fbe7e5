"""A tokenizer, a template or settings of generation that cannot be read: an import goes on without, and says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.published import LLAMA, publish
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.open import load_model


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def link_nowhere(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to("gone")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 7\n"
UNREADABLE: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "tokenizer is deep": ("tokenizer.json", text("tokenizer.json", "[" * 100_000), "levels deep", "token ids alone"),
    "tokenizer is huge": (
        "tokenizer.json",
        lambda f: os.truncate(f / "tokenizer.json", 1 << 30),
        "has at most",
        "token ids alone",
    ),
    "tokenizer was not fetched": ("tokenizer.json", text("tokenizer.json", POINTER), "Git LFS", "token ids alone"),
    "tokenizer config is a page": (
        "tokenizer_config.json",
        text("tokenizer_config.json", "<!DOCTYPE html><html><body>404</body></html>"),
        "an HTML page: fetch the file itself again",
        "what begins a text",
    ),
    "tokenizer config says a key twice": (
        "tokenizer_config.json",
        text("tokenizer_config.json", '{"a": 1, "a": 2}'),
        "key 'a' occurs twice",
        "what begins a text",
    ),
    "special tokens are NaN": (
        "special_tokens_map.json",
        text("special_tokens_map.json", '{"a": NaN}'),
        "NaN is not",
        "special tokens",
    ),
    "generation config is no JSON": (
        "generation_config.json",
        text("generation_config.json", "x"),
        "not valid JSON",
        "end a generation",
    ),
    "generation config is empty": (
        "generation_config.json",
        text("generation_config.json", ""),
        "is empty",
        "end a generation",
    ),
    "generation config links nowhere": (
        "generation_config.json",
        link_nowhere,
        "does not exist",
        "end a generation",
    ),
    "template is a page": (
        "chat_template.jinja",
        text("chat_template.jinja", "<html><head></head></html>"),
        "an HTML page: fetch the file itself again",
        "chat template",
    ),
    "template was not fetched": ("chat_template.jinja", text("chat_template.jinja", POINTER), "Git LFS", "template"),
    "template is a picture": (
        "chat_template.jinja",
        text("chat_template.jinja", b"\x89PNG\r\n\x1a\n\0\0"),
        "a picture",
        "template",
    ),
    "template is no UTF-8": ("chat_template.jinja", text("chat_template.jinja", b"{{ \xff }}"), "UTF-8", "template"),
    "template is blank": ("chat_template.jinja", text("chat_template.jinja", " \n"), "is empty", "template"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_companion_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file, damage, reason, lost = UNREADABLE[name]
    source = publish(tmp_path / "source", LLAMA, shards=3)
    damage(source)
    report = import_hf(source, tmp_path / "out", quiet=True)
    (warning,) = [text for text in report.warnings if file in text]
    assert reason in warning
    assert lost in warning.partition("left out")[2]
    assert warning in caplog.text  # before the weights are copied
    assert not (tmp_path / "out" / file).exists()
    load_model(tmp_path / "out")
