"""What a result says of the command that made it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finemoe.core.environment import command_line


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/usr/local/bin/finemoe", "finemoe analyze load 'my run'"),
        ("C:/Scripts/finemoe.exe", "finemoe analyze load 'my run'"),
        ("/lib/site-packages/finemoe/__main__.py", "finemoe analyze load 'my run'"),
        ("study.py", ""),
        ("-c", ""),
        ("/usr/bin/pytest", ""),
    ],
)
def test_only_a_command_that_was_typed_is_said(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "analyze", "load", "my run"])
    assert command_line() == said


def test_python_without_a_script_has_none() -> None:
    code = "import sys; sys.argv.clear(); from finemoe.core.environment import command_line; print([command_line()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['']"
