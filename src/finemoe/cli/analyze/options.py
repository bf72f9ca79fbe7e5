"""Options that every verb of the laboratory shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "A run directory or one checkpoint in it, an imported or Hugging Face folder, or a GGUF file."
Model = Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
Texts = Annotated[
    list[str] | None, typer.Option("--text", metavar="TEXT", help="A text to read, as domain `text`; repeatable.")
]
Corpora = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus",
        metavar="[LABEL=]PATH",
        help="Texts of one domain: a file, folder or glob; without a label its folders are the domains; `stdlib` is "
        "the standard library. Repeatable. Default: what the run held out.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", help="Most tokens to read of each domain.")]
Length = Annotated[
    int | None,
    typer.Option("--length", metavar="N", help="Tokens of a window; default: the model's own length, at most 512."),
]
Rows = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Windows in one forward pass.")]
Report = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for results.json, report.html and figures/.")
]
