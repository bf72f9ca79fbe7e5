"""`finemoe upcycle`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finemoe.cli.output import Json, Quiet, print_json

if TYPE_CHECKING:
    from finemoe.methods.upcycling import Upcycled

Router = Literal["sigmoid", "softmax", "plain"]


Dense = Annotated[
    Path,
    typer.Argument(
        metavar="DENSE", help="A dense model: run, checkpoint, imported or Hugging Face folder.", show_default=False
    ),
]


def upcycle(
    dense: Dense,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.", show_default=False)],
    copies: Annotated[int, typer.Option(metavar="N", help="Copies of each routed shard.")] = 8,
    shards: Annotated[int, typer.Option(metavar="N", help="Pieces that each layer's neurons are cut into.")] = 4,
    shared: Annotated[int, typer.Option(metavar="N", help="Shards that become shared experts.")] = 1,
    active: Annotated[
        int, typer.Option(metavar="N", help="Copies of each routed shard that a token goes through.")
    ] = 1,
    router: Annotated[
        Router, typer.Option(help="sigmoid: DeepSeek-V3's; softmax: gates that sum to 1; plain: DeepSeekMoE's.")
    ] = "sigmoid",
    route_scale: Annotated[float, typer.Option(metavar="X", help="Factor of the gates.")] = 1.0,
    dense_layers: Annotated[int, typer.Option(metavar="N", help="So many layers at the bottom stay dense.")] = 0,
    noise: Annotated[
        float, typer.Option(metavar="X", help="Added to each copy, as a share of its weights' spread.")
    ] = 0.0,
    redrawn: Annotated[
        float, typer.Option(metavar="X", help="Share of each copy's neurons that are drawn anew.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of router rows, noise and drawn neurons.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a mixture of a dense model that computes the same.

    Each feed-forward layer is cut into shards. Some become shared experts; each of the others is copied,
    and a router chooses among the copies. Nothing is lost and, until it is trained further, nothing is
    won: what comes out is a starting point with room to learn. Costs as much a token as the dense model
    while one copy of each shard is active.

    \b
    Examples:
      finemoe upcycle imported/smollm2 upcycled/smollm2
      finemoe upcycle runs/dense upcycled/fine --copies 4 --shards 8 --shared 2
      finemoe upcycle runs/dense upcycled/drop --redrawn 0.5

    Then: a recipe with start_from = "OUT".
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(dense)  # a path that holds nothing is refused before a second of imports

    from finemoe.methods.upcycling import upcycle as make

    made = make(
        dense, out, quiet=quiet, copies=copies, shards=shards, shared=shared, active=active, router=router,
        route_scale=route_scale, dense_layers=dense_layers, noise=noise, redrawn=redrawn, seed=seed,
    )  # fmt: skip
    if as_json:
        print_json(made.to_dict())
    else:
        _show(made, dense, out)


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
