"""The `finemoe` command: its verbs, and what happens when one fails.

Exit status: 0 done, 1 output closed early, or `doctor`, --check or --verify found a problem, 2 a mistake the user can
mend, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finemoe.cli.analyze.verbs import analyze
from finemoe.cli.chat import chat
from finemoe.cli.compare import compare
from finemoe.cli.data import data
from finemoe.cli.doctor import doctor
from finemoe.cli.env import env
from finemoe.cli.evaluate import evaluate
from finemoe.cli.export import export
from finemoe.cli.generate import generate
from finemoe.cli.import_ import import_
from finemoe.cli.launch import launch
from finemoe.cli.merge import merge
from finemoe.cli.paper import paper
from finemoe.cli.plan import plan
from finemoe.cli.presets import presets
from finemoe.cli.quantize import quantize
from finemoe.cli.recipe import recipe
from finemoe.cli.rejection import rejection
from finemoe.cli.resume import resume
from finemoe.cli.rollouts import rollouts
from finemoe.cli.runs import runs
from finemoe.cli.sample import sample
from finemoe.cli.serve import serve
from finemoe.cli.show import show
from finemoe.cli.size import size
from finemoe.cli.trace import trace
from finemoe.cli.train import train
from finemoe.cli.upcycle import upcycle
from finemoe.cli.verify_parallel import verify_parallel
from finemoe.core.errors import FinemoeError
from finemoe.core.files import plain_words
from finemoe.parallel.seat import speaks

_HAVE_MET = "finemoe.parallel.processes"
"""Loaded by processes that have met; until then those of one machine do the same, and meet the same errors."""


class Verbs(TyperGroup):
    """Accepts --debug anywhere on the line, and turns a user's mistake into one message."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move --debug to the front, where the group looks for it."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb.

        Raises:
            typer.Exit: 2 after a FinemoeError or an unusable file, 130 after Ctrl-C.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted", "yellow", ctx.params["debug"])
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (FinemoeError, OSError) as error:
            said = plain_words(error) if isinstance(error, OSError) else str(error)
            if speaks() or (_HAVE_MET not in sys.modules and os.environ.get("LOCAL_RANK", "0") == "0"):
                _say("error: ", "bold red", ctx.params["debug"], said)
            elif _HAVE_MET in sys.modules and not (isinstance(error, FinemoeError) and error.everywhere):
                _say(f"error on rank {os.environ['RANK']}: ", "bold red", ctx.params["debug"], said)
            raise typer.Exit(2) from error
        except Exception as error:
            if getattr(error, "option_name", None) == "--dtype":
                _name_weights(error)
            raise


def _name_weights(error: Any) -> None:
    """Where an option is unknown that the release before had under another name, the new one is suggested alone."""
    known = [name for parameter in error.ctx.command.params for name in parameter.opts] if error.ctx else []
    if "--weights" in known:
        error.possibilities = ["--weights"]


def _say(label: str, style: str, debug: bool, message: str = "") -> None:
    from rich.text import Text

    from finemoe.core.logs import console

    if debug:
        traceback.print_exc()
    console().print(Text.assemble((label, style), message), soft_wrap=True)


app = typer.Typer(
    name="finemoe",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)
_VERBS = (
    train, resume, runs, show, generate, chat, serve, evaluate, compare, paper, trace, size, plan, presets, import_,
    export, merge, quantize, upcycle, sample, rejection, rollouts, verify_parallel, doctor, env,
)  # fmt: skip
for verb in _VERBS:
    app.command(verb.__name__.rstrip("_").replace("_", "-"))(verb)  # `import` is a word of the language
app.add_typer(analyze)
app.add_typer(recipe)
app.add_typer(data)
app.add_typer(launch)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"finemoe {version('finemoe')}")
        raise typer.Exit


@app.callback()
def finemoe(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show more, and the traceback of an error.")] = False,
) -> None:
    """Train, compare, inspect and sample fine-grained mixture-of-experts language models.

    \b
    A first quarter of an hour:
      finemoe presets                          which models there are
      finemoe size tiny-moe deepseek-moe-16b   parameters, FLOPs and cache
      finemoe plan deepseek-v3 --gpus 2048 --device h800 --search
      finemoe train recipes/tiny.toml --out runs/tiny
      finemoe recipe new my-texts/ --out mine.toml  a recipe for your own files
      finemoe generate runs/tiny --prompt "def main("
      finemoe chat runs/tiny                   talk to it, switch its experts
      finemoe serve runs/tiny                  the same on a page; OpenAI's API
      finemoe train recipes/r1-zero.toml --out runs/r1-zero  it reasons: 5-10 min
      finemoe compare --out runs/comparison    from dense to DeepSeekMoE
      finemoe import MODEL imported/model      from Hugging Face or GGUF
      finemoe analyze experts runs/tiny --out experts
      finemoe evaluate runs/tiny --tasks hellaswag --data DIR
      finemoe paper --list                     the papers, in miniature

    Results go to stdout, everything else to stderr. `finemoe VERB --help` explains a verb.
    """
    from finemoe.core import logs

    logs.set_up(debug=debug)


def main() -> None:
    """The console script; ends the process with its status."""
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started us: what is said goes nowhere
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model writes any character; no terminal is to fail on one
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="finemoe")
    except SystemExit as end:
        sys.exit(_flushed(end.code))


def _flushed(status: Any) -> Any:
    """`status`, or 1 where the reader of stdout has gone: found out here, while it can be kept quiet."""
    try:
        sys.stdout.flush()
    except OSError:  # a pipe that nobody reads, a terminal that is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or 1
    return status
