"""`finemoe merge`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.output import Json, Quiet, print_json


def merge(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="The model that was tuned: run, checkpoint, imported or Hugging Face folder.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="Folder of `finemoe export --adapter`, or a LoRA of PEFT.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.", show_default=False)],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put an adapter into the model that it tuned.

    OUT is a model like any other: it can be evaluated, served, trained further and exported.
    What the adapter changes is written in float32, all else as BASE has it. Of an adapter written
    here it is known which model it tuned, and another BASE is refused.

    \b
    Examples:
      finemoe merge imported/v2-lite law-adapter merged/law
      finemoe merge runs/base peft-adapter merged/peft

    Then: finemoe export OUT DIR, for a Hugging Face folder.
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(base)  # a path that holds nothing is refused before a second of imports

    from finemoe.checkpoint.adapters.files import merge as write

    facts = write(base, adapter, out, quiet=quiet)
    if as_json:
        print_json(facts)
        return
    from finemoe.cli.conversion import print_lines

    print_lines(_lines(facts, out))
    typer.echo(f"\nNext: finemoe evaluate {shlex.quote(str(out))} --tasks NAME --data DIR")


def _lines(facts: Mapping[str, Any], out: Path) -> Iterator[tuple[str, str]]:
    from finemoe.cli.doctor import nbytes

    form = {"delta": "the tuned experts", "peft": "the low-rank adapters"}[facts["format"]]
    yield "Merged", f"{form} of {facts['adapter']} into {facts['base']}, as {out}"
    yield "Changed", f"{facts['changed']:,} of {facts['tensors']:,} tensors, written in float32"
    yield "Written", nbytes(facts["bytes"])
