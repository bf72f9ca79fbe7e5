"""Going on with a run otherwise than it began: longer, or with settings of what is yet to come changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finemoe.checkpoint.kinds import COMPARISON, STATE
from finemoe.checkpoint.run_state.state import checkpoint_folders
from finemoe.core.config import parse, to_json, with_overrides
from finemoe.core.errors import RunError
from finemoe.core.files import storage_error, write_text
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of, read_object, require_numbers
from finemoe.runs.config import RunConfig, TrainingConfig, read_config
from finemoe.training.directory import read_summary
from finemoe.training.schedule import learning_rate_factor

_TO_COME = ("schedule", "optimizer", "kernels", "balancing", "mtp", "parallel")
"""Tables that say what the next steps do, and nothing of the steps that were."""
_TO_COME_OF_TRAINING = (
    "tokens", "steps", "max_tokens", "micro_batch_tokens", "evaluate_every", "checkpoint_every", "checkpoint_minutes",
    "checkpoint_format", "keep_checkpoints", "device", "precision", "trackers", "memory_check",
)  # fmt: skip
"""Not the threads: sums are cut by them, and a run keeps the number it had."""


_BOUNDS_OF_JUDGING = ("method.reward_seconds", "method.reward_memory")
"""What they were says nothing of a reward that was computed; and a run that ended as none could goes on with others."""


def with_changes(directory: Path, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` of the run in `directory` with `overrides` laid on top. Nothing is written.

    Raises:
        ConfigError: an unknown key or an impossible value.
        RunError: a key that would change what has been trained, a length that the run has reached, or an arm of a
            comparison.
    """
    asked = with_overrides({}, overrides)
    if past := [key for key in _leaves(asked) if is_past(key)]:
        raise RunError(
            f"{directory}: {', '.join(past)} cannot be changed any more: the steps so far were trained with another "
            "value. Start a new run, with `start_from` if it is to begin with these weights"
        )
    _refuse_arms(directory)
    raw = config.model_dump(mode="json")
    training = asked.get("training")
    if isinstance(training, Mapping) and len({"tokens", "steps"} & set(training)) == 1:  # the other one gives way
        raw["training"] |= {"tokens": None, "steps": None}
        if "tokens" in training:  # a length in tokens says all
            raw["training"]["max_tokens"] = None
    new = parse(RunConfig, with_overrides(raw, overrides), f"{directory}/config.json with --set")
    _require_steps(directory, config, new)
    return new


def _leaves(table: Mapping[str, Any], head: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{head}{key}.")
        else:
            yield head + key


def is_past(key: str) -> bool:
    """Whether a key of the configuration says how the steps so far were trained; unknown ones are told elsewhere."""
    table, _, field = key.partition(".")
    if key == "optimizer.kind":
        return True
    if key in _BOUNDS_OF_JUDGING:
        return False
    if key.startswith("method.server."):
        return field == "server.weights"
    if table == "training":
        return field in TrainingConfig.model_fields and field not in _TO_COME_OF_TRAINING
    return table in RunConfig.model_fields and table not in _TO_COME


def _refuse_arms(directory: Path) -> None:
    for above in directory.resolve().parents[:3]:
        if (above / COMPARISON).exists():
            raise RunError(
                f"{directory} belongs to the comparison in {above}, whose runs are alike but for one thing: copy it "
                "(cp -r) and go on with the copy"
            )


def _require_steps(directory: Path, old: RunConfig, new: RunConfig) -> None:
    """Check that something is left to train.

    Raises:
        RunError: all steps were done, or all tokens read.
    """
    done, read = _trained(directory)
    if new.training.total_steps <= done:
        length, unit = (done, "steps") if new.training.steps else (done * old.training.tokens_per_step, "tokens")
        raise RunError(
            f"{directory} has done {done:,} steps, which leaves nothing to train: with training.{unit} above "
            f"{length:_} it goes on"
        )
    if new.training.max_tokens is not None and new.training.max_tokens <= read:
        raise RunError(
            f"{directory} has read {read:,} tokens, and training.max_tokens {new.training.max_tokens:,} leaves nothing "
            f"to train: above {read:_} it goes on"
        )


def _trained(directory: Path) -> tuple[int, int]:
    """Steps and tokens of a finished run, or of the checkpoint that one goes on from."""
    summary = read_summary(directory)
    if summary is not None:
        return summary["steps"], summary["tokens"]
    for folder in checkpoint_folders(directory / "checkpoints"):
        with suppress(RunError):  # a damaged one is passed over, which the log says when it is to be opened
            state = read_object(folder / STATE, "remove that checkpoint")
            with damage_of(folder / STATE, "remove that checkpoint"):
                require_numbers(state, ("step", "tokens"))
            return state["step"], state["tokens"]
    return 0, 0


def write_changes(directory: Path, old: RunConfig, new: RunConfig, done: int) -> None:
    """Make `new` the configuration of the run after `done` steps; what config.json and summary.json said is kept.

    Raises:
        RunError: the folder cannot be written.
    """
    kept = _kept(directory, done)
    if not kept.exists():
        write_text(kept, to_json(old))
    try:
        if (directory / "summary.json").exists():  # before config.json: a kill in between leaves a run to go on with
            (directory / "summary.json").replace(directory / f"summary-{done:08d}.json")
    except OSError as error:
        raise storage_error(directory, error) from error
    write_text(directory / "config.json", to_json(new))


def was_changed(directory: Path, done: int) -> bool:
    """Whether the run was told to go on otherwise after `done` steps, and the checkpoint of that step is older."""
    return _kept(directory, done).exists()


def began_as(directory: Path) -> RunConfig | None:
    """What the run in `directory` was before it was changed for the first time; None: it never was.

    Raises:
        RunError: the file is damaged.
    """
    kept = sorted(directory.glob("config-*.json"), key=lambda path: (len(path.name), path.name))
    return read_config(kept[0]) if kept else None


def changed_since(first: RunConfig, now: RunConfig) -> tuple[str, ...]:
    """Keys, by table, in which a run's configuration is another than what it began with."""
    old, new = first.model_dump(mode="json"), now.model_dump(mode="json")
    found: list[str] = []
    for table in (name for name in new if old[name] != new[name]):
        was, became = old[table], new[table]
        if isinstance(was, Mapping) and isinstance(became, Mapping):
            found += [f"{table}.{key}" for key in {**was, **became} if was.get(key) != became.get(key)]
        else:
            found.append(table)
    return tuple(found)


def _kept(directory: Path, done: int) -> Path:
    return directory / f"config-{done:08d}.json"


def say_length(old: RunConfig, new: RunConfig, done: int) -> None:
    """What a changed number of steps does to the schedule, and where a changed bound of tokens lies."""
    if new.training.max_tokens != old.training.max_tokens:
        most = (
            "any number of" if one is None else f"{one:,}" for one in (new.training.max_tokens, old.training.max_tokens)
        )
        logger.info("at most %s tokens instead of %s", *most)
    before, after = old.training.total_steps, new.training.total_steps
    if before == after:
        return
    peak = new.optimizer.learning_rate
    rates = [peak * learning_rate_factor(new.schedule, step, after) for step in (done, after - 1)]
    logger.info(
        "%d steps instead of %d: the schedule is that of the new length from here on, with a learning rate of %.3g "
        "now and %.3g at the end",
        after,
        before,
        *rates,
    )
