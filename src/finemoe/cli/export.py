"""`finemoe export`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finemoe.cli.conversion import (
    Verify,
    fail_unless_sound,
    print_checks,
    print_lines,
    show_size,
)
from finemoe.cli.output import Json, Quiet, print_json

Format = Literal["hf", "gguf"]
Family = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Hugging Face model_type; default: as imported, or the first that fits."),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="bf16, fp16 or fp32; GGUF also q8_0, q4_0. Default: as stored; GGUF f16."),
]

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="Run, checkpoint or imported folder; or a Hugging Face folder or .gguf file.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Folder to make; a name that ends in .gguf makes a GGUF file.", show_default=False
    ),
]
FP8 = Annotated[bool, typer.Option("--fp8", help="Hugging Face: matrices as block-scaled FP8, as in V3.")]
NoTokenizer = Annotated[
    bool, typer.Option("--no-tokenizer", help="GGUF: leave it out; programs must be given token ids.")
]
Adapter = Annotated[
    bool, typer.Option("--adapter", help="Of a run that tuned LoRA or experts: these alone, for PEFT or as a delta.")
]


def export(
    source: Source,
    out: Out,
    form: Annotated[
        Format | None, typer.Option("--format", help="What to write; default: as the name of OUT says.")
    ] = None,
    family: Family = None,
    dtype: Dtype = None,
    fp8: FP8 = False,
    no_tokenizer: NoTokenizer = False,
    adapter: Adapter = False,
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
      finemoe export runs/tuned law-adapter --adapter

    Exit status: 0 done, 1 written but not verified, 2 nothing was written.
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(source)  # a path that holds nothing is refused before a second of imports

    from finemoe.checkpoint.conversion import export as write

    facts = write(
        source, out,
        format=form, family=family, dtype=dtype, fp8=fp8, tokenizer=not no_tokenizer, adapter=adapter,
        verify=verify, quiet=quiet,
    )  # fmt: skip
    if adapter:
        print_json(facts) if as_json else _show_adapter(facts, out)
        return
    if as_json:
        print_json(facts)
    else:
        print_lines(_lines(facts, out))
        print_checks(facts["checks"])
    fail_unless_sound(facts["checks"])
    if not as_json:
        _say_next(facts["format"], facts["family"], out)


def _show_adapter(facts: Mapping[str, Any], out: Path) -> None:
    from finemoe.charts.numbers import count
    from finemoe.cli.doctor import nbytes

    peft = facts["format"] == "peft"
    what = f"low-rank adapters for PEFT ({facts['family']})" if peft else "the tuned experts, as a delta"
    print_lines([
        ("Exported", f"{what}, to {out}"),
        ("Parameters", f"{count(facts['parameters'])}, {facts['share']:.1%} of the model's"),
        ("Written", nbytes(facts["bytes"])),
        *(("Left behind", note) for note in facts["notes"]),
    ])  # fmt: skip
    typer.echo(f"\nNext: finemoe merge BASE {shlex.quote(str(out))} OUT")
    if peft:
        typer.echo(f'In PEFT: PeftModel.from_pretrained(base, "{out}")')


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
