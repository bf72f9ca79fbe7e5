"""`finemoe sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finemoe.cli.completion import complete_run
from finemoe.cli.output import Json, Quiet, WeightsOption, print_json

if TYPE_CHECKING:
    from finemoe.methods.distillation.sampling import Sampled

_VERDICTS, _ALWAYS = ("right", "wrong", "unreadable", "error"), ("right", "wrong")

Source = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Who answers: a run, a checkpoint, an imported or Hugging Face folder, or a GGUF file.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
Prompts = Annotated[
    list[str],
    typer.Argument(
        metavar="PROMPTS...",
        help="Files, folders or patterns of records in any form of a conversation; their answers are left out.",
        show_default=False,
    ),
]

Out = Annotated[Path, typer.Option("--out", metavar="FILE.jsonl", help="Where to write.", show_default=False)]
Temperature = Annotated[float, typer.Option(help="0 always takes the most probable token.")]
TopK = Annotated[int | None, typer.Option(help="Draw among the K most probable tokens.", metavar="K")]
TopP = Annotated[float | None, typer.Option(help="Draw among the fewest tokens that reach P.", metavar="P")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of a completion.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal answers.")]


def sample(
    source: Source,
    prompts: Prompts,
    out: Out,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Completions of each prompt.")] = 1,
    keep: Annotated[
        Literal["all", "ended", "answer"],
        typer.Option(help="What ended by itself; of that, what says the record's own answer."),
    ] = "all",
    best_of: Annotated[
        int | None,
        typer.Option("--best-of", metavar="K", help="At most K of each prompt, the most probable ones by token."),
    ] = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    weights: WeightsOption = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let a model answer prompts, and keep what passes.

    Writes conversations, one a line, with where each comes from; the method sft reads the file as it is.
    --keep answer compares with the answer that a record has in a field (answer, solution, reference, ...)
    or as its last message: a box as LaTeX, a number with the one that the completion ends on, words with
    words. What is interrupted goes on where it stopped when the same command is given again; a
    hidden file beside FILE.jsonl says where that is, until it is done.

    \b
    Examples:
      finemoe sample runs/teacher questions.jsonl --out answers.jsonl
      finemoe sample runs/teacher sums.jsonl --out right.jsonl --n 8 \\
        --keep answer --best-of 2

    Then: a recipe with method.kind = "sft" that reads FILE.jsonl.
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(source)  # a path that holds nothing is refused before a second of imports

    from finemoe.methods.distillation.journal import forget
    from finemoe.methods.distillation.sampling import sample as draw

    done = draw(
        source, prompts, out, n=n, keep=keep, best_of=best_of, temperature=temperature, top_k=top_k, top_p=top_p,
        max_new_tokens=max_new_tokens, seed=seed, weights=weights, quiet=quiet,
    )  # fmt: skip
    forget(done.path)
    if as_json:
        print_json(done.to_dict())
    else:
        show(done)


def show(done: Sampled, as_texts: bool = False) -> None:
    """What was drawn, what became of it, and what to do with it; `as_texts`: no chat template asked the model."""
    from finemoe.cli.conversion import print_lines

    share = done.kept / done.drawn if done.drawn else 0.0
    reasons = [f"{count:,} {why}" for why, count in sorted(done.left_out.items(), key=lambda one: -one[1])]
    judged = [
        f"{name}: " + ", ".join(f"{one} {counts.get(one, 0):,}" for one in _VERDICTS if one in counts or one in _ALWAYS)
        for name, counts in done.verdicts.items()
    ]
    skipped = [("Records", f"{len(done.skipped):,} hold no prompt")] if done.skipped else []
    print_lines([
        ("Asked", f"{done.prompts:,} prompts, {done.drawn:,} completions"),
        ("Kept", f"{done.kept:,} ({share:.0%}) in {done.path}"),
        *([("Judged", "; ".join(judged))] if judged else []),
        *([("Left out", ", ".join(reasons))] if reasons else []),
        *skipped,
    ])  # fmt: skip
    if done.kept:
        corpus = f'corpus = {{ kind = "files", paths = ["{done.path}"] }}'
        how = "without [method], which reads the texts as they were," if as_texts else 'with method.kind = "sft"'
        typer.echo(f"\nNext: a recipe {how} and, in [data], {corpus}")
