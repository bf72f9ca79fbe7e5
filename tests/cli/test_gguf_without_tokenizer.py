"""A tokenizer of version 0.1 has no name in GGUF: refused with the way out, and the way out works; today's has one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finemoe.text import Tokenizer

pytest.importorskip("gguf")


def test_own_tokenizer_is_refused_with_the_way_out(run_directory: Path, tmp_path: Path, command: Any) -> None:
    assert command("export", run_directory, tmp_path / "today.gguf", "--quiet").exit_code == 0
    before = tmp_path / "before"
    shutil.copytree(run_directory, before)
    Tokenizer.train(["def main():\n    return 1\n"] * 5, 290, "finemoe").save(before)
    refused = command("export", before, tmp_path / "tiny.gguf", "--quiet")
    assert refused.exit_code == 2
    assert "--no-tokenizer" in refused.stderr
    assert not (tmp_path / "tiny.gguf").exists()


def test_without_it_the_weights_are_written(run_directory: Path, tmp_path: Path, command: Any) -> None:
    done = command("export", run_directory, tmp_path / "tiny.gguf", "--no-tokenizer", "--dtype", "f32", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert "token ids" in done.stdout


def test_it_is_for_gguf_only(run_directory: Path, tmp_path: Path, command: Any) -> None:
    refused = command("export", run_directory, tmp_path / "folder", "--no-tokenizer")
    assert (refused.exit_code, "--no-tokenizer is for GGUF" in refused.stderr) == (2, True)
