"""`finemoe doctor`: problems on top, everything within 80 columns, and a status that scripts can trust."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.published import V3_FP8, publish
from finemoe.cli.doctor import nbytes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    publish(Path("v3"), {**V3_FP8, "vocab_size": 300}, shards=2)
    (Path("v3") / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return Path("v3")


def rows(output: str) -> dict[str, str]:
    """Title -> text, of the lines that begin one."""
    return {line[:19].strip(): line[21:].strip() for line in output.splitlines() if line[:1].strip()}


def test_a_sound_checkpoint(folder: Path, command: Any) -> None:
    result = command("doctor", folder)
    shown = rows(result.stdout)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "v3: a Hugging Face folder, deepseek_v3"
    assert "2 of 4 routed, 1 shared" in shown["Experts"]
    assert shown["Prediction modules"] == "1 announced, 1 in the weights"
    assert "placed" in shown["Tensors"]
    assert "F8_E4M3" in shown["Element types"]
    assert shown["Chat template"] == "renders; Hello is 'Hello', 1 tokens" or "Hello" in shown["Chat template"]
    assert shown["Exported as"] == "deepseek_v3: nothing is lost"
    assert "warning: tokenizer" in shown, "the class trap"
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout.splitlines()[-1] == "No problems, 1 warning."


def test_problems_come_first_and_give_status_1(folder: Path, command: Any) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    (folder / "tokenizer.json").write_text("{}")
    result = command("doctor", folder)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[2].startswith("problem: files")
    kinds = [line.split(":")[0] for line in lines if line.startswith(("problem", "warning", "note"))]
    assert kinds.index("note") > max(i for i, kind in enumerate(kinds) if kind != "note")
    assert lines[-1].startswith("2 problems")
    assert max(map(len, lines)) <= 80


def test_json_holds_everything_and_nothing_else_is_on_stdout(folder: Path, command: Any) -> None:
    result = command("doctor", folder, "--json", "--deep")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["sound"], found["kind"], found["family"]) == (0, True, "huggingface", "deepseek_v3")
    assert found["values"] == {"looked_at": found["values"]["of"], "of": found["values"]["of"], "deep": True}
    assert {"severity", "about", "text"} == set(found["findings"][0])
    os.truncate(folder / "config.json", 10)
    result = command("doctor", folder, "--json")
    assert (result.exit_code, json.loads(result.stdout)["sound"]) == (1, False)


def test_a_run(run_directory: Path, command: Any) -> None:
    result = command("doctor", run_directory)
    assert result.exit_code == 0
    assert rows(result.stdout)["Checkpoints"] == "step-00000001"
    assert "no optimizer state" in result.stdout


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (None, 2, "no such file or folder"),
        ("folder", 1, "neither a run, nor an imported folder"),
        ("file.txt", 1, "only .gguf and .safetensors files are"),
        ("odd.gguf", 1, "not a GGUF file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, command: Any, make: str | None, status: int, words: str) -> None:
    path = tmp_path / (make or "absent")
    if make == "folder":
        path.mkdir()
    elif make:
        path.write_text("something else")
    result = command("doctor", path)
    assert result.exit_code == status
    assert words in " ".join((result.stdout + result.stderr).split())


def test_names_with_control_characters_do_not_reach_the_terminal(folder: Path, command: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "\x1b[31mred\x07"}))
    output = command("doctor", folder).stdout
    assert "\x1b" not in output
    assert "\x07" not in output


@pytest.mark.parametrize(("size", "shown"), [(0, "0 bytes"), (850, "850 bytes"), (16_100_000_000, "16.1 GB")])
def test_sizes(size: int, shown: str) -> None:
    assert nbytes(size) == shown
