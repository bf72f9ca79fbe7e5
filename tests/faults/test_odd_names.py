"""Files whose names are no UTF-8, as an old archive leaves them: read, told, and never a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finemoe.core.errors import ConfigError
from finemoe.runs.run import resume, train
from finemoe.runs.start import default_directory
from runs.tiny_runs import recipe, write_corpus

LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
def latin(tmp_path: Path) -> Path:
    """A corpus with a folder of such a name, and a picture in it."""
    corpus = write_corpus(tmp_path / "corpus")
    try:
        (corpus / "train" / LATIN).mkdir()
    except OSError:
        pytest.skip("names are UTF-8 here")
    (corpus / "train" / "0.txt").rename(corpus / "train" / LATIN / f"{LATIN}.txt")
    (corpus / "train" / LATIN / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    return corpus


def test_such_files_are_read_and_told(latin: Path, tmp_path: Path) -> None:
    out = train(recipe(latin, "dense"), out=tmp_path / "run", quiet=True).directory
    data = json.loads((out / "data.json").read_text())
    assert data["documents"]["train"] == 8
    assert data["set_aside"][0]["name"].endswith(r"caf\udce9/picture.png")
    assert resume(out, overrides=["training.steps=7"], quiet=True).summary["steps"] == 7


def test_a_recipe_that_names_them_says_how_and_a_pattern_reads_them(latin: Path, tmp_path: Path) -> None:
    named = {"paths": [str(latin / "train" / LATIN / "*.txt")]}
    with pytest.raises(ConfigError, match=r"`data\.corpus\.paths` is not UTF-8 .*write \? in a pattern"):
        train(recipe(latin, "dense", data={"corpus": named}), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    pattern = {"paths": [str(latin / "train" / "caf?" / "*.txt"), str(latin / "train")]}
    assert (
        train(recipe(latin, "dense", data={"corpus": pattern}), out=tmp_path / "run", quiet=True).summary["steps"] == 6
    )


def test_a_name_of_many_bytes_is_told_before_the_system_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"at most 100 characters or 220 bytes"):
        default_directory("名" * 90)
    assert default_directory("名" * 60).name.startswith("名")
