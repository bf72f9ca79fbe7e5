"""Stages: recipes of one recipe, each beginning with a model that an earlier one left (R1, 2501.12948 section 2.3).

`[[stage]]` tables are recipes of their own, laid on what stands outside of them, but for `[model]` where a stage begins
with another's. What each stage would be is said here, before any is trained; `studies.stages` runs them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.checkpoint.kinds import ANSWERS, CONFIG, kind_of
from finemoe.core.config import merge, parse, read_tables, with_overrides
from finemoe.core.errors import ConfigError, DataError, FinemoeError
from finemoe.data.corpora import FilesCorpus
from finemoe.methods.distillation.sample_table import SampleConfig
from finemoe.methods.rewards import require_made
from finemoe.parallel.config import Start
from finemoe.runs.config import RunConfig, read_recipe, resolve_run
from finemoe.runs.start import layout_of, refuse_layout

NOWHERE = Path("OUT")
"""Stands for the folder of the stages where none is given."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_PLACE = re.compile(r"^\{([a-z0-9-]+)\}(?=/)")
"""What a path begins with that lies in a stage's folder."""


@dataclass(frozen=True)
class Stage:
    """One of them, with names of earlier ones replaced by their folders."""

    name: str
    folder: Path
    raw: Mapping[str, Any]
    """Its recipe."""
    sampling: SampleConfig | None
    """Where it writes answers instead of training."""
    overrides: tuple[str, ...] = ()
    """Of --set, those that are laid on it, as of a recipe of its own."""

    @property
    def begun(self) -> bool:
        """Whether its folder holds a run, or answers."""
        return (self.folder / (CONFIG if self.sampling is None else ANSWERS)).is_file()


