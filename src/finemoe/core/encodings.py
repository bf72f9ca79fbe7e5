"""Which encoding a text is in: what its byte order mark says, what its zero bytes give away, or a guess."""

from __future__ import annotations

import codecs
import unicodedata
from collections import Counter

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE = 1 << 14
_CONTROLS = bytes(i for i in range(32) if i not in b"\t\n\r\f\x1b")
_CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфёії"

_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里，。、“”：；"
)

# What most characters beyond ASCII are in a text of each encoding: its letters, or the most frequent words.
_USUAL: tuple[tuple[str, str], ...] = (
    ("utf-16-le", _HAN),
    ("utf-16-be", _HAN),
    ("cp932", "".join(map(chr, range(0x3041, 0x30FF))) + "。、「」日本人一大年出会中上生国見行"),
    ("euc_jp", "".join(map(chr, range(0x3041, 0x30FF))) + "。、「」日本人一大年出会中上生国見行"),
    ("gb18030", _HAN),
    ("big5", "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過，。、「」"),
    ("cp949", "".join(map(chr, range(0xAC00, 0xD7A4)))),
    ("cp1251", _CYRILLIC),
    ("koi8-r", _CYRILLIC),
    ("cp1253", "αοιετνσρκπλμηςύίάέόήώθγυδφχβξζψ"),
    ("cp1255", "".join(map(chr, range(0x05D0, 0x05EB)))),
    ("cp1256", "".join(map(chr, range(0x0621, 0x064B))) + "،؛؟"),
    ("cp1252", "éèàùâêîôûçëïüäößñáíóúãõåæøœìòÉÈÀÖÄÜÑÇÁÓÅØ’‘“”–—…€£©®°«»¿¡·§²"),
    ("cp1250", "ąęłżśćńóěščřžýůáíéúďťňőűöüäđţăîâŁŚŻČŠŽ„”–"),
    ("cp1254", "ışğçöüİŞĞÇÖÜâî"),
)  # fmt: skip
_LATIN = frozenset({"cp1252", "cp1250", "cp1254"})
"""Encodings of alphabets that are mostly ASCII; a text in any other has more letters of its own than of ASCII."""


def mark_of(head: bytes) -> tuple[str, int] | None:
    """The encoding that a byte order mark at the beginning of `head` names, and the mark's length; None without one."""
    return next(((name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), None)


def decode_text(data: bytes) -> str:
    """`data` as text, without its byte order mark: in the encoding that the mark names, else strict UTF-8.

    Raises:
        UnicodeDecodeError: it is not text in that encoding.
    """
    name, length = mark_of(data) or ("utf-8", 0)
    return data[length:].decode(name)


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, told by its zero and control bytes; None for anything else."""
    sample = head[: min(len(head), _SAMPLE) & ~3] or head[: len(head) & ~1]
    odd = len(sample) - len(sample.translate(None, _CONTROLS))
    if len(sample) < 4 or odd * 10 < len(sample):
        return None
    if len(sample) % 4 == 0:
        for name, places in (("utf-32-le", (2, 3)), ("utf-32-be", (0, 1))):
            if all(set(sample[place::4]) <= {0, 1} for place in places) and _is_wording(sample, name):
                return name
    # The bytes that name the alphabet are few, those that name the letter many.
    for name, place in (("utf-16-le", 1), ("utf-16-be", 0)):
        alphabet, letters = (Counter(sample[at::2]).most_common(2) for at in (place, 1 - place))
        few = sum(count for _, count in alphabet) >= 0.45 * len(sample)
        if few and (letters[0][1] < 0.3 * len(sample) or alphabet[0][0] == 0) and _is_wording(sample, name):
            return name
    return None


def _is_wording(sample: bytes, encoding: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    words = sum(char.isalnum() or char.isspace() or unicodedata.category(char)[0] in "PSM" for char in text)
    return words >= 0.95 * max(1, len(text))


def likely_encoding(data: bytes) -> str | None:
    """Python's name for what `data`, which is not UTF-8, is probably encoded in; None where nothing fits well."""
    wide = wide_encoding(data)
    if wide is not None:
        return wide
    best, most = None, 0.4  # so much of what is not ASCII must be usual in that encoding
    for name, usual in _USUAL:
        try:
            text = codecs.getincrementaldecoder(name)().decode(data[:_SAMPLE])
        except UnicodeDecodeError:
            continue
        foreign = [char for char in text if char > "\x7f"]
        plain = sum(char.isalpha() for char in text) - sum(char.isalpha() for char in foreign)
        share = sum(char in usual for char in foreign) / max(1, len(foreign))
        if share > most and (name in _LATIN or len(foreign) > plain):
            best, most = name, share
    return best


def in_utf8(name: str) -> str:
    """A name from the disk as text that a file can hold: what is no UTF-8 in it is spelt out, as `\\udce9`."""
    return name.encode("utf-8", "backslashreplace").decode()
