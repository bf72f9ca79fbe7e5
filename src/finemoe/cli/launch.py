"""`finemoe launch`."""

from __future__ import annotations

from typing import Annotated

import typer

launch = typer.Typer(
    name="launch",
    no_args_is_help=True,
    help="Print the file that starts a run on a cluster.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)

_Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="As the nodes see it.", show_default=False)]
_Nodes = Annotated[int, typer.Option("--nodes", metavar="N", help="Of the cluster.")]
_Gpus = Annotated[int, typer.Option("--gpus-per-node", metavar="M", help="Devices of each, a process each.")]
_Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Of the run, on storage that all nodes share.")]
_Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Plan it for h100 ... and write the figures down.")
]
_Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the run; repeatable.")]
_Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Of the job; default: the recipe's.")]
_Restarts = Annotated[int, typer.Option("--max-restarts", metavar="N", help="Of all processes, before it fails.")]
_Shutdown = Annotated[
    int | None,
    typer.Option(
        "--shutdown-timeout",
        metavar="SECONDS",
        help="To save in, once told to stop; default: 300, or more where --device's plan says so.",
    ),
]


@launch.command()
def slurm(
    recipe: _Recipe,
    nodes: _Nodes,
    gpus_per_node: _Gpus,
    out: _Out,
    device: _Device = None,
    overrides: _Set = None,
    name: _Name = None,
    max_restarts: _Restarts = 3,
    shutdown_timeout: _Shutdown = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="P", help="Of the cluster.")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="T", help="Longest, as 24:00:00.")] = None,
) -> None:
    """Print an sbatch script.

    One torchrun a node, which meets the others at the first node; when a process dies all start
    again from the newest checkpoint, and when a node dies the job is queued again.

    \b
    Examples:
      finemoe launch slurm big.toml --nodes 4 --gpus-per-node 8 \\
        --out /data/runs/big > big.sbatch
      finemoe launch slurm big.toml --nodes 4 --gpus-per-node 8 \\
        --out /data/runs/big --device h100 --set parallel.expert=8 | sbatch
    """
    from finemoe.runs.planning.launching import launch as written

    text = written(
        "slurm", recipe, nodes=nodes, gpus_per_node=gpus_per_node, out=out, device=device, overrides=overrides or (),
        name=name, restarts=max_restarts, shutdown=shutdown_timeout, partition=partition, time=time,
    )  # fmt: skip
    typer.echo(text, nl=False)


@launch.command()
def kubernetes(
    recipe: _Recipe,
    nodes: _Nodes,
    gpus_per_node: _Gpus,
    out: _Out,
    device: _Device = None,
    overrides: _Set = None,
    name: _Name = None,
    max_restarts: _Restarts = 3,
    shutdown_timeout: _Shutdown = None,
    image: Annotated[str, typer.Option("--image", metavar="I", help="With finemoe in it.")] = "finemoe:latest",
    claim: Annotated[str, typer.Option("--claim", metavar="C", help="Volume claim, mounted at /data.")] = "finemoe",
) -> None:
    """Print a Kubeflow TrainJob.

    For Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1) with its torch-distributed runtime. The
    same torchrun line as for Slurm; recipe and --out lie on the claim, below /data.

    \b
    Examples:
      finemoe launch kubernetes /data/big.toml --nodes 4 --gpus-per-node 8 \\
        --out /data/runs/big > big.yaml
      finemoe launch kubernetes /data/big.toml --nodes 2 --gpus-per-node 8 \\
        --out /data/runs/big --image registry.local/finemoe:1 | kubectl apply -f -
    """
    from finemoe.runs.planning.launching import launch as written

    text = written(
        "kubernetes", recipe, nodes=nodes, gpus_per_node=gpus_per_node, out=out, device=device,
        overrides=overrides or (), name=name, restarts=max_restarts, shutdown=shutdown_timeout, image=image,
        claim=claim,
    )  # fmt: skip
    typer.echo(text, nl=False)


@launch.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def ray() -> None:
    """Not built: it says why.

    \b
    Examples:
      finemoe launch ray
    """
    from finemoe.runs.planning.launching import refuse_by_name

    refuse_by_name("ray")
