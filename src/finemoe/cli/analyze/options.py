"""Options that every verb of the laboratory shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finemoe.cli.completion import complete_run
from finemoe.core.errors import ConfigError

if TYPE_CHECKING:
    from finemoe.analysis.passages import ReadAs

MODEL = "A run directory or one checkpoint in it, an imported or Hugging Face folder, or a GGUF file."
Model = Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL, show_default=False, autocompletion=complete_run)]
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
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field", metavar="NAME", help="Field of a record that holds its text; `outer.inner` within another.",
        show_default="text",
    ),
]  # fmt: skip
Template = Annotated[
    str | None,
    typer.Option(
        "--template", metavar="TEXT", help="Joins several fields instead, such as '{question}\\n{answer}'.",
        show_default=False,
    ),
]  # fmt: skip
Encoding = Annotated[
    str | None,
    typer.Option(
        "--encoding", metavar="NAME", help="Of text files without a byte order mark: cp1252, gb18030, utf-16-le ...",
        show_default="utf-8",
    ),
]  # fmt: skip
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", help="Most tokens to read of each domain.")]
Length = Annotated[
    int | None,
    typer.Option("--length", metavar="N", help="Tokens of a window; default: the model's own length, at most 512."),
]
Rows = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Windows in one forward pass.")]
Report = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for results.json, report.html and figures/.")
]


def reading(text_field: str | None, template: str | None, encoding: str | None) -> dict[str, str]:
    """The options of a corpus of files that were given, by the name that a recipe has for them."""
    given = {"text_field": text_field, "template": template, "encoding": encoding}
    return {name: value for name, value in given.items() if value is not None}


def read_as(
    corpora: list[str] | None, text_field: str | None, template: str | None, encoding: str | None
) -> Sequence[str | ReadAs]:
    """What --corpus names, with how it is read.

    Raises:
        ConfigError: options, and nothing that they are of.
    """
    given = reading(text_field, template, encoding)
    if not given:
        return corpora or ()
    if not corpora:
        name = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{name} says how the files of --corpus are read: name some by --corpus PATH")
    from finemoe.analysis.passages import ReadAs

    return [ReadAs(corpus, given) for corpus in corpora]
