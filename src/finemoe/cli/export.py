"""`finemoe export`."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

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

Format = Literal["hf", "gguf"]
_DTYPES: Mapping[str, tuple[str | None, str]] = {
    "bf16": ("bf16", "BF16"),
    "f16": ("fp16", "F16"),
    "fp16": ("fp16", "F16"),
    "f32": ("fp32", "F32"),
    "fp32": ("fp32", "F32"),
    "q8_0": (None, "Q8_0"),
    "q4_0": (None, "Q4_0"),
}
"""As people write them -> as `export_hf` and `export_gguf` do; None where Hugging Face folders have none."""


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Run, checkpoint or imported folder; or a Hugging Face folder or .gguf file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder to make; a name that ends in .gguf makes a GGUF file.", show_default=False
        ),
    ],
    form: Annotated[
        Format | None, typer.Option("--format", help="What to write; default: as the name of OUT says.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Hugging Face model_type; default: as imported, or the first that fits."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="bf16, fp16 or fp32; GGUF also q8_0, q4_0. Default: as stored; GGUF f16."),
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Hugging Face: matrices as block-scaled FP8, as in V3.")] = False,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="GGUF: leave it out; programs must be given token ids.")
    ] = False,
    verify: Verify = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a model as a Hugging Face folder or a GGUF file.

    What was imported and not changed comes out bit for bit. What the format cannot hold is refused,
    or named where it does not change what the model computes. SOURCE is never changed.

    \b
    Examples:
      finemoe export runs/tiny exported/tiny --verify
      finemoe export imported/v3 exported/v3 --fp8
      finemoe export imported/smollm2 smollm2.gguf --dtype q8_0

    Exit status: 0 done, 1 written but not verified, 2 nothing was written.
    """
    form = form or ("gguf" if out.suffix == ".gguf" else "hf")
    options = _options(form, out, family, dtype, fp8, no_tokenizer)

    from finemoe.checkpoint.through_import import passage

    with passage(source, out, {"format": form, **options}, quiet=quiet) as way:
        facts = {"source": str(source), "format": form, **_write(form, way.source, way.place, options, quiet)}
        facts["path"] = os.path.realpath(out)
        way.appear()
        checks = _verify(way.source, out, quiet) if verify else []
        checks = [replace(check, said=way.said(check.said)) for check in checks]
    if as_json:
        print_json({**facts, "checks": [check.to_dict() for check in checks]})
    else:
        print_lines(_lines(facts, out))
        print_checks(checks)
    fail_unless_sound(checks)
    if not as_json:
        _say_next(form, facts["family"], out)


def _options(
    form: Format, out: Path, family: str | None, dtype: str | None, fp8: bool, no_tokenizer: bool
) -> dict[str, Any]:
    """What the writer of that format takes.

    Raises:
        ConfigError: an option that the format does not have.
    """
    from finemoe.core.config import did_you_mean
    from finemoe.core.errors import ConfigError

    if dtype is not None and dtype.lower() not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: no such type{did_you_mean(dtype.lower(), list(_DTYPES))}")
    hf, gguf = _DTYPES[dtype.lower()] if dtype is not None else (None, None)
    if form == "gguf":
        if out.suffix != ".gguf":
            raise ConfigError(f"--format gguf: the name must end in .gguf, as {out}.gguf does")
        given = "--family" if family is not None else "--fp8" if fp8 else None
        if given is not None:
            raise ConfigError(f"{given} is for Hugging Face folders; {out} becomes a GGUF file")
        return {"tokenizer": not no_tokenizer, **({} if gguf is None else {"dtype": gguf})}
    if no_tokenizer:
        raise ConfigError("--no-tokenizer is for GGUF files; give OUT a name that ends in .gguf")
    if dtype is not None and hf is None:
        raise ConfigError(f"--dtype {dtype} is for GGUF files; give OUT a name that ends in .gguf, or use --fp8")
    return {"family": family, "dtype": hf, "fp8": fp8}


def _write(form: Format, source: Path, out: Path, options: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    """Write it; what the reports of both formats say, under the same names."""
    from finemoe.checkpoint.gguf.exporting import export_gguf
    from finemoe.checkpoint.huggingface.exporting import export_hf
    from finemoe.checkpoint.huggingface.layers import training_only
    from finemoe.checkpoint.open import read_model_config
    from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES, TensorFolder

    config = read_model_config(source)
    report: Any
    if form == "gguf":
        report = export_gguf(source, out, quiet=quiet, **options)
        family, dtypes, lost, special = report.architecture, dict(report.kinds), training_only(config), {}
    else:
        report = export_hf(source, out, quiet=quiet, **options)
        family, lost = report.family, ()  # its notes say what of training is left behind
        dtypes = dict(Counter(DTYPE_NAMES[info.dtype] for info in TensorFolder.open(report.path).tensors.values()))
        special = {name: asdict(report)[name] for name in ("verbatim_config", "fp8_kept", "fp8_new", "resumed")}
    return {
        "path": str(report.path),
        "family": family,
        **size_of(config),
        "dtypes": dtypes,
        **special,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "lost": [*_training_state(source), *(f"{text} (training)" for text in lost)],
        "notes": list(report.notes),
    }


def _training_state(source: Path) -> list[str]:
    from finemoe.checkpoint.kinds import is_imported

    return [] if is_imported(source) else ["optimizer state and position in the data"]


def _verify(source: Path, out: Path, quiet: bool) -> list[Check]:
    from finemoe.checkpoint.open import read_model_config
    from finemoe.checkpoint.proof.written import compare_export
    from finemoe.checkpoint.storage.untrusted import read_json

    raw = None if out.is_file() else read_json(out / "config.json")
    return [
        check_tensors(lambda: compare_export(source, out, quiet=quiet), ", in the element types above"),
        check_twin(read_model_config(source), raw, quiet),
    ]


def _lines(facts: Mapping[str, Any], out: Path) -> Iterator[tuple[str, str]]:
    from finemoe.charts.numbers import duration
    from finemoe.cli.doctor import nbytes

    form = {"hf": "Hugging Face", "gguf": "GGUF"}[facts["format"]]
    yield "Exported", f"{facts['family']} ({form}) to {out}"
    yield "Parameters", show_size(dict(facts))
    yield "Tensors", ", ".join(f"{number:,} {name}" for name, number in facts["dtypes"].items())
    if facts.get("fp8_kept") or facts.get("fp8_new"):
        yield "FP8 blocks", f"{facts['fp8_kept']:,} with the factor they came with, {facts['fp8_new']:,} with a new one"
    if facts.get("verbatim_config"):
        yield "config.json", "as it was imported"
    yield "Written", f"{nbytes(facts['bytes'])} in {duration(facts['seconds'])}"
    if facts["lost"]:
        yield "Left behind", "; ".join(facts["lost"])
    for note in facts["notes"]:
        yield "Note", note


def _say_next(form: Format, family: str, out: Path) -> None:
    from finemoe.checkpoint.huggingface.families import FAMILIES

    name = shlex.quote(str(out))
    typer.echo(f"\nNext: finemoe doctor {name}")
    if form == "gguf":
        typer.echo(f"      llama-cli -m {name}")
    elif FAMILIES[family].native:
        typer.echo(f'In transformers: AutoModelForCausalLM.from_pretrained("{out}")')
