"""Rewards that others wrote: a function in a file of the user's, and the rules of reasoning-gym."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from finemoe.core.errors import ConfigError
from finemoe.judging.comparing import within
from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged, Weighted
from finemoe.text.gym import credit, require_gym


def _file_and_function(path: str) -> str:
    if not re.fullmatch(r".+\.py:[A-Za-z_]\w*", path, re.DOTALL):
        raise ValueError('must be "FILE.py:FUNCTION"')
    return path


class FunctionReward(Weighted):
    """A function of your own: `def score(prompt, completion, record) -> float | bool | None | dict`.

    None: unreadable. A dict may have `value`, `note` and `steps`, a list of (where a step ends in characters, value).
    """

    kind: Literal["function"] = "function"
    path: Annotated[str, AfterValidator(_file_and_function)]
    """The file and the function, "my_rewards.py:score", relative to the current directory."""

    def identity(self) -> dict[str, Any]:
        """With the hash of the file; none of one that cannot be read."""
        file = Path(self.path.rpartition(":")[0]).expanduser()
        known = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        return {**self.model_dump(mode="json"), "sha256": known}


class GymReward(Weighted):
    """What reasoning-gym's task says of an answer to one of its own entries. Needs the `[rl]` extra."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"


def function(config: FunctionReward, bounds: Bounds) -> Judge:
    """Unreadable: it returns None. Error: it raises one, or returns what is no value.

    Raises:
        ConfigError: no such file or function, one that takes other arguments, or the file fails.
    """
    file, _, name = config.path.rpartition(":")
    score = _loaded(Path(file).expanduser(), name)
    _require_arguments(score, config.path)

    def judge(answer: Answer) -> Judged:
        said = score(answer.prompt, answer.text, dict(answer.record))
        try:
            return _said(said)
        except (TypeError, ValueError) as error:
            return Judged.error(f"{config.path}: {error}")

    return judge


def _loaded(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise ConfigError(f"`path`: {path}: no such file (relative paths start at {Path.cwd()})")
    sys.path.insert(0, str(path.resolve().parent))  # what stands beside it can be imported, as from a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"`path`: {path}: {type(error).__name__}: {error}") from error
    found = vars(module).get(name)
    if not callable(found):
        known = sorted(one for one, value in vars(module).items() if callable(value) and not one.startswith("_"))
        raise ConfigError(f"`path`: {path} has no function {name}; it has {', '.join(known) or 'none'}")
    return found


def _require_arguments(score: Callable[..., Any], path: str) -> None:
    try:
        signature = inspect.signature(score)
    except (TypeError, ValueError):  # of what is written in C nobody may know
        return
    try:
        signature.bind("prompt", "completion", {})
    except TypeError as error:
        wanted = f"def {path.rpartition(':')[2]}(prompt, completion, record)"
        raise ConfigError(f"`path`: {path}{signature} is called with three arguments: write {wanted}") from error


_MOST = 1e9
"""What an answer is worth at most: beyond, sums and deviations say nothing any more."""


def _said(value: Any) -> Judged:
    """What a user's function returned.

    Raises:
        TypeError, ValueError: it is no value.
    """
    if value is None:
        return Judged.unreadable("")
    if isinstance(value, bool):
        return Judged.whether(value)
    if isinstance(value, Mapping):
        steps = tuple((int(place), _finite(one)) for place, one in value.get("steps") or ())
        judged = _said(value.get("value"))
        return Judged(judged.verdict, judged.value, _plain(str(value.get("note", ""))), steps)
    number = _finite(value)
    return Judged("right" if number > 0 else "wrong", number)


def _finite(value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"it returned {type(value).__name__}, and not a number, True, False, None or a dict")
    number = float(value)
    if not math.isfinite(number) or abs(number) > _MOST:
        raise ValueError(f"it returned {number}, which is no finite number between -{_MOST:g} and {_MOST:g}")
    return number


def _plain(text: str) -> str:
    """Text that every file can hold."""
    return text.encode("utf-8", "replace").decode()


def reasoning_gym(config: GymReward, bounds: Bounds) -> Judge:
    """Unreadable: nothing but blanks. Error: the record is no entry of reasoning-gym.

    Raises:
        ConfigError: the package is not installed.
    """
    require_gym()

    def judge(answer: Answer) -> Judged:
        entry = answer.record.get("reasoning_gym")
        if not isinstance(entry, Mapping):
            return Judged.error('its record is no problem of a corpus with problem = "reasoning_gym"')
        said = within(answer.text, "<answer>", "</answer>")
        said = answer.text if said is None else said
        if not said.strip():
            return Judged.unreadable("empty")
        value = credit(entry["task"], entry["number"], entry["options"], said.strip())
        return Judged("right" if value == 1 else "wrong", value)

    return judge
