"""Help, mistakes, exit codes and streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from finemoe.cli.main import app
from finemoe.core.errors import TrainingError

HEAVY = {"torch", "numpy", "scipy", "altair", "pyarrow", "tokenizers", "safetensors", "jinja2", "finemoe.core.config"}
VERBS = ["train", "resume", "generate", "compare", "size", "presets"]


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS)], ids=["finemoe", *VERBS])
def test_help_teaches(command: Any, arguments: list[str]) -> None:
    result = command(*arguments, "--help")
    assert result.exit_code == 0
    assert "finemoe" in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2]  # no summary is cut short
    if arguments:
        assert "Example" in result.stdout


def test_no_analysis_is_cut_short_in_the_list_of_them(command: Any) -> None:
    assert "..." not in command("analyze", "--help").stdout.partition("Commands:")[2]


def test_every_help_fits_a_terminal_of_80_columns(command: Any) -> None:
    def walk(verb: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
        yield from (f"{words}: {line}" for line in command(*words, "--help").stdout.splitlines() if len(line) > 80)
        for name, below in getattr(verb, "commands", {}).items():
            yield from walk(below, (*words, name))

    assert list(walk(get_command(app))) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom finemoe.cli.main import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 450, len(sys.modules)\n"  # 174 with Python 3.11; 344 for a verb, with rich
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_version(process: Any) -> None:
    result = process("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("finemoe 0.")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["traim"], "Did you mean 'train'"),
        (["train", "x.toml", "--oot", "y"], "--out"),
        (["train"], "Missing argument"),
        (["presets", "tiny-mo"], "did you mean `tiny-moe`?"),
        (["size", "deepsek-moe-16b"], "did you mean `deepseek-moe-16b`?"),
        (["size", "absent.toml"], "absent.toml: no such recipe"),
        (["generate", "."], "nothing to continue"),
        (["paper", "--only", ","], "--only names no experiment"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(command: Any, arguments: list[str], says: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("option", "value", "says"), [("--top-p", "1.5", "`top_p`"), ("--temperature", "-1", "`temp")])
def test_an_impossible_way_to_draw_is_one_message(
    command: Any, run_directory: Path, option: str, value: str, says: str
) -> None:
    result = command("generate", run_directory, "--prompt", "x", option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nosuch.toml"], "nosuch.toml: no such recipe"),
        (["train", "a.toml", "--set", "b"], "--set 'b': write it as a.b.c=value"),
        (["train", "broken.toml"], "broken.toml: not a readable TOML file"),
        (["compare", "nosuch.toml"], "nosuch.toml: no such recipe"),
        (["resume", "nosuch"], "nosuch: not a run directory (no config.json)"),
        (["show", "nosuch"], "nosuch: not a run directory"),
        (["size", "nosuch.toml"], "nosuch.toml: no such recipe"),
        (["generate", "nosuch", "--prompt", "x"], "nosuch: there is nothing here"),
        (["export", "nosuch", "out"], "nosuch: there is nothing here"),
        (["import", "nosuch", "out"], "nosuch: no such file or folder"),
        (["doctor", "nosuch"], "nosuch: no such file or folder"),
        (["doctor", "half"], "half: no such file or folder; interrupted work lies in half.partial"),
    ],
    ids=" ".join,
)
def test_a_path_that_leads_nowhere_is_said_without_torch(here: Path, arguments: list[str], says: str) -> None:
    (here / "broken.toml").write_text("[")
    (here / "half.partial").mkdir()
    code = (
        "import sys\nfrom finemoe.cli.main import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr.startswith("error: " + says)) == ("", True), done.stderr


@pytest.mark.parametrize("arguments", [["--debug", "presets", "tiny-mo"], ["presets", "tiny-mo", "--debug"]])
def test_debug_adds_the_traceback_wherever_it_stands(command: Any, arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("error: unknown preset `tiny-mo`, did you mean `tiny-moe`?")


def test_debug_behind_two_dashes_is_an_argument(command: Any) -> None:
    result = command("presets", "--", "--debug")
    assert "unknown preset `--debug`" in result.stderr


@pytest.mark.usefixtures("here")
def test_brackets_in_a_message_are_no_markup(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TrainingError("see [model] in [/x]")

    monkeypatch.setattr("finemoe.runs.run.train", fail)
    result = command("train", "a.toml")
    assert result.exit_code == 2
    assert result.stderr == "error: see [model] in [/x]\n"


@pytest.mark.usefixtures("here")
def test_a_defect_of_ours_keeps_its_traceback(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("finemoe.runs.run.train", fail)
    with pytest.raises(ZeroDivisionError):
        command("train", "a.toml")


@pytest.mark.usefixtures("here")
def test_ctrl_c_ends_with_130(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finemoe.runs.run.train", interrupt)
    result = command("train", "a.toml")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_while_generating(run_directory: Path) -> None:
    words = [sys.executable, "-m", "finemoe", "generate", str(run_directory), "-p", "x", "-n", "9999"]
    words += ["--temperature", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.read(1)  # the prompt: generation begins
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors


def test_a_closed_pipe_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "finemoe", "--version"]
    result = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert result.returncode == 1
    assert result.stderr == ""


def test_exit_status_of_the_process(process: Any) -> None:
    result = process("presets", "tiny-mo")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: unknown preset `tiny-mo`, did you mean `tiny-moe`?\n"


@pytest.mark.parametrize("verb", ["load", "experts", "knockout"])
def test_a_report_of_another_kind_is_not_written_over(
    command: Any, run_directory: Path, tmp_path: Path, verb: str
) -> None:
    """A folder with a paper study, another verb's report or somebody's files stays as it is, and no work is done."""
    for name, content in {"results.json": '{"schema": 1, "title": "x"}', "notes.txt": "mine"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        result = command("analyze", verb, str(run_directory), "--text", "def main", "--out", str(folder))
        assert result.exit_code == 2
        assert "choose another --out" in result.stderr
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == content


def test_paper_lists_what_there_is(command: Any) -> None:
    text, listed = command("paper", "--list").stdout, json.loads(command("paper", "--list", "--json").stdout)
    assert {"trial", "tiny"} <= set(listed["scales"])
    for name, experiment in listed["experiments"].items():
        assert name in text
        assert experiment["arms"]
        assert experiment["claims"]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verb", ["generate", "evaluate", "serve", "quantize", "sample"])
def test_an_option_that_was_renamed_is_suggested_alone(command: Any, verb: str) -> None:
    result = command(verb, "model", "--dtype", "int8")
    assert result.exit_code == 2
    assert "No such option: --dtype (Possible options: --weights)" in result.stderr


def test_a_verb_that_has_no_weights_does_not_suggest_them(command: Any) -> None:
    assert "--weights" not in command("train", "recipe.toml", "--dtype", "int8").stderr
