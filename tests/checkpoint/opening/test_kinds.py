"""What lies at a path: one decision, asked strictly by what opens and leniently by the doctor."""

from __future__ import annotations

from pathlib import Path

import pytest

from finemoe.checkpoint.kinds import kind_of, likely_kind
from finemoe.core.errors import CheckpointError

OURS, IMPORT, THEIRS = '{"model": {}}', '{"model": {}, "source": {}}', '{"model_type": "llama"}'

CASES: dict[str, tuple[dict[str, str], str | None, str]] = {
    # files (a name ending in / is a folder) -> what kind_of says (None: refused), what likely_kind says
    "a run": ({"config.json": OURS, "checkpoints/": ""}, "run", "run"),
    "a run before its first checkpoint": ({"config.json": OURS}, "run", "run"),
    "a run that lost its config": ({"checkpoints/": ""}, "run", "run"),
    "a run whose config is damaged": ({"config.json": "{", "checkpoints/": ""}, None, "run"),
    "a checkpoint": ({"config.json": OURS, "state.json": "{}"}, "run", "checkpoint"),
    "an import": ({"config.json": IMPORT, "source.json": "{}", "manifest.json": "{}"}, "imported", "imported"),
    "an import with a damaged config": (
        {"config.json": "{", "source.json": "{}", "manifest.json": "{}"},
        "imported",
        "imported",
    ),
    "an import without its manifest": ({"config.json": IMPORT, "source.json": "{}"}, "imported", "imported"),
    "an import without its source": ({"config.json": IMPORT, "manifest.json": "{}"}, "imported", "imported"),
    "an import of which little is left": ({"source.json": "{}"}, None, "imported"),
    "an import with its journal": (
        {"config.json": IMPORT, "source.json": "{}", "manifest.json": "{}", ".model.journal": ""},
        "imported",
        "imported",
    ),
    "a Hugging Face folder": ({"config.json": THEIRS, "model.safetensors": ""}, "huggingface", "huggingface"),
    "one with a source.json of its own": ({"config.json": THEIRS, "source.json": ""}, "huggingface", "huggingface"),
    "one that another program trained": ({"config.json": THEIRS, "checkpoints/": ""}, "huggingface", "huggingface"),
    "one with a damaged config": ({"config.json": "{"}, None, "huggingface"),
    "one without its config": ({"model.safetensors": ""}, None, "huggingface"),
    "a conversion that goes on": ({"model.safetensors": "", ".model.journal": ""}, None, "unknown"),
    "nothing of ours": ({"notes.txt": ""}, None, "unknown"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder(case: str, tmp_path: Path) -> None:
    files, opened, likely = CASES[case]
    for name, text in files.items():
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text(text)
    assert likely_kind(tmp_path) == likely
    if opened is None:
        with pytest.raises(CheckpointError):
            kind_of(tmp_path)
    else:
        assert kind_of(tmp_path) == opened


@pytest.mark.parametrize(
    ("name", "opened", "likely"),
    [
        ("a.gguf", "gguf", "gguf"),
        ("a.GGUF", "gguf", "gguf"),
        ("a.safetensors", None, "tensors"),
        ("a", None, "unknown"),
    ],
)
def test_a_file(name: str, opened: str | None, likely: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    assert likely_kind(file) == likely
    if opened is None:
        with pytest.raises(CheckpointError, match="neither a run"):
            kind_of(file)
    else:
        assert kind_of(file) == opened
