"""The notebooks of examples/ run from top to bottom, and so does the Python of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
SHORT = {r"TOKENS = [\d_]+": "TOKENS = 16_384", r'"max_bytes": [\d_]+': '"max_bytes": 60_000'}
"""What makes a notebook a matter of seconds: less text, and less of it read."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FINEMOE_NATIVE", "0")  # a cache of its own would compile the kernels anew
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for number, code in enumerate(cells):
        for long, short in SHORT.items():
            code = re.sub(long, short, code)
        exec(compile(code, f"{path.name}, code cell {number}", "exec", dont_inherit=True), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_what_it_printed(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the README's commands: a recipe in its place, and an environment with finemoe in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FINEMOE_NATIVE", "0")  # a cache of its own would compile the kernels anew
    (tmp_path / "recipes").mkdir()
    recipe = (ROOT / "recipes/tiny.toml").read_text(encoding="utf-8")
    short = re.sub(r"^tokens = [\d_]+$", "tokens = 16_384", recipe, flags=re.MULTILINE)
    short += '\n[data]\ncorpus = { kind = "interpreter", max_bytes = 60_000 }\n' if "[data]" not in recipe else ""
    (tmp_path / "recipes/tiny.toml").write_text(short, encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    assert (names["run"].directory / "summary.json").exists()
