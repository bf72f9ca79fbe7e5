"""What a file holds, told by its first bytes and not by its name: the one place that knows magic numbers.

Readers ask here before they complain, so that a Git LFS pointer is called that and not a truncated safetensors file.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from pathlib import Path

from finemoe.core.encodings import likely_encoding, mark_of, wide_encoding

HEAD_BYTES = 1 << 16
"""How much of a file is looked at."""

# Kinds, by what can be done with them.
PACKED = frozenset({"gzip", "bzip2", "xz", "zstd"})
"""Compressed in a way that is undone while reading."""
COLUMNS = frozenset({"parquet", "arrow", "arrow-stream"})
JSON = frozenset({"json", "json-lines"})
WRITTEN = frozenset({"text", "empty", *JSON})
"""Made of characters that are worth reading."""
_NO_EXPLANATION = frozenset({"text", "binary", "empty"})

AGAIN = "fetch the file itself again"
_LATER = "pack it as .gz, .bz2, .xz or .zst instead, or unpack it"
_UNPACK = "unpack it first"
_AS_TEXT = "take the text out of it first, into a .txt or .jsonl file"
_NO_TEXT = "leave it out"
_MODEL = "open it as a model"

# Kind, first bytes, what it is, what to do.
_MAGIC: tuple[tuple[str, bytes, str, str], ...] = (
    ("gzip", b"\x1f\x8b", "compressed with gzip", _UNPACK),
    ("xz", b"\xfd7zXZ\x00", "compressed with xz", _UNPACK),
    ("xz", b"\x5d\x00\x00", "compressed with LZMA", _UNPACK),
    ("zstd", b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    ("packed", b"\x04\x22\x4d\x18", "compressed with lz4", _LATER),
    ("packed", b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", _LATER),
    ("packed", b"\x1f\x9d", "compressed with compress (.Z)", _LATER),
    ("packed", b"LZIP\x01", "compressed with lzip", _LATER),
    ("parquet", b"PAR1", "a Parquet file", "name it as data"),
    ("archive", b"PARE", "an encrypted Parquet file", "decrypt it first"),
    ("arrow", b"ARROW1", "an Arrow file", "name it as data"),
    ("table", b"FEA1", "a Feather file of version 1", "write it as Parquet or JSON Lines"),
    ("table", b"ORC", "an ORC file", "write it as Parquet or JSON Lines"),
    ("table", b"Obj\x01", "an Avro file", "write it as Parquet or JSON Lines"),
    ("table", b"\x89HDF\r\n\x1a\n", "an HDF5 file", "write its text as Parquet or JSON Lines"),
    ("table", b"SQLite format 3\x00", "an SQLite database", "write its text as Parquet or JSON Lines"),
    ("table", b"\x93NUMPY", "a NumPy array", _NO_TEXT),
    ("archive", b"PK\x03\x04", "a ZIP archive (so are PyTorch weights, Word and Excel files and EPUBs)", _UNPACK),
    ("archive", b"PK\x05\x06", "an empty ZIP archive", _NO_TEXT),
    ("archive", b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    ("archive", b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    ("gguf", b"GGUF", "a GGUF file", _MODEL),
    ("weights", b"tjgg", "model weights in a form older than GGUF (ggjt)", "get the model as GGUF"),
    ("weights", b"lmgg", "model weights in a form older than GGUF (ggml)", "get the model as GGUF"),
    ("document", b"%PDF-", "a PDF", _AS_TEXT),
    ("document", b"%!PS", "a PostScript file", _AS_TEXT),
    ("document", b"{\\rtf", "a Rich Text (RTF) file", _AS_TEXT),
    ("document", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Word or Excel file", _AS_TEXT),
    ("document", b"ITSF", "a compiled help (CHM) file", _AS_TEXT),
    ("media", b"\x89PNG\r\n\x1a\n", "a picture (PNG)", _NO_TEXT),
    ("media", b"\xff\xd8\xff", "a picture (JPEG)", _NO_TEXT),
    ("media", b"GIF87a", "a picture (GIF)", _NO_TEXT),
    ("media", b"GIF89a", "a picture (GIF)", _NO_TEXT),
    ("media", b"II*\x00", "a picture (TIFF)", _NO_TEXT),
    ("media", b"MM\x00*", "a picture (TIFF)", _NO_TEXT),
    ("media", b"\x00\x00\x01\x00", "a picture (icon)", _NO_TEXT),
    ("media", b"8BPS", "a picture (Photoshop)", _NO_TEXT),
    ("media", b"ID3", "sound (MP3)", _NO_TEXT),
    ("media", b"OggS", "sound (Ogg)", _NO_TEXT),
    ("media", b"fLaC", "sound (FLAC)", _NO_TEXT),
    ("media", b"\x1a\x45\xdf\xa3", "a film (Matroska or WebM)", _NO_TEXT),
    ("program", b"\x7fELF", "a program or library", _NO_TEXT),
    ("program", b"\xca\xfe\xba\xbe", "a compiled program", _NO_TEXT),
    ("program", b"\xcf\xfa\xed\xfe", "a program or library", _NO_TEXT),
    ("program", b"\x00asm", "a compiled program (WebAssembly)", _NO_TEXT),
)
_POINTER = re.compile(rb"version https?://(?:git-lfs\.github\.com|git-media\.io|hawser\.github\.com)/\S+\n")
_POINTER_SIZE = re.compile(rb"^size (\d+)\s*$", re.MULTILINE)
_MARKUP = re.compile(r"(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|meta|title)\b", re.I | re.S)
_XML = re.compile(r"<(?:\?xml\b|!doctype\s|svg\b|error>|rss\b|feed\b)", re.I)
_RECORD = re.compile(r'\{\s*(?:"|\}|\Z)')
_LIST = re.compile(r'\[\s*(?:\{\s*(?:"|\}|\Z)|"(?:[^"\\\n]|\\.)*(?:"\s*[,\]]|\Z)|\]|\Z)')


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    kind: str
    """One of PACKED, COLUMNS, WRITTEN, or pointer, packed, table, archive, gguf, safetensors, weights, document,
    markup, media, program, wide (UTF-16 or UTF-32 without a mark), binary."""
    what: str
    """In words, so that "it is ..." is a sentence."""
    advice: str = ""
    """What to do about it, where something else was wanted."""
    encoding: str | None = None
    """Of text: what its byte order mark names; of `wide`, what it seems to be; else None."""

    @property
    def sentence(self) -> str:
        """What it is and what to do."""
        return f"is {self.what}" + (f": {self.advice}" if self.advice else "")


def head_of(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def explanation(path: Path, wanted: frozenset[str]) -> str | None:
    """What the file at `path` is and what to do, for a reader that complains and reads the kinds `wanted`.

    None: nothing that says more than the reader can say itself, or a file that cannot be read.
    """
    try:
        return explain(head_of(path), wanted)
    except OSError:
        return None


def explain(head: bytes, wanted: frozenset[str]) -> str | None:
    """As `explanation`, of the first bytes themselves, or of the whole of a small file."""
    found = contents_of(head[:HEAD_BYTES])
    if found.kind == "markup" and wanted == JSON:  # where settings belong, a page is what came in place of them
        return f"is {found.what}: {AGAIN}"
    return None if found.kind in _NO_EXPLANATION | wanted else found.sentence


def contents_of(head: bytes, encoding: str = "utf-8") -> Contents:
    """What begins with `head`, its first HEAD_BYTES or all of it; `encoding` is that of text without a mark."""
    if not head:
        return Contents("empty", "an empty file")
    found = _pointer(head) or _by_magic(head)
    if found is not None:
        return found
    mark = mark_of(head)
    name, length = mark or (encoding, 0)
    whole = len(head) < HEAD_BYTES
    try:
        text = codecs.getincrementaldecoder(name)().decode(head[length:], final=whole)
    except UnicodeDecodeError:
        return _undecodable(head, name, mark)
    if name == "utf-8" and mark is None and (wide := wide_encoding(head)) is not None:
        return _wide(wide)
    if mark is None and text.count("\x00") * 20 > len(text):
        return Contents("binary", "no text: it is full of zero bytes", _NO_TEXT)
    kind, what, advice = _by_wording(text.lstrip("\ufeff \t\r\n"), whole)
    return Contents(kind, what, advice, mark[0] if mark else None)


def _pointer(head: bytes) -> Contents | None:
    """A small text in place of a large file, as version control leaves it."""
    if _POINTER.match(head) and len(head) < 1024:
        size = _POINTER_SIZE.search(head)
        of = f" ({int(size[1])} bytes)" if size else ""
        return Contents(
            "pointer",
            f"a Git LFS pointer, not the file itself{of}",
            "run `git lfs pull` where it was cloned, or fetch the file again",
        )
    if (head.startswith(b"/annex/objects/") or b".git/annex/objects/" in head[:64]) and len(head) < 1024:
        return Contents("pointer", "a git-annex pointer, not the file itself", "run `git annex get` on it")
    return None


def _by_magic(head: bytes) -> Contents | None:
    wordy = not any(code < 9 for code in head[:4096])
    for kind, magic, what, advice in _MAGIC:
        # A text may begin with ORC, PARENTS or ID3; what has no zero or control byte is none of those files.
        if head.startswith(magic) and not (wordy and magic.isalnum()):
            return Contents(kind, what, advice)
    if re.match(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", head):
        return Contents("bzip2", "compressed with bzip2", _UNPACK)
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # a frame that a reader skips
        return Contents("zstd", "compressed with zstd", _UNPACK)
    if head[:4] == b"\xff\xff\xff\xff" and head[4:8] != b"\xff\xff\xff\xff" and b"\x00" in head[4:8]:
        return Contents("arrow-stream", "an Arrow stream", "name it as data")
    if head[257:262] == b"ustar":
        return Contents("archive", "a tar archive", _UNPACK)
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        return Contents("media", "a picture (WebP)" if head[8:12] == b"WEBP" else "sound or film (RIFF)", _NO_TEXT)
    if head[4:8] == b"ftyp" and head[:3] == b"\x00\x00\x00":
        return Contents("media", "a film or picture (MP4, HEIC or AVIF)", _NO_TEXT)
    if head[:2] == b"BM" and head[6:10] == b"\x00\x00\x00\x00":
        return Contents("media", "a picture (BMP)", _NO_TEXT)
    if head[:2] == b"MZ" and b"\x00" in head[:64]:
        return Contents("program", "a program or library (Windows)", _NO_TEXT)
    if re.match(rb"\x80[\x02-\x05](?:[\x80-\x95(}\]cX]|\x95)", head):
        return Contents("weights", "a Python pickle", "it may run code when opened, so it never is; get another form")
    if head[8:10] in (b'{"', b"{}") and int.from_bytes(head[:8], "little") < 1 << 32:
        return Contents("safetensors", "a safetensors file", _MODEL)
    return None


def _undecodable(head: bytes, name: str, mark: tuple[str, int] | None) -> Contents:
    wide = wide_encoding(head)
    if wide is not None:
        return _wide(wide)
    controls = sum(head.count(code) for code in (0, 1, 2, 3, 4, 5, 6, 7))
    if controls * 100 > len(head):
        likely = likely_encoding(head)
        if likely in ("utf-16-le", "utf-16-be"):
            return _wide(likely)
        return Contents("binary", "no text: it holds bytes of no known kind", _NO_TEXT)
    # A few bad bytes do not hide that it is JSON; what is wrong with them is for its reader to say.
    text = head[mark[1] if mark else 0 :].decode(name, errors="replace")
    kind, what, advice = _by_wording(text.lstrip(" \t\r\n"), len(head) < HEAD_BYTES)
    if kind not in JSON:
        kind, what, advice = "text", f"text in another encoding than {name.upper()}", ""
    return Contents(kind, what, advice, mark[0] if mark else None)


def _wide(name: str) -> Contents:
    return Contents("wide", f"text in {name.upper()} without a byte order mark", "save it as UTF-8", name)


def _by_wording(text: str, whole: bool) -> tuple[str, str, str]:
    if _RECORD.match(text) or _LIST.match(text):
        kind = _json_kind(text, whole)
        if kind is not None:
            return kind, "JSON Lines" if kind == "json-lines" else "a JSON file", "convert it"
    if _MARKUP.match(text) or (_XML.match(text) and "<html" in text[:2000].lower()):
        return "markup", "an HTML page", f"{_AS_TEXT}; if it was meant to be something else, fetch that again"
    if _XML.match(text):
        if "<svg" in text[:2000]:
            return "media", "a picture (SVG)", _NO_TEXT
        return "markup", "an XML file", _AS_TEXT
    return "text", "text", ""


def _json_kind(text: str, whole: bool) -> str | None:
    """`json-lines` where the first line is a record of its own and not all there is; None: it is not JSON at all."""
    line, newline, rest = text.partition("\n")
    state = _parses(line.strip(), complete=bool(newline) or whole)
    if state != "broken" and text[0] == "{":
        return "json-lines" if rest.strip() or not whole else "json"
    if state == "whole" and text[0] == "[" and _is_said_of(text):
        return None
    return None if _parses(text, complete=whole) == "broken" else "json"


def _is_said_of(text: str) -> bool:
    """Whether words follow a list: `[] is an empty list`."""
    rest = text[json.JSONDecoder().raw_decode(text)[1] :].strip()
    return bool(rest) and rest[0] not in "[{"


def _parses(text: str, complete: bool) -> str:
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - 16
        return "cut off" if cut_off and not complete else "broken"
    except (RecursionError, ValueError):
        return "broken"
    return "whole"
