"""Rewards that look at how an answer is written: its form, its language, its length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from finemoe.core.config import did_you_mean
from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged, Weighted
from finemoe.text.answers import boxed

Marker = Annotated[str, Field(min_length=1)]


class FormatReward(Weighted):
    """Right where an answer has the form that is asked for, whatever it says."""

    kind: Literal["format"] = "format"
    form: Literal["think", "markers", "boxed"] = "think"
    r"""think: `<think>...</think>`, then `<answer>...</answer>`, each once, with something in it and nothing around it;
    markers: `opens`, something, `closes`, and the answer behind; boxed: a `\boxed{...}` that is closed."""
    opens: Marker | None = None
    """Of `form = "markers"`: what thinking begins with; of the prompt's end, too, where a template writes it there."""
    closes: Marker | None = None
    """Of `form = "markers"`: what thinking ends with."""

    @model_validator(mode="after")
    def _markers_for_markers(self) -> FormatReward:
        if (self.form == "markers") != (self.opens is not None) or (self.opens is None) != (self.closes is None):
            raise ValueError('`opens` and `closes` belong to form = "markers", which needs both')
        return self


def form(config: FormatReward, bounds: Bounds) -> Judge:
    """Unreadable: nothing but blanks."""
    opens, closes = config.opens or "<think>", config.closes or "</think>"

    def judge(answer: Answer) -> Judged:
        if not answer.text.strip():
            return Judged.unreadable("empty")
        if config.form == "boxed":
            return Judged.whether(boxed(answer.text) is not None)
        text = answer.text.strip()
        if (answer.asked or answer.prompt).rstrip().endswith(opens) and not text.startswith(opens):
            text = opens + text
        rest = _behind(text, opens, closes)
        if rest is not None and config.form == "think":
            rest = _behind(rest, "<answer>", "</answer>")
            return Judged.whether(rest == "")
        return Judged.whether(bool(rest))

    return judge


def _behind(text: str, opens: str, closes: str) -> str | None:
    """What stands behind `opens`, something, `closes`, each once, which a text begins with; None where it does not."""
    inner, closed, rest = text.removeprefix(opens).partition(closes)
    if not text.startswith(opens) or not closed or not inner.strip():
        return None
    return None if opens in inner or opens in rest or closes in rest else rest.strip()


_SCRIPTS: dict[str, tuple[str, ...]] = {
    "latin": ("LATIN",),
    "chinese": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "korean": ("HANGUL",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
}
_LANGUAGES = {
    "latin": "latin en de fr es it pt nl sv da no fi pl cs ro hu tr vi id",
    "chinese": "chinese zh",
    "japanese": "japanese ja",
    "korean": "korean ko",
    "cyrillic": "cyrillic ru uk bg sr be",
    "greek": "greek el",
    "arabic": "arabic ar fa ur",
    "hebrew": "hebrew he",
    "devanagari": "devanagari hi mr ne",
    "thai": "thai th",
}
_BY_LANGUAGE = {language: script for script, languages in _LANGUAGES.items() for language in languages.split()}
_NO_WORDS = re.compile(r"```.*?(?:```|\Z)|\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+|</?[a-zA-Z]+>", re.DOTALL)
_PIECE = re.compile(r"[^\W\d_]+")
_SINGLE = ("CJK", "HIRAGANA", "KATAKANA", "THAI")  # written without blanks: each letter counts


class LanguageReward(Weighted):
    """The share of an answer's words that are in the script of a language, as R1's language consistency.

    Code, formulas and tags are no words. Scripts tell Chinese from English, and not English from French.
    """

    kind: Literal["language"] = "language"
    language: str = "en"
    """A language, such as en, zh or ru, or a script: latin, cyrillic, chinese ..."""

    @model_validator(mode="after")
    def _known(self) -> LanguageReward:
        if self.language.lower() not in _BY_LANGUAGE:
            raise ValueError(f"unknown language {self.language!r}{did_you_mean(self.language, list(_BY_LANGUAGE))}")
        return self


def language(config: LanguageReward, bounds: Bounds) -> Judge:
    """Right: all words are. Unreadable: no words at all."""
    scripts = _SCRIPTS[_BY_LANGUAGE[config.language.lower()]]

    def judge(answer: Answer) -> Judged:
        words = [word for piece in _PIECE.findall(_NO_WORDS.sub(" ", answer.text)) for word in _words(piece)]
        own, total = sum(word.startswith(scripts) for word in words), len(words)
        if not total:
            return Judged.unreadable("no words")
        return Judged("right" if own == total else "wrong", own / total, f"{own} of {total} words")

    return judge


def _words(letters: str) -> Iterator[str]:
    """The script of each word in a run of letters, as its name in Unicode begins."""
    before = ""
    for script in map(_script, letters):
        if script.startswith(_SINGLE) or not before or before.startswith(_SINGLE):
            yield script
        before = script


def _script(letter: str) -> str:
    """Its name, which begins with its script."""
    return unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")


class LengthReward(Weighted):
    """A penalty for what is too long: 0 up to `longest` - `cushion` tokens, falling evenly to -1 at `longest`.

    With n tokens, L = `longest` and C = `cushion`: (L - C - n) / C in between, as DAPO's overlong shaping
    (2503.14476, eq. 13), and -1 beyond.
    """

    kind: Literal["length"] = "length"
    longest: Annotated[int, Field(gt=0)]
    """[tokens] From this length on the penalty is whole; the most that may be written, as a rule."""
    cushion: Annotated[int, Field(gt=0)]
    """[tokens] Over so many before that it grows."""

    @model_validator(mode="after")
    def _cushion_fits(self) -> LengthReward:
        if self.cushion > self.longest:
            raise ValueError(f"`cushion` {self.cushion} must be at most `longest` {self.longest}")
        return self


def length(config: LengthReward, bounds: Bounds) -> Judge:
    """Right: no penalty. Unreadable: nothing was written."""

    def judge(answer: Answer) -> Judged:
        if answer.num_tokens == 0:
            return Judged.unreadable("nothing was written")
        value = min(0.0, max(-1.0, (config.longest - config.cushion - answer.num_tokens) / config.cushion))
        return Judged("right" if value == 0 else "wrong", value, f"{answer.num_tokens} tokens")

    return judge
