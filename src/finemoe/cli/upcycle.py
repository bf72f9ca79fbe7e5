"""`finemoe upcycle`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finemoe.cli.output import Json, Quiet, print_json

if TYPE_CHECKING:
    from finemoe.methods.upcycling import Upcycled

Router = Literal["sigmoid", "softmax", "plain"]
Grouping = Literal["position", "similar"]
_FORWARD = (
    "copies", "shards", "shared", "active", "router", "route_scale", "dense_layers", "noise", "redrawn", "seed",
)  # fmt: skip
_BACKWARD = ("group", "groups", "load")


def _count(text: str) -> Any:
    return typer.Option(metavar="N", help=text)


def _share(text: str) -> Any:
    return typer.Option(metavar="X", help=text)


Source = Annotated[
    Path,
    typer.Argument(
        metavar="DENSE", help="A dense model: run, checkpoint, imported or Hugging Face folder.", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.", show_default=False)]
Reverse = Annotated[
    bool, typer.Option("--reverse", help="The other way: merge a mixture's experts into a dense model.")
]
Group = Annotated[
    Grouping, typer.Option(help="--reverse: which experts are averaged: by number, as upcycle lays copies, or alike.")
]
Groups = Annotated[int | None, _count("--reverse: averaged experts of a layer; default: as many as a token takes.")]
Load = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="--reverse: weigh experts by use: results.json of analyze load, or a run."),
]


def upcycle(
    context: typer.Context,
    source: Source,
    out: Out,
    copies: Annotated[int, _count("Copies of each routed shard.")] = 8,
    shards: Annotated[int, _count("Pieces that each layer's neurons are cut into.")] = 4,
    shared: Annotated[int, _count("Shards that become shared experts.")] = 1,
    active: Annotated[int, _count("Copies of each routed shard that a token goes through.")] = 1,
    router: Annotated[
        Router, typer.Option(help="sigmoid: DeepSeek-V3's; softmax: gates that sum to 1; plain: DeepSeekMoE's.")
    ] = "sigmoid",
    route_scale: Annotated[float, _share("Factor of the gates.")] = 1.0,
    dense_layers: Annotated[int, _count("So many layers at the bottom stay dense.")] = 0,
    noise: Annotated[float, _share("Added to each copy, as a share of its weights' spread.")] = 0.0,
    redrawn: Annotated[float, _share("Share of each copy's neurons that are drawn anew.")] = 0.0,
    seed: Annotated[int, _count("Of router rows, noise and drawn neurons.")] = 0,
    reverse: Reverse = False,
    group: Group = "position",
    groups: Groups = None,
    load: Load = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a mixture of a dense model that computes the same.

    Each feed-forward layer is cut into shards. Some become shared experts; each of the others is copied,
    and a router chooses among the copies. Nothing is lost and, until it is trained further, nothing is
    won: what comes out is a starting point with room to learn. Costs as much a token as the dense model
    while one copy of each shard is active. With --reverse DENSE is a mixture, whose routed experts are
    averaged in groups and become a dense model: a baseline for what routing is worth.

    \b
    Examples:
      finemoe upcycle imported/smollm2 upcycled/smollm2
      finemoe upcycle runs/dense upcycled/fine --copies 4 --shards 8 --shared 2
      finemoe upcycle runs/dense upcycled/drop --redrawn 0.5
      finemoe upcycle runs/moe merged/moe --reverse --load runs/moe

    Then: a recipe with start_from = "OUT".
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(source)  # a path that holds nothing is refused before a second of imports
    own = _given_of(context, reverse)
    if reverse:
        _merge(source, out, own, quiet=quiet, as_json=as_json)
        return

    from finemoe.methods.upcycling import upcycle as make

    made = make(source, out, quiet=quiet, **own)
    if as_json:
        print_json(made.to_dict())
    else:
        _show(made, source, out)


def _given_of(context: typer.Context, reverse: bool) -> dict[str, Any]:
    """The options of the way that is asked for, by name.

    Raises:
        ConfigError: one of the other way was given, where it would do nothing.
    """
    from finemoe.core.errors import ConfigError

    foreign = [
        name
        for name in context.params
        if name in (_FORWARD if reverse else _BACKWARD)
        if (where := context.get_parameter_source(name)) is not None and where.name != "DEFAULT"
    ]
    if foreign:
        option = "--" + foreign[0].replace("_", "-")
        raise ConfigError(
            f"{option} is for making a mixture, and does nothing with --reverse: leave it out"
            if reverse
            else f"{option} is for --reverse, and does nothing without: add --reverse, or leave it out"
        )
    return {name: context.params[name] for name in (_BACKWARD if reverse else _FORWARD)}


def _merge(source: Path, out: Path, own: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    from finemoe.cli.conversion import print_lines
    from finemoe.methods.merging import densify

    made = densify(source, out, quiet=quiet, **own)
    if as_json:
        print_json(made.to_dict())
        return
    layers = [block.feed_forward.ffn_hidden_size for block in made.config.blocks]
    widths = " or ".join(map(str, sorted(set(layers))))
    sums = f"{min(made.gates.values()):.3g} to {max(made.gates.values()):.3g}"
    print_lines([
        ("Merged", f"{source} into {out}"),
        ("Parameters", f"{made.to_dict()['total_parameters']:,}, all of them for each token"),
        ("Layers", f"{len(layers)}, {widths} neurons wide; the gates of a token came to {sums} together"),
        ("Logits", f"differ by {made.difference:.1e} at most, where the largest is {made.largest:.3g}; "
                   f"KL {made.divergence:.1e} nats"),
    ])  # fmt: skip
    typer.echo(f'\nNext: finemoe evaluate {shlex.quote(str(out))}\n      a recipe with start_from = "{out}"')


def _show(made: Upcycled, dense: Path, out: Path) -> None:
    from finemoe.cli.conversion import print_lines

    facts, layer = made.to_dict(), made.config.blocks[-1].feed_forward
    counts = f"{layer.experts_per_token} of {layer.num_routed_experts} routed and {layer.num_shared_experts} shared"
    where = f"in each of {len(made.config.moe_layers)} layers, {layer.expert_hidden_size} neurons wide"
    difference = f"differ by {facts['largest_logit_difference']:.1e} at most, where the largest is {made.largest:.3g}"
    print_lines([
        ("Upcycled", f"{dense} into {out}"),
        ("Parameters", f"{facts['total_parameters']:,}, of which {facts['active_parameters']:,} for each token"),
        ("Experts", f"{counts} {where}"),
        ("Logits", f"{difference}; KL {made.divergence:.1e} nats"),
    ])  # fmt: skip
    typer.echo(f'\nNext: a recipe with start_from = "{out}"\n      finemoe chat {shlex.quote(str(out))}')
