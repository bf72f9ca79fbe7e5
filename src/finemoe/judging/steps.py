"""A reward for each step of an answer, for process supervision (DeepSeekMath, 2402.03300, 4.1.3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged, Weighted

Marker = Annotated[str, Field(min_length=1)]
_LINE = re.compile(r"[^\n]*\S[^\n]*")


class StepsReward(Weighted):
    """The share of right steps, and where each step ends: what an answer says is compared with `steps` of its record.

    Every step is worth 1 where it is right and 0 where not; the weight multiplies these values too.
    """

    kind: Literal["steps"] = "steps"
    cut: Literal["search", "lines"] | Annotated[int, Field(gt=0)] = "search"
    """[characters] How steps are found. "search": each is looked for behind the one before it, and one that is missing
    ends with the answer. "lines": each line that is not blank is one. A number: so many characters are one."""
    opens: Marker | None = None
    """Steps begin behind it. None: with the answer."""
    closes: Marker | None = None
    """Steps end before it. None: with the answer, and what goes beyond the record's steps is none."""


def steps(config: StepsReward, bounds: Bounds) -> Judge:
    """Right: all steps are. Unreadable: no steps in it. Error: its record has none."""

    def judge(answer: Answer) -> Judged:
        wanted = answer.record.get("steps")
        if not isinstance(wanted, Sequence) or isinstance(wanted, str):
            return Judged.error("its record has no `steps`, a list of what each step must say")
        wanted = [str(one).strip() for one in wanted]
        begin, end = _region(answer.text, config)
        if config.cut == "search":
            found = _searched(answer.text, wanted, begin, end)
            given = len(wanted) if any(value for _, value in found) else 0
        else:
            pieces = _pieces(answer.text, begin, end, config.cut)
            pieces = pieces if config.closes is not None else pieces[: len(wanted)]
            given = len(pieces)
            found = [
                (place, float(number < len(wanted) and piece == wanted[number]))
                for number, (place, piece) in enumerate(pieces)
            ]
        if wanted and not given:
            return Judged.unreadable("no steps in it")
        right, most = sum(value for _, value in found), max(len(wanted), given)
        verdict: Literal["right", "wrong"] = "right" if right == most else "wrong"
        return Judged(verdict, right / most if most else 1.0, f"{right:g} of {most} steps", tuple(found))

    return judge


def _region(text: str, config: StepsReward) -> tuple[int, int]:
    """Where steps may be; nowhere without the marker that they begin behind."""
    begin = 0
    if config.opens is not None:
        place = text.find(config.opens)
        begin = place + len(config.opens) if place >= 0 else len(text)
    end = text.find(config.closes, begin) if config.closes is not None else -1
    return begin, end if end >= 0 else len(text)


def _searched(text: str, wanted: Sequence[str], begin: int, end: int) -> list[tuple[int, float]]:
    found, at = [], begin
    for step in wanted:
        place = text.find(step, at, end)
        if place >= 0:
            at = place + len(step)
        found.append((at, 1.0) if place >= 0 else (end, 0.0))
    return sorted(found)


def _pieces(text: str, begin: int, end: int, cut: str | int) -> list[tuple[int, str]]:
    """Each piece between `begin` and `end`, with where it ends."""
    if isinstance(cut, int):
        return [(min(at + cut, end), text[at : min(at + cut, end)]) for at in range(begin, end, cut)]
    return [(line.end(), line.group().strip()) for line in _LINE.finditer(text, begin, end)]
