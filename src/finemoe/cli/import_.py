"""`finemoe import`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.conversion import (
    Verify,
    fail_unless_sound,
    print_checks,
    print_lines,
    show_size,
)
from finemoe.cli.output import Json, Quiet, print_json

if TYPE_CHECKING:
    pass


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Hugging Face folder, .gguf file, or org/name[@revision] on the hub.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.", show_default=False)],
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata",
            metavar="KEY=VALUE",
            help="What a GGUF file does not say and should: expert_group_count=8. May be given again.",
        ),
    ] = None,
    verify: Verify = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Import a Hugging Face folder or a GGUF file.

    Tensors are placed, or carried along verbatim, or named with the reason why not; a missing or
    misshaped one stops the import. Only safetensors and GGUF are read: no pickle, no remote code.
    OUT appears when all is done; interrupted, the same command goes on where it was.

    \b
    Examples:
      finemoe import models/DeepSeek-V2-Lite imported/v2-lite --verify
      finemoe import deepseek-ai/DeepSeek-V2-Lite imported/v2-lite
      finemoe import SmolLM2-135M.gguf imported/smollm2
      finemoe import R1.gguf out --metadata expert_group_count=8 \\
        --metadata expert_group_used_count=4

    Exit status: 0 done, 1 imported but not verified, 2 nothing was imported.
    """
    from finemoe.checkpoint.huggingface.hub import resolve

    added, path = _metadata(metadata or []), resolve(source, quiet=quiet)

    from finemoe.checkpoint.conversion import import_ as convert

    facts = convert(path, out, metadata=added, verify=verify, quiet=quiet)
    if as_json:
        print_json(facts)
    else:
        print_lines(_lines(facts, out))
        print_checks(facts["checks"])
    fail_unless_sound(facts["checks"])
    if not as_json:
        _say_next(out)


def _metadata(given: list[str]) -> dict[str, Any]:
    """`--metadata` as keys and values.

    Raises:
        ConfigError: no `KEY=VALUE`.
    """
    import json

    from finemoe.core.errors import ConfigError

    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--metadata {text}: write KEY=VALUE, as expert_group_count=8")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _lines(facts: Mapping[str, Any], out: Path) -> Iterator[tuple[str, str]]:
    from finemoe.charts.numbers import duration
    from finemoe.cli.doctor import nbytes

    form = {"huggingface": "Hugging Face", "gguf": "GGUF"}[facts["format"]]
    yield "Imported", f"{facts['family']} ({form}) into {out}"
    yield "Parameters", show_size(dict(facts))
    placed = facts["tensors"].get("loaded", 0)
    others = [f"{facts['tensors'].get(name, 0):,} {name}" for name in ("carried", "dropped")]
    dequantized = f" ({facts['dequantized']:,} of them dequantised)" if facts["dequantized"] else ""
    yield "Tensors", f"{placed:,} placed{dequantized}, {', '.join(others)}"
    for status, reason, tensors in _grouped(facts["aside"]):
        yield f"  {status}", f"{tensors:,}: {reason}"
    yield "Element types", ", ".join(f"{name} ({number:,})" for name, number in facts["dtypes"].items())
    yield "Written", f"{nbytes(facts['bytes'])} in {duration(facts['seconds'])}"
    for warning in facts["warnings"]:
        yield "Warning", warning
    for note in facts["notes"]:
        yield "Note", note


def _grouped(aside: list[Mapping[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Status, reason and number; reasons that name each its tensor count as one kind."""
    kinds: Counter[tuple[str, str]] = Counter()
    for entry in aside:
        reason = "FP8 factors of the weights" if entry["reason"].startswith("FP8 factors") else entry["reason"]
        kinds[entry["status"], reason] += entry["tensors"]
    for (status, reason), tensors in kinds.items():
        yield status, reason, tensors


def _say_next(out: Path) -> None:
    folder = shlex.quote(str(out))
    from finemoe.checkpoint.open import load_chat_template

    lines = [f"\nNext: finemoe doctor {folder}"]
    if (out / "tokenizer.json").exists() and load_chat_template(out) is not None:
        lines.append(f"      finemoe chat {folder}")
    elif (out / "tokenizer.json").exists():
        lines.append(f'      finemoe generate {folder} --prompt "..."')
    lines.append(f"      finemoe export {folder} OUT    (or OUT.gguf)")
    lines.append(f'To train it further: a recipe with start_from = "{out}"')
    typer.echo("\n".join(lines))
