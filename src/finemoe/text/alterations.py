"""What a tokenizer changes of the texts at hand, counted while they are tokenised; harmless or not is told apart.

Most published tokenizers change something: Qwen's composes characters (NFC), others put a space before a text. A model
learns what its tokenizer gives, so this costs nothing but bytes; a tokenizer that drops blanks or capitals costs text.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finemoe.core.errors import DataError
from finemoe.text.tokenizer import Tokenizer

_NEAR = 8
"""Characters of an example, before and after the place."""


@dataclass
class Alterations:
    """Counts over the documents that a tokenizer has encoded."""

    documents: int = 0
    changed: int = 0
    """Documents that do not come back as they were."""
    harmless: int = 0
    """Of those, the ones that are the same once both are composed (NFC), or but for a space before them."""
    ended: int = 0
    """Documents in which the end-of-text token stands for ordinary text."""
    characters: int = 0
    lost: int = 0
    """Characters that do not come back, not even in a compatible form (NFKC)."""
    before: str = ""
    after: str = ""
    """An example: a place of a text, and how it comes back."""
    _open: str = ""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Alterations:
        """What `as_json` gave.

        Raises:
            ValueError: it did not give that.
        """
        known = Alterations().as_json()
        if value.keys() != known.keys() or any(type(value[name]) is not type(one) for name, one in known.items()):
            raise ValueError("these are no counts of what a tokenizer changed")
        return Alterations(**value)

    def as_json(self) -> dict[str, Any]:
        """All counts by name."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}

    @property
    def lost_share(self) -> float:
        """Of all characters, those that do not come back."""
        return self.lost / max(1, self.characters)

    def add(
        self, tokenizer: Tokenizer, text: str, ids: Sequence[int], ends: bool = True, special: bool = False
    ) -> tuple[int, int]:
        """Count a document, or a piece of one that goes on unless it `ends`.

        An end-of-text token that stands for its own spelling is counted unless `special`: then it was asked for.

        Returns:
            Bytes of the text, and of the tokens that stand for it; the same where nothing is changed.
        """
        encoded, raw = text.encode(), tokenizer.bytes_of(ids)
        name = tokenizer.token_bytes[tokenizer.end_of_text_id]
        num_ends = ids.count(tokenizer.end_of_text_id)
        self.characters += len(text)
        if num_ends and not special:
            self.lost += num_ends * len(name.decode(errors="replace"))
            self._mark("ended", text, text)
        back = raw.removeprefix(b" ") if tokenizer.puts_space_first else raw
        if back != encoded:
            self._compare(text, back.decode("utf-8", errors="replace"))
        if ends:
            self._close()
        return len(encoded), len(raw) - num_ends * len(name)  # which stands for no text where bytes are counted

    def _compare(self, text: str, back: str) -> None:
        composed, back_composed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", back)
        same = back_composed == composed or back_composed == f" {composed}"
        self._mark("harmless" if same else "changed", text, back)
        if not same:
            # What is folded, as a wide comma or a ligature is, is another character but still there.
            before, after = (Counter(unicodedata.normalize("NFKC", one)) for one in (text, back))
            self.lost += (before - after).total() or (after - before).total()

    def _mark(self, what: str, text: str, back: str) -> None:
        """Note what happened to the open document, the worst of its pieces, and an example of that."""
        worst = ("", "harmless", "changed", "ended")
        if not self.before or (self.harmless == self.changed and what == "changed" and self._open != "changed"):
            at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), -1)
            at = at if at >= 0 else min(len(text), len(back))
            near = slice(max(0, at - _NEAR), at + _NEAR)
            self.before, self.after = text[near], back[near]
        self._open = max(self._open, what, key=worst.index)

    def _close(self) -> None:
        self.documents += 1
        self.changed += self._open in ("changed", "harmless")
        self.harmless += self._open == "harmless"
        self.ended += self._open == "ended"
        self._open = ""

    def sentence(self) -> str | None:
        """What was changed, for people; None: nothing."""
        if not self.changed and not self.ended:
            return None
        parts = []
        if self.changed:
            parts.append(
                f"does not give {self.changed:,} of {self.documents:,} documents back as they were: "
                f"{self.before!a} comes back as {self.after!a}"
            )
            if self.harmless:
                same = "all" if self.harmless == self.changed else f"{self.harmless:,}"
                parts.append(f"{same} of them but for composed characters (NFC) or a space before the text")
        if self.ended:
            parts.append(f"ends {self.ended:,} documents in the middle, where its end-of-text token stands in them")
        return "the tokenizer " + "; ".join(parts)

    def require(self, most: float) -> None:
        """Refuse a tokenizer that loses too much.

        Raises:
            DataError: more than `most` of all characters.
        """
        if self.lost_share > most:
            raise DataError(
                f"{self.sentence()}. {100 * self.lost_share:.3g} % of all characters are lost, and at most "
                f"{100 * most:g} % may be: take another tokenizer, leave "
                "`data.tokenizer` out to have one trained, or accept the loss by `data.max_altered_share`"
            )


def alterations(tokenizer: Tokenizer, texts: Sequence[str]) -> Alterations:
    """What `tokenizer` changes of `texts`."""
    found = Alterations()
    for text in texts:
        found.add(tokenizer, text, tokenizer.encode(text))
    return found
