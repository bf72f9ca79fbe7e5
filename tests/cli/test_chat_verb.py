"""`finemoe chat`: lines in, answers out, and commands about experts."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from finemoe.checkpoint.language_model import open_language_model
from finemoe.cli.chat import _loop
from finemoe.server.conversation import Conversation
from runs.forking import finemoe
from server.talkers import CHAT, write_run

FEW = ("-n", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("chat") / "talker", chat=True)


def test_lines_are_answered(talker: Path) -> None:
    result = finemoe("chat", talker, *FEW, input="Hello\nAnd now?\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) >= 2
    assert "2 layers of experts" in result.stderr
    again = finemoe("chat", talker, *FEW, input="Hello\nAnd now?\n")
    assert again.stdout == result.stdout


def test_commands(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "/experts", "Hello", "/experts", "/disable L1 E3", "/force L2 5", "/active 1", "/shared off", "/retry", "/free",
        "/set temperature 0.5", "/system Be brief.", "/system", f"/save {file}", "/save", f"/save {file}", "/new",
        "/help", "/disable L9 E1", "/disable L1", "/system off", "/set top_q 3", "/experiment", "/quit", "never read",
    ]  # fmt: skip
    result = finemoe("chat", talker, *FEW, input="\n".join(lines) + "\n")
    assert result.returncode == 0
    said = " ".join(result.stderr.split())
    for words in (
        "no expert has written anything yet",
        "experts: without L1 E3",
        "without L1 E3; always L2 E5; 1 active; without the shared ones",
        "experts: as the model has them",
        "temperature = 0.5",
        f"{file.name} exists and is left as it is",
        "layer 9 has no experts; those that have: 1, 2",
        "name an expert behind the layer",
        "top_q",
        "unknown command /experiment",
        "tokens, the most that were asked for: /set max_new_tokens",
        "system: Be brief.",
        "no system message",
        "differs from token",
        "name a file: /save talk.json",
    ):
        assert words in said, words
    assert "L1  E" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["sampling"]["temperature"] == 0.5


def test_nothing_there(tmp_path: Path) -> None:
    result = finemoe("chat", tmp_path, input="x\n")
    assert result.returncode == 2
    assert "neither a run" in " ".join(result.stderr.split())


def test_interrupted_in_an_answer_the_next_line_is_read(talker: Path) -> None:
    import sys

    command = [sys.executable, "-m", "finemoe", "chat", str(talker), "-n", "250", "--temperature", "1.5"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as chat:  # type: ignore[call-overload]
        assert chat.stdin is not None
        chat.stdin.write("Hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        time.sleep(0.2)
        _, errors = chat.communicate("/set seed 5\n/quit\n", timeout=60)
    assert chat.returncode == 0, errors
    assert "seed = 5" in errors
    assert "Traceback" not in errors


def test_a_thought_that_the_prompt_opens_is_shown_apart(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from finemoe.cli.chat import _write

    opened = SimpleNamespace(template=SimpleNamespace(sources={"default": CHAT}))
    talk: Any = SimpleNamespace(opened=opened, events=[])

    def events() -> Any:
        talk.thinking = True  # known once the prompt is rendered
        for text in ("an id", "ea</thi", "nk>\n\nNo", "."):
            yield SimpleNamespace(text=text)

    _write(events(), talk)
    assert capsys.readouterr().out == "an idea\n\nNo.\n"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_no_text_is_refused_in_a_sentence(tmp_path: Path, chat: bool, errors: str) -> None:
    run = write_run(tmp_path / "run", chat=chat)
    done = finemoe("chat", run, *FEW, input=b"\xff\n", errors=errors)
    assert "UTF-8" in done.stderr or "not valid Unicode" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_entry_of_a_table_can_be_set(talker: Path) -> None:
    result = finemoe("chat", talker, *FEW, input="/set logit_bias.10 5\n/set stop_at_end_of_text true\nHello\n")
    assert result.returncode == 0, result.stderr
    assert "logit_bias = " in result.stderr


def test_a_second_interrupt_of_an_empty_line_ends_and_the_first_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], talker: Path
) -> None:
    keys = iter([KeyboardInterrupt, "/set seed 4", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def read(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", read)
    _loop(Conversation(open_language_model(talker)))
    assert capsys.readouterr().err.count("Ctrl-D ends") == 2
    assert next(keys) == "never read"


def test_a_dense_model_has_no_experts_to_show(tmp_path: Path) -> None:
    dense = {"kind": "dense", "ffn_hidden_size": 24}
    run = write_run(tmp_path / "dense", chat=False, feed_forward=dense, leading=None, mtp_depth=0)
    result = finemoe("chat", run, *FEW, input="Hello\n/experts\n")
    assert "this is a dense model" in result.stderr