def stages_of(raw: Mapping[str, Any], source: str, out: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a recipe's tables, in order, with `overrides` on top: as of `run_stages`.

    Raises:
        ConfigError: one has no name, or that of another; or begins with a stage that is not before it.
    """
    given = raw["stage"]
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, Mapping) for one in given):
        raise ConfigError(f"{source}: `stage` must be written as [[stage]] tables")
    common = {name: value for name, value in raw.items() if name not in ("stage", "study")}
    everywhere, own = _by_stage(overrides, [one.get("name") for one in given])
    found: list[Stage] = []
    for number, one in enumerate(given, 1):
        name = one.get("name")
        known = {stage.name: stage.folder for stage in found}
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in known:
            raise ConfigError(
                f"{source}: stage {number} is called {name!r}: give each a `name` of its own, of small letters, digits "
                "and hyphens"
            )
        where, folder = f"{source}, stage {name}", out / f"{number}-{name}"
        tables = _placed({key: value for key, value in one.items() if key != "name"}, known, where)
        if "sample" in tables:
            found.append(_sampling(name, folder, tables, common, [*everywhere, *own.get(name, ())], where))
            continue
        shared = {key: value for key, value in common.items() if key != "model" or "start_from" not in tables}
        laid, _ = read_recipe(merge({**shared, "name": name}, tables), everywhere)
        laid, _ = read_recipe(laid, own.get(name, ()))  # apart, since each may say how long the run is
        found.append(Stage(name, folder, laid, None, (*everywhere, *own.get(name, ()))))
    return found


def checked_stages(raw: Mapping[str, Any], source: str, out: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """As `stages_of`, with the tables of every stage read, so that the last one's mistakes are told before the first
    one trains; of those that have not begun rewards are made, and files looked for.

    Raises:
        ConfigError: as of `stages_of`; or a stage cannot be what its tables say.
        CheckpointError: one begins with what is neither a stage nor a model.
        DataError: one reads from where nothing is.
    """
    stages = stages_of(raw, source, out, overrides)
    try:
        configs = configurations(stages, source)
    except ConfigError as error:
        raise ConfigError(f"{error}{_meant_for_one(raw, source, out, overrides)}") from error
    for stage in (one for one in stages if not one.begun):
        try:
            _require_all(stage, configs.get(stage.name), [f"{one.folder}/" for one in stages])
        except (ConfigError, DataError) as error:
            raise type(error)(f"{source}, stage {stage.name}: {error}") from error
    return stages


def _require_all(stage: Stage, config: RunConfig | None, later: Sequence[str]) -> None:
    """Check what `stage` takes of this machine, without what lies `later` in folders of stages.

    Raises:
        ConfigError: a reward cannot be made.
        DataError: a path leads to nothing.
    """
    if config is not None:
        corpus, rewards = config.data.corpus, getattr(config.method, "rewards", ())
    else:
        assert stage.sampling is not None  # there is one of both
        corpus, rewards = stage.sampling.read_from, stage.sampling.rewards or ()
    if isinstance(corpus, FilesCorpus):
        corpus.require_there(later)
    require_made(rewards)


def configurations(stages: Sequence[Stage], source: str) -> dict[str, RunConfig]:
    """Of every stage that trains, by name: also where what it begins with is yet to be trained.

    Raises:
        ConfigError, CheckpointError: as of `checked_stages`.
    """
    found: dict[str, RunConfig] = {}
    for place, stage in enumerate(stages):
        where, start = f"{source}, stage {stage.name}", stage.raw.get("start_from")
        before = next((one for one in stages if f"{start}/".startswith(f"{one.folder}/")), None)
        if before is not None and before in stages[place:] and not before.begun:
            raise ConfigError(f"{where}: begins with stage {before.name}, which does not come before it")
        if before is not None and before.sampling is not None:
            raise ConfigError(f"{where}: begins with stage {before.name}, which writes answers and leaves no model")
        if stage.sampling is None:
            model = found[before.name].model if before is not None and not before.begun else None
            found[stage.name] = resolve_run(dict(stage.raw), where, begins_with=model)
        elif not isinstance(start, str):
            raise ConfigError(f'{where}: name whose answers as start_from = "STAGE"')
        elif before is None:
            kind_of(Path(start))
    return found


def require_processes(stages: Sequence[Stage], source: str, processes: int, start: Start = "torchrun") -> None:
    """Refuse, before the first stage starts, what so many processes cannot do in any of them.

    Args:
        stages: of a recipe.
        source: named in errors.
        processes: that would run each of them.
        start: who says how many there are.

    Raises:
        ConfigError: naming the stage, and whether those before it can be.
    """
    trained = configurations(stages, source)
    for place, stage in enumerate(stages):
        try:
            if stage.sampling is None:
                config = trained[stage.name]
                refuse_layout(config, layout_of(config, processes, start))
            elif processes > 1:
                raise ConfigError(
                    "it samples answers, which one process does: start the recipe by one, without torchrun"
                )
        except ConfigError as error:
            before = ", ".join(one.name for one in stages[:place])
            apart = f" (what stands before it, {before}, could be a recipe of its own)" if before else ""
            raise ConfigError(f"{source}, stage {stage.name}: {error}{apart}") from error


def _meant_for_one(raw: Mapping[str, Any], source: str, out: Path, overrides: Sequence[str]) -> str:
    """The end of what is said of overrides that every stage got and one alone can take; nothing where none is so."""
    names = [one["name"] for one in raw["stage"] if "sample" not in one]
    everywhere = [one for one in overrides if not one.startswith("stage.")]
    tables = [tuple(one for one in everywhere if one.split(".")[0] == other.split(".")[0]) for other in everywhere]
    for moved in dict.fromkeys([*((one,) for one in everywhere), *tables]):
        for name in names:
            laid = [f"stage.{name}.{one}" if one in moved else one for one in overrides]
            with suppress(FinemoeError):
                configurations(stages_of(raw, source, out, laid), source)
                were = " ".join(f"--set {one}" for one in moved)
                meant = " ".join(f"--set stage.{name}.{one}" for one in moved)
                return f"; {were} is laid on every stage: did you mean {meant}?"
    return ""


def waits_for(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """The earlier one that `stage` begins with, or reads from, and that has left nothing yet."""
    said = json.dumps(stage.raw, default=str)
    return next((one for one in stages if f'"{one.folder}' in said and not one.begun), None)


def stage_config(
    recipe: str | os.PathLike[str],
    *,
    stage: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[RunConfig, str]:
    """The configuration of one stage, to be looked at before it is trained, and a sentence that names them all.

    Args:
        recipe: path of a TOML recipe.
        stage: its name. None: the first that trains.
        out: folder of the stages' folders. None: none of them is trained yet.
        overrides: as of `run_stages`.

    Raises:
        ConfigError: no stage is called so; it samples answers; or it begins with one that has left no model yet.
    """
    stages = stages_of(read_tables(recipe), str(recipe), Path("OUT" if out is None else out), overrides)
    chosen, said = chosen_stage(stages, stage, str(recipe))
    if (before := waits_for(chosen, stages)) is not None:
        where = "say --in DIR, the --out of `finemoe train`" if out is None else f"{before.folder} is not there"
        raise ConfigError(f"{recipe}: stage {chosen.name} begins with what stage {before.name} leaves: {where}")
    return resolve_run(dict(chosen.raw), f"{recipe}, stage {chosen.name}"), said


def chosen_stage(stages: Sequence[Stage], name: str | None, source: str) -> tuple[Stage, str]:
    """The one that is called `name`, or the first that trains, and a sentence that names them all.

    Raises:
        ConfigError: no stage is called so, or it samples answers.
    """
    names = ", ".join(one.name for one in stages)
    found = [one for one in stages if (one.name == name if name is not None else one.sampling is None)]
    if not found:
        raise ConfigError(f"{source}: no stage that trains is called {name!r}; its stages are: {names}")
    chosen = found[0]
    if chosen.sampling is not None:
        raise ConfigError(f"{source}: stage {chosen.name} writes answers and trains nothing; its stages are: {names}")
    return chosen, f"stage {stages.index(chosen) + 1} of {len(stages)}, {chosen.name}; the stages are: {names}"


def _sampling(
    name: str,
    folder: Path,
    tables: Mapping[str, Any],
    common: Mapping[str, Any],
    overrides: Sequence[str],
    where: str,
) -> Stage:
    """A stage that writes answers: of the recipe it takes the seed alone."""
    if wrong := sorted(set(tables) - {"sample", "start_from", "seed"}):
        raise ConfigError(f"{where}: `{wrong[0]}` does nothing where answers are sampled: leave it out")
    of_it = [one for one in overrides if one.split(".")[0].split("=")[0].strip() in ("sample", "seed", "start_from")]
    laid = with_overrides({"seed": common.get("seed", 0), **tables}, of_it)
    return Stage(name, folder, laid, parse(SampleConfig, laid["sample"], f"{where}: sample"))


def _placed(value: Any, known: Mapping[str, Path], where: str) -> Any:
    """`value` with {stage}/ at the beginning of a path as the stage's folder, and a start_from that is its name."""
    if isinstance(value, Mapping):
        return {key: _value(key, one, known, where) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_placed(one, known, where) for one in value]
    if not isinstance(value, str):
        return value

    def folder(found: re.Match[str]) -> str:
        if found[1] not in known:
            before = ", ".join(known) or "none"
            raise ConfigError(f"{where}: {found[0]} is no stage before it (those are: {before})")
        return str(known[found[1]])

    return _PLACE.sub(folder, value)


def _value(key: str, value: Any, known: Mapping[str, Path], where: str) -> Any:
    """What is a template stays as it is; what a stage begins with may be the name of another."""
    if key == "template":
        return value
    if key == "start_from" and isinstance(value, str) and value in known:
        return str(known[value])
    return _placed(value, known, where)


def _by_stage(overrides: Sequence[str], names: Sequence[Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of all stages, and of single ones by name."""
    everywhere: list[str] = []
    own: dict[str, list[str]] = {}
    for one in overrides:
        head = one.partition("=")[0].partition(".")[0].strip()
        if head == "stages" or (head in names and head not in RunConfig.model_fields):
            rest = one.removeprefix("stages.") if head == "stages" else one
            raise ConfigError(f"--set {one}: unknown key `{head}`; did you mean `stage`, as in --set stage.{rest}?")
        if not one.startswith("stage."):
            everywhere.append(one)
            continue
        name, _, rest = one.removeprefix("stage.").partition(".")
        if name not in names or not rest:
            known = ", ".join(str(name) for name in names)
            raise ConfigError(f"--set {one}: no stage is called {name!r}; those are: {known}")
        own.setdefault(name, []).append(rest)
    return everywhere, own
