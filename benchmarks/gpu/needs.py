"""What each part of `make gpu` imports: a machine with a GPU often has no package index, and not all of it.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

_MODEL = ("torch", "numpy", "pydantic")
_LIBRARY = (*_MODEL, "safetensors", "tokenizers", "pyarrow", "zstandard")
NEEDS = {
    "tests": (*_MODEL, "pytest", "hypothesis"),
    "layer": (*_LIBRARY, "rich"),
    "step": (*_LIBRARY, "rich"),
    "compile": (*_LIBRARY, "rich"),
}
"""Packages by part. transformers is left out: without it there is a note and no peer."""


def importable(name: str) -> bool:
    """Whether there is such a package; it is not imported."""
    return find_spec(name) is not None


def missing(part: str, has: Callable[[str], bool] = importable) -> list[str]:
    """Packages that the part needs and this interpreter has not."""
    return [name for name in NEEDS[part] if not has(name)]


def sentence(part: str, names: Sequence[str]) -> str:
    """What is missing, and what to do about it."""
    return (
        f"{part} was left out: this Python has no {', '.join(names)}; install them, or unpack their wheels (and "
        "those of what they need) into a folder and name it in PYTHONPATH"
    )
