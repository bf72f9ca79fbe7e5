"""`finemoe rejection`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.output import Json, Quiet, WeightsOption, print_json
from finemoe.cli.sample import MaxNewTokens, Out, Prompts, Seed, Source, Temperature, TopK, TopP, show

Rewards = Annotated[
    Path | None,
    typer.Option(
        "--rewards",
        metavar="FILE.toml",
        help="[[rewards]] tables, or a recipe with [[method.rewards]]; without it, the record's own answer counts.",
        show_default=False,
    ),
]
AtLeast = Annotated[float, typer.Option("--at-least", metavar="R", help="Weighted sum of the rewards that is kept.")]
BestOf = Annotated[
    int | None, typer.Option("--best-of", metavar="K", help="At most K to each prompt, those worth most.")
]
Template = Annotated[
    str | None, typer.Option(metavar="TEXT", help='For a model that knows no chat: "{prompt}", or words around it.')
]


def rejection(
    source: Source,
    prompts: Prompts,
    out: Out,
    rewards: Rewards = None,
    at_least: AtLeast = 1.0,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Answers to each prompt.")] = 4,
    best_of: BestOf = None,
    template: Template = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    weights: WeightsOption = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer prompts, and keep what rewards find good.

    Rejection sampling: a model writes N answers to each prompt, rewards judge them as in GRPO, and
    conversations whose answers are worth at least R are written, one a line, with what each reward
    said. The method sft reads the file as it is. A file of rewards:

    \b
      [[rewards]]
      kind = "answer"         # what the record's own answer says, worth 1
      [[rewards]]
      kind = "format"         # and in the form that is asked for, worth 0.2 more
      weight = 0.2

    Left out, and counted, are answers that did not end, that say what another of the prompt says,
    and that could not be judged, which is never taken for wrong. What is interrupted goes on where
    it stopped when the same command is given again.

    \b
    Examples:
      finemoe rejection runs/r1-zero/3-zero questions.jsonl --out right.jsonl \\
        --n 16 --template "{prompt}" --max-new-tokens 20
      finemoe rejection runs/r1 asked.jsonl --out good.jsonl --rewards r.toml

    Then: a recipe that reads FILE.jsonl, with method.kind = "sft"; behind --template, without [method].
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(source)  # a path that holds nothing is refused before a second of imports

    from finemoe.methods.distillation.journal import forget
    from finemoe.methods.distillation.rejection import rejection as draw

    done = draw(
        source, prompts, out, rewards=rewards, at_least=at_least, n=n, best_of=best_of, template=template,
        temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, weights=weights,
        quiet=quiet,
    )  # fmt: skip
    forget(done.path)
    if as_json:
        print_json(done.to_dict())
    else:
        show(done, template is not None)
