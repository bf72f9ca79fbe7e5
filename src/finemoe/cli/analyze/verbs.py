"""`finemoe analyze`: the verbs that look inside a model."""

from __future__ import annotations

import typer

from finemoe.cli.analyze.difference import difference
from finemoe.cli.analyze.experts import experts
from finemoe.cli.analyze.knockout import knockout
from finemoe.cli.analyze.load import load
from finemoe.cli.analyze.placement import placement
from finemoe.cli.analyze.relevance import relevance

analyze = typer.Typer(
    name="analyze",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)
for verb in (load, knockout, experts, difference, relevance, placement):
    analyze.command(verb.__name__)(verb)


@analyze.callback()
def about() -> None:
    """Look inside a model: what its experts take and do.

    \b
    Each reads labelled text and writes a table, JSON, a page and figures:
      finemoe analyze load runs/tiny           even or collapsed, over training
      finemoe analyze knockout runs/tiny       loss without each expert
      finemoe analyze experts runs/tiny        a card for every expert
      finemoe analyze difference before after  what fine-tuning moved
      finemoe analyze relevance runs/tiny      experts worth tuning (ESFT)
      finemoe analyze placement load --gpus 8  experts on devices, for serving
    """
