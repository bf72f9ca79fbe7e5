"""What can happen to a file: cut, flipped bits, swapped, and JSON whose values are of the wrong kind."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RAW = {
    "digits": "9" * 5000,
    "huge": "1" + "0" * 400,
    "beyond": "1" + "0" * 30,
    "negative": "-1",
    "float": "0.5",
    "overflow": "1e999",
    "nan": "NaN",
    "infinity": "-Infinity",
    "null": "null",
    "true": "true",
    "text": '"x"',
    "empty": '""',
    "number in text": '"3"',
    "half a character": r'"\ud800"',
    "nul": r'"\u0000"',
    "way out": '"../../x"',
    "list": "[]",
    "numbers": "[1, 2, 3]",
    "table": "{}",
    "strange table": '{"x": null}',
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep tables": '{"a":' * 50_000 + "1" + "}" * 50_000,
}
"""JSON that stands in place of a value."""
_MARK = "\ue000mark\ue000"


def _truncate(path: Path, rng: random.Random, _: list[Path]) -> None:
    os.truncate(path, int(path.stat().st_size * rng.random()))


def _empty(path: Path, rng: random.Random, _: list[Path]) -> None:
    os.truncate(path, 0)


def _delete(path: Path, rng: random.Random, _: list[Path]) -> None:
    path.unlink()


def _flip(path: Path, rng: random.Random, _: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    for _bit in range(rng.choice([1, 1, 1, 3, 30]) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _zeros(path: Path, rng: random.Random, _: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1)
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def _invalid_text(path: Path, rng: random.Random, _: list[Path]) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at] + rng.choice([b"\xff\xfe", b"\xc3\x28", b"\x00"]) + content[at:])


def _append(path: Path, rng: random.Random, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"{", b"}\n", b"null\n", b"[]\n", rng.randbytes(20)]))


def _repeat(path: Path, rng: random.Random, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes() * 2)


def _swap(path: Path, rng: random.Random, others: list[Path]) -> None:
    path.write_bytes(rng.choice(others).read_bytes())


def _folder(path: Path, rng: random.Random, _: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def _link_to_itself(path: Path, rng: random.Random, _: list[Path]) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(value, key) for key, _ in pairs] + [place for _, inner in pairs for place in _places(inner)]


def _changed(text: str, rng: random.Random) -> str:
    """JSON with one value replaced, one key renamed or left out, or another whole."""
    value = json.loads(text)
    places = _places(value)
    raw = rng.choice(list(_RAW.values()))
    if not places or rng.random() < 0.05:
        return raw
    # Keys near the top as often as the many below, such as the tokens of a tokenizer.
    near = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    container, key = rng.choice(rng.choice([near, places]))
    if isinstance(container, dict) and rng.random() < 0.25:
        moved = container.pop(key)
        if rng.random() < 0.5:
            container[str(key) + rng.choice(["x", "", "9"])] = moved
        return json.dumps(value)
    container[key] = _MARK
    return json.dumps(value, ensure_ascii=False).replace(f'"{_MARK}"', raw)


def _json(path: Path, rng: random.Random, _: list[Path]) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        path.write_text(_changed(text, rng), encoding="utf-8")
        return
    lines = text.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _changed(lines[number], rng)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


_Damage = Callable[[Path, random.Random, list[Path]], None]
_RAREST: list[_Damage] = [_empty, _delete, _repeat, _folder, _link_to_itself]
_BYTES: list[_Damage] = [_truncate, _flip, _zeros, _invalid_text, _append, _swap]


def damage(path: Path, rng: random.Random, others: list[Path]) -> str:
    """Damage one file; what was done. `others`: what may take its place."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        kind: _Damage = _json
    else:
        kind = rng.choice(_RAREST if rng.random() < 0.2 else _BYTES)
    kind(path, rng, others)
    return kind.__name__.strip("_")


def files_in(folder: Path) -> list[Path]:
    """Every file of ours below `folder`, in order; no lock, nothing for people alone."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path for path in found if not path.name.startswith(".") and path.suffix not in (".log", ".lock"))


def contents(folder: Path) -> dict[str, bytes]:
    """What `files_in` hold, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}


def copy_of(folder: Path, to: Path) -> Path:
    """A fresh copy."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to, symlinks=True))
