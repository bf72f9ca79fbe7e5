"""LanguageModel: how a model reads texts and messages, whoever asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finemoe.checkpoint.kinds import STATE
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.open import text_home
from finemoe.core.errors import CheckpointError, DataError
from finemoe.text import Tokenizer, TokenizerSettings

PLAIN = Tokenizer.train(["def main():\n    return 1\n"] * 5, vocab_size=290)
BEGINS = Tokenizer.parse(
    PLAIN.to_json(), "test", TokenizerSettings({"bos_token": "<|end_of_text|>"}, add_bos_token=True)
)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def opened(folder: Path, own: bool) -> LanguageModel:
    return LanguageModel(None, BEGINS, folder, own, None)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def test_only_models_from_elsewhere_begin_with_the_beginning_token(folder: Path) -> None:
    plain, end = BEGINS.encode("def"), BEGINS.end_of_text_id
    assert opened(folder, own=True).encode("def") == plain
    assert opened(folder, own=False).encode("def") == [end, *plain]
    assert opened(folder, own=True).first_id == opened(folder, own=False).first_id == end


@pytest.mark.parametrize("own", [True, False])
def test_messages_are_encoded_as_the_template_writes_them(folder: Path, own: bool) -> None:
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "def"}]
    text, ids = opened(folder, own).encode_chat(messages)
    assert text == "system: Be.\nuser: def\na:"
    assert ids == BEGINS.encode_template(text)


def test_without_a_template_messages_are_refused(tmp_path: Path) -> None:
    assert opened(tmp_path, True).template is None
    with pytest.raises(DataError, match="has no chat template, so it was not made to answer"):
        opened(tmp_path, True).encode_chat([{"role": "user", "content": "def"}])


def test_a_damaged_template_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    made = opened(tmp_path, True)
    assert made.encode("def")  # who reads text alone is not kept from it
    with pytest.raises(DataError, match="chat_template must be text"):
        made.encode_chat([{"role": "user", "content": "def"}])


def test_a_checkpoint_taken_out_of_its_run_says_where_its_tokenizer_is(tmp_path: Path) -> None:
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8" / STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer lies in the run's own folder.*copy the whole run"):
        text_home(tmp_path / "step-8")
