"""`finemoe quantize`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from finemoe.cli.completion import complete_run
from finemoe.cli.output import Json, Quiet, print_json


def quantize(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run or a checkpoint in it, an imported or Hugging Face folder, a GGUF file.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.", show_default=False)],
    weights: Annotated[
        Literal["int8", "int4", "stored"],
        typer.Option(help="Of every large product; stored keeps the blocks of a GGUF file."),
    ] = "int8",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a model small: its large products in 8 or 4 bits.

    Experts, attention and dense layers become blocks of 32 numbers that share a scale: 8.5 or 4.5
    bits a weight, where float32 takes 32. Routers, norms and latents stay as they are, and words in
    and out keep 8 bits. One part is held at a time, so that a model larger than memory can be made
    small. OUT is mapped when it opens, and experts that no token chooses are not read. Under
    --weights stored the blocks of a GGUF file stay what they are.

    \b
    Examples:
      finemoe quantize imported/v2-lite small/v2-lite --weights int4
      finemoe quantize mixtral.Q4_K_M.gguf small/mixtral --weights stored
      finemoe evaluate small/v2-lite imported/v2-lite --tasks arc-easy --data DIR

    Then: finemoe generate OUT, chat, serve, evaluate. Any model is made small for one of these alone
    by its option --weights int8 or int4. Interrupted, the same command goes on where it was.
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(model)  # a path that holds nothing is refused before a second of imports

    from finemoe.compression.quantize import quantize as write

    facts = write(model, out, weights, quiet=quiet)
    if as_json:
        print_json(facts)
        return
    from finemoe.cli.conversion import print_lines
    from finemoe.cli.doctor import nbytes

    what = "their blocks as they were" if weights == "stored" else weights
    share = facts["bytes"] / facts["bytes_before"]
    print_lines(
        [
            ("Quantised", f"{facts['source']} into {out}, large products in {what}"),
            ("Small", f"{facts['small']:,} of {facts['tensors']:,} tensors"),
            ("Written", f"{nbytes(facts['bytes'])}, {share:.0%} of what it was, in {facts['seconds']:.1f} s"),
        ]
    )
    place = shlex.quote(str(out))
    typer.echo(f"\nNext: finemoe generate {place} --prompt TEXT")
    typer.echo(f"      finemoe evaluate {place} --tasks NAME --data DIR")
