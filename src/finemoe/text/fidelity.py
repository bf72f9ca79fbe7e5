"""Does a tokenizer give texts back, and keep its special tokens apart from text? As a list, or as a refusal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from finemoe.core.errors import DataError
from finemoe.text.tokenizer import Tokenizer

MOST_PROBLEMS = 8
_Form = Literal["NFC", "NFKC"]
_FORMS: tuple[_Form, ...] = ("NFC", "NFKC")

AWKWARD = (
    "",
    " ",
    "plain text\n",
    "def f(x):\n\tif x:\n        return  x**2   \n\n\n",
    "one\r\ntwo\rthree\n\r\n",
    "\x00\x01\x7f\x00",
    "👩‍👩‍👧‍👦 🇺🇳 🏳️‍🌈",
    "床前明月光，疑是地上霜。",
    "e\u0301 \u0301 \u20dd\u0338",
    "3.14159265358979323846264338327950288 0x7fffffffffffffff",
    "\u2028\u2029\u0085\ufeff\u200b\ufffd\ufffe",
    "العربية עברית हिन्दी ไทย",
    "      six spaces,   three, \t tab  ",
)


@dataclass(frozen=True)
class Fidelity:
    """What a check of a tokenizer found."""

    problems: tuple[str, ...]
    """What it loses or confuses, a sentence each; empty: it is faithful."""
    notes: tuple[str, ...]
    """How it treats digits, Chinese, runs of spaces and beginnings: facts, neither good nor bad."""


def fidelity(tokenizer: Tokenizer, samples: Iterable[str] = ()) -> Fidelity:
    """Check `tokenizer` on built-in awkward texts and `samples`, and each of its added tokens."""
    problems: list[str] = []
    forms: dict[_Form, str] = {}
    for text, back, sentence in _changes(tokenizer, samples):
        form = next((form for form in _FORMS if _same(form, text, back)), None)
        if form is None:
            problems.append(sentence)
        else:
            forms.setdefault(form, sentence)
    problems += [*_confusions(tokenizer), *_absent(tokenizer)]
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more of the same kinds"]
    return Fidelity(tuple(problems), (*_notes(tokenizer), *_form_notes(forms)))


def _same(form: _Form, text: str, back: str) -> bool:
    """Whether two texts are equal in a normal form, but for a space before them."""
    one, other = unicodedata.normalize(form, text), unicodedata.normalize(form, back)
    return other in (one, f" {one}")


def _form_notes(forms: Mapping[_Form, str]) -> Iterator[str]:
    """What a normalising family does: as the model was trained, so no fault; a corpus of it is counted."""
    if "NFC" in forms:
        yield f"texts are composed (NFC), or get a space before them, as in the model's own training: {forms['NFC']}"
    if "NFKC" in forms:
        yield f"texts are brought into compatibility form (NFKC), which rewrites some characters: {forms['NFKC']}"


def require_faithful(tokenizer: Tokenizer, samples: Iterable[str] = ()) -> None:
    """Encode and decode built-in awkward texts and `samples`, as must succeed with a tokenizer that was trained here.

    A tokenizer from elsewhere may normalise what it reads, and is judged by the corpus instead: see `Alterations`.

    Raises:
        DataError: it is not byte-level; or names the first text that does not come back, or that yields the end-of-text
            token.
    """
    if not tokenizer.byte_level:
        raise DataError(
            "the tokenizer is not byte-level, and only byte-level BPE gives every text back unchanged: train "
            "with one of those, or leave `tokenizer` out and have one trained"
        )
    problem = next(losses(tokenizer, samples), None)
    if problem is not None:
        raise DataError(f"{problem}: use a byte-level tokenizer without normalisation")


def losses(tokenizer: Tokenizer, samples: Iterable[str] = ()) -> Iterator[str]:
    """Texts that do not come back, or in which the end-of-text token appears by itself; as they are found."""
    return (sentence for _, _, sentence in _changes(tokenizer, samples))


def _changes(tokenizer: Tokenizer, samples: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The same, each with the text and how it came back."""
    name = tokenizer.token_bytes[tokenizer.end_of_text_id].decode(errors="replace")
    for text in (*AWKWARD, f"literal {name} in a text{name}", *samples):
        ids = tokenizer.encode(text)
        back = tokenizer.decode(ids)
        if back != text:
            at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), -1)
            at = at if at >= 0 else min(len(text), len(back))
            near = slice(max(0, at - 20), at + 20)
            yield text, back, f"the tokenizer does not give this text back: {text[near]!r} came back as {back[near]!r}"
        if tokenizer.end_of_text_id in ids:
            yield text, "", f"the tokenizer ends a document in the middle of ordinary text: {text[:60]!r}"


def _confusions(tokenizer: Tokenizer) -> Iterator[str]:
    """Added tokens that a rendered template cannot reach, special ones that ordinary text can."""
    for token_id, (name, _) in tokenizer.added_tokens.items():
        ids = tokenizer.encode_template(name)
        if ids != [token_id]:
            yield f"the added token {name!r} ({token_id}) becomes {ids[:6]} in a chat template, not its own id"
        if name in tokenizer.control_tokens and token_id in tokenizer.encode(name):
            yield f"the control token {name!r} ({token_id}) appears when its name stands in ordinary text"


def _absent(tokenizer: Tokenizer) -> Iterator[str]:
    """Special tokens that the configuration names and the vocabulary lacks."""
    for key, name in tokenizer.settings.special_tokens.items():
        if tokenizer.id_of(name) is None:
            yield f"{key} is {name!r}, which is not in the vocabulary"


def _notes(tokenizer: Tokenizer) -> Iterator[str]:
    digits = "3141592653589793238462643383279"
    longest = max(
        (sum(char in b"0123456789" for char in tokenizer.token_bytes[i]) for i in tokenizer.encode(digits)), default=0
    )
    yield "digits stand alone" if longest <= 1 else f"up to {longest} digits make one token"
    chinese = "床前明月光疑是地上霜"
    yield f"{len(tokenizer.encode(chinese))} tokens for {len(chinese)} Chinese characters"
    yield f"{len(tokenizer.encode('x' + ' ' * 16 + 'x')) - 2} tokens for 16 spaces"
    yield "texts begin with a token of their own" if tokenizer.adds_bos else "nothing is put before a text"
    if tokenizer.adds_bos != (tokenizer.bos_id in tokenizer.prefix):
        yield (
            "add_bos_token of tokenizer_config.json and tokenizer.json disagree on what begins a text: finemoe, "
            "llama.cpp and transformers 4 go by the first, transformers 5 by the second"
        )
    if not tokenizer.byte_level:
        yield "not byte-level: a space at the beginning of a text may be lost; training counts what a corpus loses"
