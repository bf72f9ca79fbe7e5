"""Sound checkpoints of every kind, and copies of them to be harmed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.doctor.examined import (
    LLAMA_WIDE,
    ROOMY,
    V3_FP8_WIDE,
    V3_WIDE,
    mended,
    with_template,
)
from checkpoint.huggingface.published import MIXTRAL, publish
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("originals")
    mended(publish(home / "v3", V3_WIDE, shards=3))
    with_template(
        mended(publish(home / "fp8", V3_FP8_WIDE)), "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    )
    mended(publish(home / "llama", LLAMA_WIDE))
    mended(publish(home / "mixtral", {**MIXTRAL, **ROOMY}))
    import_hf(home / "v3", home / "imported", quiet=True)
    import_hf(home / "fp8", home / "imported_fp8", quiet=True)
    import_hf(home / "llama", home / "imported_llama", quiet=True)
    export_gguf(home / "imported", home / "v3.gguf", dtype="F32", quiet=True)
    export_gguf(home / "imported_llama", home / "llama.gguf", quiet=True)
    run = home / "run"
    run.mkdir()
    config = expand(resolve({"preset": "tiny-moe", "vocab_size": 300}, "test"))
    model = Transformer(config)
    initialize(model, seed=1)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    (run / "config.json").write_text(text)
    for step in (1, 2):
        save(run / "checkpoints", step, RunState(model.state_dict(), {}, {"step": step}, text), keep=2)
    Tokenizer.train(["abc"] * 5, vocab_size=290).save(run / "tokenizer.json")
    return home


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        source, target = originals / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target

    return make
