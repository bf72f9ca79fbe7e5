"""Runs and imported folders that earlier versions made: they open and go on, or are refused in one sentence.

`tests/fixtures/formats/make.py` says which version made which, and made `expected.json` with the same version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.open import load_model, load_tokenizer, read_model_config
from finemoe.cli.main import app
from finemoe.core.errors import FinemoeError
from finemoe.core.logs import read_json_lines
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine
from finemoe.runs.run import resume

FORMATS = Path(__file__).parents[2] / "fixtures" / "formats"
EXPECTED: dict[str, Any] = json.loads((FORMATS / "expected.json").read_text())
RUNS, IMPORTED = ("run", "run-plain"), ("imported", "imported-gguf")
RELATIVE = 2e-4  # another CPU adds in another order


@pytest.fixture
def formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all of them, in the folder that their relative paths start from."""
    shutil.copytree(FORMATS, tmp_path / "formats")
    monkeypatch.chdir(tmp_path / "formats")
    return tmp_path / "formats"


def assert_computes(path: Path, expected: dict[str, Any]) -> None:
    """The model at `path` continues the prompt as it did for the version that made it."""
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=len(expected["tokens"]))
    (done,) = Engine(load_model(path)).generate([tuple(EXPECTED["prompt"])], sampling)
    assert done.completion == expected["tokens"]
    assert done.logprobs == pytest.approx(expected["logprobs"], rel=RELATIVE)


@pytest.mark.parametrize("name", [*RUNS, *IMPORTED])
def test_it_opens_and_computes_what_it_did(name: str) -> None:
    assert_computes(FORMATS / name, EXPECTED[name])
    assert read_model_config(FORMATS / name).hidden_size == 4


@pytest.mark.parametrize("name", [*RUNS, "imported"])
def test_its_tokenizer_opens(name: str) -> None:
    assert load_tokenizer(FORMATS / name).encode("ant bee") == load_tokenizer(FORMATS / "run").encode("ant bee")


@pytest.mark.parametrize("name", [*RUNS, *IMPORTED])
def test_the_doctor_finds_nothing_wrong_with_it(name: str) -> None:
    assert not examine(FORMATS / name, deep=True).problems


@pytest.mark.parametrize("name", [*RUNS, *IMPORTED])
def test_it_is_exported(name: str, tmp_path: Path) -> None:
    export_hf(FORMATS / name, tmp_path / "exported", quiet=True)
    assert_computes(tmp_path / "exported", EXPECTED[name])
    export_gguf(FORMATS / name, tmp_path / "model.gguf", dtype="F32", tokenizer=False, quiet=True)
    assert_computes(tmp_path / "model.gguf", EXPECTED[name])


@pytest.mark.parametrize("name", RUNS)
def test_the_run_goes_on_as_it_would_have(name: str, formats: Path) -> None:
    expected = EXPECTED[name]["resumed"]
    directory = resume(formats / name, quiet=True).directory
    steps = [record for record in read_json_lines(directory / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for figure in ("loss", "gradient_norm"):
        assert [record[figure] for record in steps[2:]] == pytest.approx(expected[figure], rel=RELATIVE)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["final_validation_loss"] == pytest.approx(expected["validation_loss"], rel=RELATIVE)
    assert_computes(directory, expected)


OPENERS: dict[str, Callable[[Path], object]] = {
    "load": load_model,
    "config": read_model_config,
    "resume": lambda path: resume(path, quiet=True),
    "export": lambda path: export_hf(path, "exported", quiet=True),
    "gguf": lambda path: export_gguf(path, "model.gguf", quiet=True),
}
TOO_OLD = (
    "config.json: made by finemoe 0.1.0, whose `attention.rope_theta` is `attention.rope.theta` now; "
    "finemoe 0.1.0 (revision 37140b9) opens it, and nothing later"
)


@pytest.mark.parametrize("opener", OPENERS)
def test_a_run_of_before_rope_had_a_table_is_refused_in_one_sentence(opener: str, formats: Path) -> None:
    with pytest.raises(FinemoeError) as refused:
        OPENERS[opener](formats / "run-before-rope")
    before, _, after = str(refused.value).rpartition("/")
    assert before.endswith(("run-before-rope", "step-00000002"))
    assert after == TOO_OLD
    assert sorted(path.name for path in formats.iterdir()) == sorted(path.name for path in FORMATS.iterdir())


def test_the_doctor_says_the_same_of_it() -> None:
    (problem,) = examine(FORMATS / "run-before-rope").problems
    assert problem.text.endswith(TOO_OLD)


@pytest.mark.parametrize("verb", [("size",), ("resume",), ("generate", "--prompt", "a")], ids=lambda verb: verb[0])
def test_the_command_line_says_it_and_no_more(verb: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*verb, str(FORMATS / "run-before-rope")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.rstrip().endswith(TOO_OLD)
