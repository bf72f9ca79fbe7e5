"""One training run from recipe to summary: compose corpus, tokenizer, model, method, trainer and observers.

Run directory: config.json (resolved), environment.json, tokenizer.json, data.json (what was read and skipped),
metrics.jsonl, checkpoints/, and at the end summary.json; failure.json when a loss was not finite.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from finemoe.checkpoint.run_state.state import RunState, checkpoint_folders
from finemoe.core import memory
from finemoe.core.errors import ConfigError, OutageError, RunError, TrainingError
from finemoe.core.files import sole_writer, write_text
from finemoe.core.logs import each_once, logger
from finemoe.core.seeds import derive
from finemoe.model import native
from finemoe.model.config import Kernels
from finemoe.model.size import measure
from finemoe.parallel.meeting import meet
from finemoe.parallel.seat import resuming, seat
from finemoe.parallel.world import SOLO, World
from finemoe.runs.beginning import first_model, newest_state, refuse_other_data, require_agreement
from finemoe.runs.calibration import Chosen
from finemoe.runs.changes import say_length, with_changes, write_changes
from finemoe.runs.config import RunConfig, read_config, read_recipe, resolve_run
from finemoe.runs.directory import cut_lines, cut_metrics, describe, require_free, went_on_otherwise
from finemoe.runs.kernels import kernels_for
from finemoe.runs.observers import Evaluate, Log, Show, Warn, Write
from finemoe.runs.result import Run
from finemoe.runs.saving import Save, restore
from finemoe.runs.start import (
    announce,
    build_method,
    capacity_shares,
    check_memory,
    check_start,
    default_directory,
    in_steps,
    layout_of,
    refuse_layout,
    resolve_device,
)
from finemoe.runs.trackers import open_tracker, require_tracker
from finemoe.training.alerts import Knobs, Watch, routed_layers
from finemoe.training.balancing import has_selection_bias
from finemoe.training.directory import read_metrics, require_run, summary_if_whole
from finemoe.training.method import Measured, Method
from finemoe.training.report import recent_loss
from finemoe.training.stopping import StopOnSignal, repeated
from finemoe.training.trainer import Observer, Plan, Trainer


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    go_on: bool = False,
) -> Run:
    """Train from the start.

    Under torchrun all processes call it alike, and train one run together as `[parallel]` says.

    Args:
        recipe: path of a TOML recipe, its tables as a mapping, or a resolved configuration.
        out: run directory; `runs/<name>-<date>` when None.
        overrides: `a.b=c`, for a path or a mapping.
        quiet: show no progress; metrics.jsonl is written all the same.
        go_on: where `out` holds this very run already, resume it; finished, leave it.

    Raises:
        ConfigError, DataError: the recipe or corpus cannot work; nothing was written.
        RunError: `out` already holds a run, or cannot be written.
        TrainingError: a loss was not finite; the last good state is in the directory.
    """
    config = recipe if isinstance(recipe, RunConfig) else resolve_run(*read_recipe(recipe, overrides))
    if go_on and out is None:
        raise ConfigError("a run can be gone on with only where it lies: say --out DIR too")
    with world_of(config) as world:
        directory = world.first(lambda: Path(out) if out is not None else default_directory(config.name))
        changed = world.first(lambda: went_on_otherwise(directory, config)) if go_on else None
        if changed is not None:
            world.first(lambda: _say_changed(directory, changed))
            return _go_on(directory, None, quiet, world)
        world.first(lambda: require_free(directory, config))
        world.first(lambda: check_start(config, directory))
        with ExitStack() as held:
            with each_once():
                method = world.in_turn(lambda: build_method(config, directory))
                held.callback(lambda: method.close())  # of the method that is there by then
                if (known := in_steps(config, method.data)).setting != config.setting:
                    method.close()  # a reward model need not be open twice
                    method = build_method(known, directory)
                config = known
            held.enter_context(_told_where(directory, world))
            world.first(lambda: held.enter_context(sole_writer(directory)))
            world.first(lambda: require_free(directory, config))
            chosen = world.first(lambda: kernels_for(config))
            config = config.model_copy(update={"kernels": chosen.kernels})  # config.json is to compute the same again
            world.first(lambda: describe(directory, config, method.data))
            return _run(config, method, directory, chosen, None, quiet, world)


def _say_changed(directory: Path, keys: Sequence[str]) -> None:
    if keys:
        logger.warning(
            "%s was changed by `finemoe resume --set` since it began as it is described here (%s): it is taken as it "
            "has become; another --out begins anew",
            directory,
            ", ".join(keys),
        )


def resume(directory: str | os.PathLike[str], *, overrides: Sequence[str] = (), quiet: bool = False) -> Run:
    """Go on from the newest undamaged checkpoint; on a CPU the result is bit for bit that of an unbroken run.

    Args:
        directory: of the run.
        overrides: `a.b=c`, of what is yet to come: `training.tokens=...` trains a run longer, finished or not. The
            schedule is then that of the new length from here on, and config.json says so; the old one is kept.
        quiet: show no progress.

    Raises:
        ConfigError: an override that is no setting.
        RunError: not a run directory, its corpus has changed, or an override of what has been trained already.
        CheckpointError: every checkpoint is damaged.
    """
    directory = Path(directory)
    require_run(directory)
    before = read_config(directory / "config.json")
    config = with_changes(directory, before, overrides) if overrides else None
    if config is None and (done := _finished(directory)) is not None:
        return done
    with world_of(config or before) as world:
        return _go_on(directory, config, quiet, world)


def _finished(directory: Path) -> Run | None:
    """A run that has nothing left to train."""
    summary = summary_if_whole(directory)
    if summary is None:
        return None
    given = read_config(directory / "config.json").training
    key = "steps" if given.tokens is None else "tokens"
    if given.max_tokens is not None and summary["tokens"] >= given.max_tokens:
        key = "max_tokens"
    logger.info("%s is finished: %d steps; --set training.%s=... trains it longer", directory, summary["steps"], key)
    return Run(directory, summary, interrupted=False)


@contextmanager
def _told_where(directory: Path, world: World) -> Iterator[None]:
    """Say how to go on when Ctrl-C ends what is no step, such as opening a model: the folder of the run is there."""
    try:
        yield
    except KeyboardInterrupt:
        if world.rank == 0 and (directory / "config.json").exists():
            logger.warning("the run has begun: `%s` goes on", resuming(directory))
        raise


@contextmanager
def world_of(config: RunConfig) -> Iterator[World]:
    """The processes that train `config`, this one among them, for as long as they do.

    Raises:
        ConfigError: `[parallel]` does not fit the number of processes, the model or the method.
        RunError: a process did not come, or others waited for it in vain.
    """
    here = seat()
    layout = layout_of(config, 1 if here is None else here.processes)
    refuse_layout(config, layout)
    device, _ = resolve_device(config.training)
    with meet(layout, device, config.training.threads, config.parallel.timeout) as world:
        yield world


def _go_on(directory: Path, changed: RunConfig | None, quiet: bool, world: World) -> Run:
    before = read_config(directory / "config.json")
    config = changed or before
    done = world.first(lambda: _finished(directory)) if changed is None else None
    if done is not None:
        return done

    def check() -> None:
        check_memory(config)
        for name in config.training.trackers:  # before anything is changed
            require_tracker(name)

    world.first(check)
    with ExitStack() as held:
        held.enter_context(_told_where(directory, world))
        world.first(lambda: held.enter_context(sole_writer(directory)))
        if world.any(read_config(directory / "config.json") != before):
            raise RunError(f"{directory}: another process has changed the run meanwhile; give the same command again")
        return _resume(directory, before, config, quiet, world)


def _resume(directory: Path, before: RunConfig, config: RunConfig, quiet: bool, world: World) -> Run:
    with closing(world.in_turn(lambda: build_method(config, directory))) as method:
        world.first(lambda: refuse_other_data(directory, method.data.report))
        saved = newest_state(directory, before, world)
        if config != before:
            done = saved.state["step"] if saved is not None else 0
            world.first(lambda: write_changes(directory, before, config, done))
            say_length(before, config, done)
        # whatever a kill left out while the directory was being made
        world.first(lambda: describe(directory, config, method.data))
        chosen = world.first(lambda: kernels_for(config, saved))
        return _run(config, method, directory, chosen, saved, quiet, world)


def _run(
    config: RunConfig,
    method: Method[Any],
    directory: Path,
    chosen: Chosen,
    saved: RunState | None,
    quiet: bool,
    world: World,
) -> Run:
    trainer = _trainer(config, method, directory, chosen.kernels, saved, world)
    require_agreement(trainer, config, directory)
    done = None if saved is None else trainer.state.step
    metrics = directory / "metrics.jsonl"
    world.first(lambda: cut_metrics(directory, trainer.state.step))
    world.first(lambda: cut_lines(directory, method.writes, trainer.state.step))
    # A closed terminal, and a limit, say so more than once: that is not to end what the first one made it save.
    several = repeated(world.size)
    with StopOnSignal(trainer.request_stop, several, repeated=several), ExitStack() as held:
        if world.rank:
            save = held.enter_context(Save(config, directory, None, world, done))
            evaluate = Evaluate(evaluate_every(config), lambda record: None)
            trainer.observers = (evaluate, save)
        else:
            if not quiet:
                announce(config, trainer, directory, chosen.reason)
            settings = config.model_dump(mode="json")
            log = held.enter_context(
                Log(metrics, [open_tracker(name, directory, settings) for name in config.training.trackers])
            )
            write = held.enter_context(Write(directory, method.writes))
            save = held.enter_context(Save(config, directory, log, world, done))
            evaluate = Evaluate(evaluate_every(config), log.emit)
            shown: list[Observer] = [] if quiet else [Show(evaluate, trainer.plan.total_steps)]
            trainer.observers = (evaluate, log, Warn(_watch(config, metrics), log.emit), *shown, write, save)
        # What the run begins with is measured too, since what it gains is told from there; later, what was missed.
        due = evaluate.is_due(trainer) and (trainer.state.step > 0 or config.start_from is not None)
        if due and not world.first(lambda: _measured(directory, trainer.state.step)):
            evaluate.measure(trainer)
        finished = _train(trainer, save, directory) and not evaluate.missed
    if not finished:
        return Run(directory, {}, interrupted=True)
    if evaluate.latest is None:  # resumed after the last step, which was measured before
        evaluate.latest = trainer.measure()
    last = evaluate.latest

    def conclude() -> dict[str, Any]:
        summary = _summary(config, trainer, last, metrics)
        method.finish()
        # Last: who finds it takes the run as done.
        write_text(directory / "summary.json", json.dumps(summary, indent=2))
        return summary

    return Run(directory, world.first(conclude), interrupted=False)


def _measured(directory: Path, step: int) -> bool:
    """Whether that step was measured already, by the run that was killed, or ended, before it came further."""
    return any(record["kind"] == "validation" and record["step"] == step for record in read_metrics(directory))


def first_trainer(config: RunConfig, method: Method[Any]) -> tuple[Trainer, str]:
    """The trainer at a run's beginning, and what its kernels were chosen for. No directory is needed.

    Raises:
        RunError: `start_from` does not hold the run's model.
    """
    chosen = kernels_for(config)
    return _trainer(config, method, Path(), chosen.kernels, None, SOLO), chosen.reason


def _trainer(
    config: RunConfig, method: Method[Any], directory: Path, kernels: Kernels, saved: RunState | None, world: World
) -> Trainer:
    """The trainer where the run stands."""
    device, bf16 = resolve_device(config.training)
    memory.keep_freed_pages()
    starts = saved is None or method.keeps_base
    model, fill = first_model(config, method, kernels, starts=starts, world=world, device=device)
    torch.manual_seed(derive(config.seed, "torch"))  # for whatever draws from the default generator during training
    plan = Plan(
        total_steps=config.training.total_steps,
        sequences_per_step=config.sequences_per_step,
        sequences_per_micro_batch=config.micro_batch_sequences,
        device=device,
        bf16=bf16,
        max_tokens=config.training.max_tokens,
    )
    trainer = Trainer(
        model, method, config.optimizer, config.schedule, plan, world=world, begins=saved is None, fill=fill
    )
    if saved is not None:
        restore(trainer, saved, directory)
    if device.type == "cpu":
        native.pass_pages_on()  # of what comes and goes; weights stay, and small ones take what their reading left
    return trainer


def _train(trainer: Trainer, save: Save, directory: Path) -> bool:
    """Whether the last step was done; if not, the state is saved.

    Raises:
        TrainingError: a loss was not finite; the state is saved and failure.json written.
        OutageError: something elsewhere did not answer; the state is saved.
    """
    try:
        trainer.run()
    except OutageError as error:
        if not trainer.stopping:
            if trainer.state.step:
                save.save(trainer)
            again = f"the run is saved after step {trainer.state.step}: `{resuming(directory)}` goes on"
            raise OutageError(f"{error}; {again}") from error
        logger.warning("%s", error)
    except TrainingError as error:
        if trainer.method.state:  # it may have counted the refused step; the last regular checkpoint did not
            save.wait()
        else:
            save.save(trainer)
        report = {"step": trainer.state.step + 1, "position": trainer.state.position, "message": str(error)}
        trainer.world.first(lambda: write_text(directory / "failure.json", json.dumps(report, indent=2)))
        saved = TrainingError(f"{error} {trainer.world.first(lambda: _what_is_saved(trainer, directory))}")
        saved.everywhere = error.everywhere
        raise saved from error
    if not trainer.done:
        save.save(trainer)
    return trainer.done


def _what_is_saved(trainer: Trainer, directory: Path) -> str:
    if not trainer.method.state:
        return f"The state before that step is in {directory}."
    if not checkpoint_folders(directory / "checkpoints"):
        return "Nothing was saved before it."
    return f"What was saved last is in {directory}."


def evaluate_every(config: RunConfig) -> int:
    """Steps between validations: as given, or ten over the run."""
    return config.training.evaluate_every or -(-config.training.total_steps // 10)


def _watch(config: RunConfig, metrics: Path) -> Watch:
    """What watches the routers, in the state that the steps so far have brought it to."""
    rate = config.resolved_balancing.rate if has_selection_bias(config.model) else None
    knobs = Knobs(
        config.optimizer.learning_rate,
        rate,
        opened=config.start_from is not None,
        routers_move=config.trainable.moves_routers,
    )
    watch = Watch(routed_layers(config.model), config.training.total_steps, knobs)
    watch.replay(read_metrics(metrics.parent))
    return watch


def _summary(config: RunConfig, trainer: Trainer, last: Measured, metrics: Path) -> dict[str, Any]:
    records = read_metrics(metrics.parent)
    steps = [record for record in records if record["kind"] == "step"]
    stalls = [record["stall_seconds"] for record in records if record["kind"] == "checkpoint"]
    size = measure(config.model, config.data.sequence_length)
    state = trainer.state
    failed = [share for one in steps if (share := one.get("figures", {}).get("failed_share")) is not None]
    return {
        **last.to_summary(),
        **({"failed_share": sum(failed) / len(failed)} if failed else {}),
        "final_training_loss": recent_loss(steps),
        "steps": state.step,
        **({"skipped_steps": state.skipped} if state.skipped else {}),
        **({"capacity_shares": shares} if (shares := capacity_shares(config, trainer.world.layout)) > 1 else {}),
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "checkpoint_stall_seconds": round(sum(stalls), 3),
        "tokens_per_second": round(state.tokens / state.seconds, 1),
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "cache_elements_per_token": size.cache_elements_per_token,
        "training_flops": size.training_flops_per_token * state.tokens,
        "peak_memory_bytes": memory.peak_bytes(),
    }
