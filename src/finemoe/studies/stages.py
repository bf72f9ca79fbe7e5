"""Stages that are run: one after the other, each in a folder of its own (R1, 2501.12948 section 2.3).

A stage is a run, or, with a table `sample`, a file of answers that a model wrote and that passed a check. The same
command given again goes on where it stopped. What the stages of a recipe are, `runs.planning.stages` says.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finemoe.checkpoint.kinds import ANSWERS
from finemoe.checkpoint.portability import WHEN_EXPORTED
from finemoe.core.config import read_tables
from finemoe.core.errors import RunError
from finemoe.core.logs import each_once, logger
from finemoe.parallel.seat import seat, speaks
from finemoe.runs.changes import is_past
from finemoe.runs.config import RunConfig, resolve_run
from finemoe.runs.directory import first_difference, holds_run
from finemoe.runs.planning.stages import Stage, checked_stages, require_processes
from finemoe.runs.run import train
from finemoe.training.directory import read_summary


class StageInterruptedError(RunError):
    """A stage was asked to end, and is saved."""


def run_stages(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run every stage that is not done, in order; given again, it goes on.

    Args:
        recipe: path of a TOML recipe, or its tables.
        out: folder of the stages' folders.
        overrides: `a.b=c`, laid on every stage; `stage.NAME.a.b=c` on one.
        quiet: show no progress.

    Returns:
        Of every stage its name, folder, and summary.

    Raises:
        ConfigError: the tables of a stage cannot be, or not by so many processes; nothing was trained.
        DataError: a stage cannot work; stages before it are done all the same.
        RunError: a folder that holds another run; or a stage was interrupted.
        TrainingError: a loss was not finite.
    """
    source = "recipe" if isinstance(recipe, Mapping) else str(recipe)
    raw = dict(recipe) if isinstance(recipe, Mapping) else read_tables(recipe)
    stages = checked_stages(raw, source, Path(out), overrides)
    here = seat()
    require_processes(stages, source, 1 if here is None else here.processes)
    done = []
    with each_once(WHEN_EXPORTED):  # of all stages the same, where each goes on with the model of the one before
        for number, stage in enumerate(stages, 1):
            if not quiet and speaks():
                logger.info("stage %d of %d: %s", number, len(stages), stage.name)
            done.append(run_stage(stage, source, quiet))
    return done


def run_stage(stage: Stage, source: str, quiet: bool) -> dict[str, Any]:
    """Run one stage, or go on with it: its name, folder, and summary, or what was sampled.

    Raises:
        StageInterruptedError: it was asked to end, and is saved.
        FinemoeError: as of `run_stages`.
    """
    where = {"stage": stage.name, "folder": str(stage.folder)}
    if stage.sampling is not None:
        sampled = stage.sampling.draw(stage.raw["start_from"], stage.folder / ANSWERS, stage.raw["seed"], quiet)
        return {**where, "sampled": sampled.to_dict()}
    config = resolve_run(dict(stage.raw), f"{source}, stage {stage.name}")
    _refuse_another(stage, config)
    done = train(config, out=stage.folder, quiet=quiet, go_on=True)
    if done.interrupted:
        raise StageInterruptedError(
            f"stage {stage.name} was interrupted and is saved; the same command goes on with it"
        )
    return {**where, "summary": read_summary(stage.folder) or done.summary}


def _refuse_another(stage: Stage, config: RunConfig) -> None:
    """Refuse a folder with a run of this stage that is configured otherwise, and say what to do instead.

    Raises:
        RunError: it is one.
    """
    if not stage.begun or holds_run(stage.folder, config):
        return
    begins = stage.raw.get("start_from")
    anew = "say another --out, which begins with the first stage again"
    if begins is not None:
        anew += f', or write this stage as a recipe of its own with start_from = "{begins}"'
    keys = [one.partition("=")[0].strip() for one in stage.overrides]
    if keys and not any(is_past(key) for key in keys):
        words = ["finemoe", "resume", str(stage.folder), *(word for one in stage.overrides for word in ("--set", one))]
        hint = f"to train that run so, `{shlex.join(words)}`; to begin another, {anew}"
    else:
        hint = f"leave it as it is by the recipe that it began with; to begin another, {anew}"
    differs = first_difference(stage.folder, config)
    raise RunError(f"stage {stage.name}: {stage.folder} holds a run of another configuration ({differs}): {hint}")
