"""Prompts in, text and JSON out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.text.tokenizer import Tokenizer

FEW = ("--max-new-tokens", "8", "--seed", "5")


def records(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_json_is_all_of_stdout(process: Any, run_directory: Path) -> None:
    result = process("generate", run_directory, "--prompt", "def main(", *FEW, "--json")
    assert result.returncode == 0
    (record,) = json.loads(result.stdout)
    assert set(record) == {"prompt", "completion", "finish_reason", "tokens", "logprobs"}
    assert record["prompt"] == "def main("
    assert record["finish_reason"] in ("length", "stop")
    assert len(record["tokens"]) == len(record["logprobs"]) <= 8
    assert max(record["logprobs"]) <= 0
    if record["finish_reason"] == "length":
        assert Tokenizer.load(run_directory).decode(record["tokens"]) == record["completion"]


def test_streamed_text_is_the_decoded_text(command: Any, run_directory: Path) -> None:
    arguments = ("generate", run_directory, "--prompt", "def ", *FEW)
    (record,) = records(command(*arguments, "--json"))
    result = command(*arguments)
    assert result.stdout == "def " + record["completion"] + "\n"
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--top-k", "40", "--top-p", "0.9"]])
def test_a_prompt_gets_the_same_text_in_any_company(command: Any, run_directory: Path, options: list[str]) -> None:
    prompts = ["def main(", "x", "return 1\n" * 5, "a b"]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    together = records(command("generate", run_directory, *flags, *FEW, *options, "--json"))
    for prompt, record in zip(prompts, together, strict=True):
        (alone,) = records(command("generate", run_directory, "-p", prompt, *FEW, *options, "--json"))
        assert record.pop("logprobs") == pytest.approx(alone.pop("logprobs"), abs=1e-4)
        assert record == alone


def test_prompts_from_files_and_stdin(command: Any, run_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone \r\n\ntwo\n")
    result = command("generate", run_directory, "-p", "zero", "--file", tmp_path / "p.txt", *FEW, "--json")
    assert [record["prompt"] for record in records(result)] == ["zero", "one ", "two"]
    assert "1 blank line" in result.stderr
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\\ntwo", "id": 1}\n{"prompt": ""}\n')
    result = command("generate", run_directory, "--file", tmp_path / "p.jsonl", *FEW, "--json")
    assert [record["prompt"] for record in records(result)] == ["one\ntwo", ""]
    assert "prompt 2 is empty" in result.stderr
    result = command("generate", run_directory, "--file", "-", *FEW, text="a\nb\n")
    assert "--- 1 of 2\na" in result.stdout
    assert "--- 2 of 2\nb" in result.stdout
    assert "blank" not in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', "line 2: needs"),
        ("p.jsonl", "plain\n", "line 1: not JSON"),
        ("p.txt", "\n \n", "no prompt in it"),
        ("absent.txt", None, "cannot be read"),
    ],
)
def test_a_bad_file_is_named(
    command: Any, run_directory: Path, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    result = command("generate", run_directory, "--file", tmp_path / name)
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_checkpoint_uses_the_tokenizer_of_its_run(command: Any, run_directory: Path) -> None:
    checkpoint = next((run_directory / "checkpoints").iterdir())
    arguments = ("-p", "x", *FEW, "--json")
    run = records(command("generate", run_directory, *arguments))
    assert records(command("generate", checkpoint, *arguments)) == run


def test_more_than_the_training_length_is_said(command: Any, run_directory: Path) -> None:
    result = command("generate", run_directory, "-p", "x", "-n", "80")
    assert result.exit_code == 0
    assert "trained on 64" in " ".join(result.stderr.split())
    assert "trained" not in command("generate", run_directory, "-p", "x", "-n", "8").stderr


def test_no_run_there(command: Any, tmp_path: Path) -> None:
    result = command("generate", tmp_path, "-p", "x")
    assert result.exit_code == 2
    assert "neither a run" in result.stderr
