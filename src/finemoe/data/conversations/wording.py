"""How a prompt is put to a model that knows no chat: words around it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

_PLACE = "{prompt}"


def _check(wording: str) -> str:
    if _PLACE not in wording:
        raise ValueError(f'has no {_PLACE} in it: "{_PLACE}" alone is the text itself')
    return wording


Wording = Annotated[str, AfterValidator(_check)]
"""A text with {prompt} in it, for every configuration that has such a template."""


def put(wording: str, prompt: str) -> str:
    """`prompt` in the words that it is asked in."""
    return wording.replace(_PLACE, prompt)
