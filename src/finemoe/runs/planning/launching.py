"""From a recipe to the file that starts it on a cluster: `finemoe launch`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from finemoe.charts.plan.words import summary
from finemoe.core.config import read_tables
from finemoe.core.errors import CheckpointError, ConfigError, DataError, FinemoeError
from finemoe.core.logs import logger
from finemoe.parallel.planner.launching import Launch, kubernetes, shutdown_seconds, slurm
from finemoe.parallel.planner.plan import GIB
from finemoe.runs.config import read_recipe, resolve_run
from finemoe.runs.planning.distribution import ANOTHER, plan
from finemoe.runs.planning.stages import NOWHERE, require_processes, stages_of
from finemoe.runs.start import layout_of, refuse_layout

_NOT_BUILT = {
    "ray": "a run is one torchrun line a node, which a scheduler starts and torchrun starts again, and Ray would be a "
    "second one beside both: use slurm or kubernetes, or start that line by whatever starts your processes",
}
_WEIGHT = 4  # bytes a parameter in a checkpoint, beside the optimizer's


def launch(
    kind: Literal["slurm", "kubernetes"],
    recipe: str | os.PathLike[str],
    *,
    nodes: int,
    gpus_per_node: int,
    out: str,
    device: str | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
    restarts: int = 3,
    shutdown: int | None = None,
    **options: Any,
) -> str:
    """The text of an sbatch script, or of a Kubeflow TrainJob; nothing is started.

    Args:
        kind: slurm or kubernetes.
        recipe: of the run, read here where it lies here; the nodes read it at the same path.
        nodes, gpus_per_node: of the cluster; a process a device.
        out: directory of the run, on storage that all nodes share.
        device: adds the plan's figures as comments, for this accelerator.
        overrides: `--set` of the run.
        name: of the job; None: the recipe's.
        restarts: of all processes, before the job fails.
        shutdown: [seconds] that processes have to finish a step and a checkpoint before they are killed; None: five
            minutes, and with `device` more where the plan's step and a checkpoint of the model take longer.
        options: of `parallel.planner.launching.slurm` or `kubernetes`: partition, time; image, claim.

    Raises:
        ConfigError: no such kind, or one that is not built; values that no such file can hold; or a recipe that finemoe
            would not train by so many processes.
        FinemoeError: with `device`, what `plan` raises; a layout that does not fit is refused.
    """
    refuse_by_name(kind)
    writers = {"slurm": slurm, "kubernetes": kubernetes}
    if kind not in writers:
        raise ConfigError(f"launch {kind!r}: known are {', '.join(writers)}")
    path = os.fspath(recipe)
    asked = Launch(
        recipe=path, nodes=nodes, gpus_per_node=gpus_per_node, out=out, overrides=tuple(overrides),
        name=name or _name(path), restarts=restarts, **({} if shutdown is None else {"shutdown": shutdown}),
    )  # fmt: skip
    notes = [f"finemoe launch {kind}: {_counted(asked.processes, 'process', 'es')} on {_counted(nodes, 'node', 's')}"]
    notes += _checked(path, asked.processes, overrides, out)
    if device is not None:
        plans = _planned(path, asked.processes, device, overrides)
        notes += [line for made in plans for line in summary(made)]
        if shutdown is None:
            asked = replace(asked, shutdown=max(map(_shutdown, plans)))
    return writers[kind](asked, notes, **options)


def refuse_by_name(kind: str) -> None:
    """Say why there is no such file, where somebody may look for one.

    Raises:
        ConfigError: it is not built, and the reason.
    """
    if kind in _NOT_BUILT:
        raise ConfigError(f"launch {kind} is not built, and is not meant to be: {_NOT_BUILT[kind]}")


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one}{many if number != 1 else ''}"


def _name(recipe: str) -> str:
    kept = "".join(char if char.isascii() and char.isalnum() else "-" for char in Path(recipe).stem.lower()).strip("-")
    return f"finemoe-{kept}"[:63].rstrip("-")


def _checked(recipe: str, processes: int, overrides: Sequence[str], out: str) -> list[str]:
    """Refuse what the trainer would, where the recipe lies here; what could not be looked at.

    Raises:
        ConfigError: the recipe cannot work, or not by so many processes.
    """
    if not Path(recipe).exists():
        logger.warning("%s is not here, so that it was not checked; the job reads it at that path on its nodes", recipe)
        return [f"Not checked: {recipe} does not lie where this was written."]
    raw = read_tables(recipe)
    try:
        if "stage" in raw:
            require_processes(stages_of(raw, recipe, Path(out), overrides), recipe, processes, "launch")
            return []
        config = resolve_run(*read_recipe(recipe, overrides))
    except (CheckpointError, DataError) as error:  # what it begins with may lie where only the nodes see it
        return [f"Not checked: {error}"]
    refuse_layout(config, layout_of(config, processes, "launch"))
    return []


def _planned(recipe: str, processes: int, device: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The plan of the run, or of every stage."""
    if not Path(recipe).exists():
        raise FinemoeError(f"{recipe}: no such recipe here, and --device plans it; leave --device out, or copy it here")
    raw = read_tables(recipe)
    stages = stages_of(raw, recipe, NOWHERE, overrides) if "stage" in raw else ()
    names: list[str | None] = [one.name for one in stages if one.sampling is None]
    plans = [plan(recipe, processes, device, stage=name, overrides=overrides, refuse=False) for name in names or [None]]
    for name, made in zip(names or [None], plans, strict=True):
        if not made["memory"]["fits"]:
            again = ["finemoe", "plan", recipe, *(() if name is None else ("--stage", name))]
            again += ["--gpus", str(processes), "--device", device]
            again += [word for one in overrides for word in ("--set", one)]
            needed, there = made["memory"]["peak"]["total"] / GIB, made["memory"]["available"] / GIB
            raise ConfigError(
                f"{made['model']} does not fit: {needed:,.1f} GiB of {there:,.1f}. What would: {shlex.join(again)}"
            )
    for made in plans:  # all of them are there
        made["notes"] = [note.removesuffix(ANOTHER) for note in made["notes"]]
    return plans


def _shutdown(made: dict[str, Any]) -> int:
    """[seconds] To save in, by a plan."""
    nbytes = (_WEIGHT + made["setup"]["state_bytes"]) * made["parameters"]
    return shutdown_seconds(made["step"]["seconds"]["high"], nbytes)
