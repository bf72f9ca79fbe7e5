"""`finemoe import`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.conversion import (
    Check,
    Verify,
    check_tensors,
    check_twin,
    fail_unless_sound,
    print_checks,
    print_lines,
    show_size,
    size_of,
)
from finemoe.cli.output import Json, Quiet, print_json

if TYPE_CHECKING:
    from finemoe.checkpoint.weights.imported import ImportReport


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
      finemoe import R1.gguf out --metadata expert_group_count=8 --metadata expert_group_used_count=4

    Exit status: 0 done, 1 imported but not verified, 2 nothing was imported.
    """
    from finemoe.checkpoint.huggingface.hub import resolve

    path = resolve(source, quiet=quiet)
    _check_foreign(path)

    from finemoe.checkpoint.gguf.opening import import_gguf
    from finemoe.checkpoint.huggingface.importing import import_hf

    added = _metadata(metadata or [], path)
    report = (
        import_gguf(path, out, metadata=added, quiet=quiet) if path.is_file() else import_hf(path, out, quiet=quiet)
    )
    checks = _verify(path, report, quiet) if verify else []
    facts = _facts(report, path)
    if as_json:
        print_json({**facts, "checks": [check.to_dict() for check in checks]})
    else:
        print_lines(_lines(facts, out))
        print_checks(checks)
    fail_unless_sound(checks)
    if not as_json:
        _say_next(out)


def _metadata(given: list[str], path: Path) -> dict[str, Any]:
    """`--metadata` as keys and values.

    Raises:
        ConfigError: no `KEY=VALUE`, or for a folder, which has a config.json.
    """
    import json

    from finemoe.core.errors import ConfigError

    if given and not path.is_file():
        raise ConfigError(f"--metadata {given[0]}: is for GGUF files; what {path / 'config.json'} says can be edited")
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


def _check_foreign(path: Path) -> None:
    """Refuse what needs no import, or is only a part of what does.

    Raises:
        CheckpointError: with what to do instead.
    """
    from finemoe.checkpoint.kinds import is_imported
    from finemoe.core.errors import CheckpointError

    if path.is_file() and path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path}: a file alone is imported only as .gguf; give the folder that it lies in")
    if is_imported(path):
        raise CheckpointError(f"{path}: is imported already; use it as it is, or `finemoe export` it")
    if (path / "checkpoints").is_dir() or (path / "state.json").exists():
        raise CheckpointError(f"{path}: is a run of finemoe, which needs no import; use it as it is")
    ggufs = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{path}: holds GGUF files; give the one you want, such as {ggufs[0]}")


def _verify(source: Path, report: ImportReport, quiet: bool) -> list[Check]:
    from finemoe.checkpoint.proof.written import compare_import
    from finemoe.checkpoint.storage.untrusted import read_json

    raw = None if source.is_file() else read_json(source / "config.json")
    return [
        check_tensors(lambda: compare_import(source, report.path, quiet=quiet)),
        check_twin(report.config, raw, quiet),
    ]


def _facts(report: ImportReport, source: Path) -> dict[str, Any]:
    from finemoe.checkpoint.weights.imported import read_imported

    native = read_imported(report.path)
    record = native.source()["tensors"].values()
    aside = Counter((entry["status"], entry.get("reason", "")) for entry in record if entry["status"] != "loaded")
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in native.tensors.tensors.values())
    return {
        "path": str(report.path),
        "source": str(source),
        "family": report.family,
        "format": native.format,
        **size_of(report.config),
        "tensors": dict(Counter(entry["status"] for entry in record)),
        "dequantized": report.dequantized,
        "aside": [{"status": status, "reason": why, "tensors": number} for (status, why), number in aside.items()],
        "dtypes": dict(dtypes),
        "bytes": report.nbytes,
        "resumed": report.resumed,
        "seconds": report.seconds,
        "notes": list(report.notes),
        "warnings": list(report.warnings),
    }


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
    lines = [f"\nNext: finemoe doctor {folder}"]
    if (out / "tokenizer.json").exists():
        lines.append(f'      finemoe generate {folder} --prompt "..."')
    lines.append(f"      finemoe export {folder} OUT    (or OUT.gguf)")
    lines.append(f'To train it further: a recipe with start_from = "{out}"')
    typer.echo("\n".join(lines))
