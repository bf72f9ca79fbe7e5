"""What ends a text is kept on every way, wherever the source says it: in which file, one or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.doctor.examined import LLAMA_WIDE, mended
from checkpoint.huggingface.published import publish
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.open import load_chat_template, load_tokenizer

pytest.importorskip("gguf")


def published(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    mended(publish(folder, {**LLAMA_WIDE, **config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": [0, 5, 6]}, None, {0, 5, 6}),
        ({"eos_token_id": 5}, {"temperature": 0.6}, {0, 5}),
        ({"eos_token_id": [0, 5, 6]}, {"eos_token_id": [0, 7]}, {0, 7}),
        ({"eos_token_id": None}, None, {0}),
    ],
)
def test_stops_are_those_of_the_source(
    config: dict[str, Any], generation: dict[str, Any] | None, stops: set[int], tmp_path: Path
) -> None:
    source = published(tmp_path / "source", config, generation)
    import_hf(source, tmp_path / "imported", quiet=True)
    export_gguf(tmp_path / "imported", tmp_path / "model.gguf", quiet=True)
    export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    for name in ("source", "imported", "model.gguf", "exported"):
        assert load_tokenizer(tmp_path / name).stop_ids == stops, name


def test_more_ends_than_a_gguf_file_names_are_told(tmp_path: Path) -> None:
    source = published(tmp_path / "source", {"eos_token_id": [0, 5, 6, 7, 8]}, None)
    import_hf(source, tmp_path / "imported", quiet=True)
    report = export_gguf(tmp_path / "imported", tmp_path / "model.gguf", quiet=True)
    note = "of the tokens that end a generation GGUF names three; left out: 7, 8"
    assert note in report.notes
    assert note in examine(source).facts["exports"][-1]["lost"]
    assert load_tokenizer(tmp_path / "model.gguf").stop_ids == {0, 5, 6}


def test_ends_in_the_map_of_older_repositories_reach_a_gguf_file(tmp_path: Path) -> None:
    source = published(tmp_path / "source", {"eos_token_id": None}, None)
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace("<|end_of_text|>", "<the end>"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (source / "special_tokens_map.json").write_text('{"eos_token": "<the end>", "bos_token": {"content": "a"}}')
    (source / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
    end = load_tokenizer(source).end_of_text_id
    import_hf(source, tmp_path / "imported", quiet=True)
    export_gguf(tmp_path / "imported", tmp_path / "model.gguf", quiet=True)
    for name in ("source", "imported", "model.gguf"):
        tokenizer, template = load_tokenizer(tmp_path / name), load_chat_template(tmp_path / name)
        assert (tokenizer.end_of_text_id, tokenizer.stop_ids) == (end, {end}), name
        assert tokenizer.bos_id == tokenizer.id_of("a"), name
        assert template is not None
        assert template.render([]) == "a<the end>", name
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        (source / name).write_text((source / name).read_text(), encoding="utf-16")
    assert "no tokenizer" not in str(examine(source).facts["exports"][-1])
    (source / "special_tokens_map.json").write_text("{")  # nothing else needs it
    said = str(examine(source).facts["exports"][-1])
    assert "no tokenizer, so --no-tokenizer must be given: " in said
    assert "no end-of-text token" in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_companion(encoding: str, tmp_path: Path) -> None:
    """As the readers of folders have it, so that a file inside a GGUF file says the same."""
    source = published(tmp_path / "source", {}, {"eos_token_id": [0, 7]})
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}é")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text((source / name).read_text(), encoding=encoding)
    assert examine(source).problems == ()
    import_hf(source, tmp_path / "imported", quiet=True)
    export_gguf(tmp_path / "imported", tmp_path / "model.gguf", quiet=True)
    for name in ("source", "imported", "model.gguf"):
        template = load_chat_template(tmp_path / name)
        assert template is not None
        assert template.render([{"role": "user", "content": "a"}]) == "aé", name
        assert load_tokenizer(tmp_path / name).stop_ids == {0, 7}
