"""What a run is gone on with: its newest checkpoint, of the very run that config.json and the data describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.checkpoint.run_state.state import RunState, load_latest
from finemoe.core.config import parse
from finemoe.core.errors import CheckpointError, ConfigError, RunError
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of, decode_json, read_object
from finemoe.parallel.world import World
from finemoe.runs.changes import was_changed
from finemoe.runs.config import RunConfig
from finemoe.training.trainer import Trainer

_BEGAN_WITH = {
    "corpus_sha256": "the corpus", "tokenizer_sha256": "the tokenizer", "template_sha256": "the chat template",
    "teacher_sha256": "the teacher",
}  # fmt: skip


def refuse_other_data(directory: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on where what is read is not what the run began with; `now`: the data's report.

    Raises:
        RunError: corpus, tokenizer, template or teacher differ, or data.json is damaged.
    """
    had = _recorded_data(directory / "data.json")
    changed = [key for key in now if key.endswith("sha256") and had and had.get(key) != now[key]]
    if changed:
        what = " and ".join(_BEGAN_WITH.get(key, key) for key in changed)
        raise RunError(
            f"{directory}: {what} {'are' if changed[1:] else 'is'} not what this run began with ({', '.join(changed)} "
            "differ); put it back, or start a new run"
        )


def _recorded_data(path: Path) -> dict[str, Any] | None:
    """What the run wrote of its corpus; None where it is not there.

    Raises:
        RunError: it is damaged.
    """
    if not path.exists():
        return None
    mend = "put it back, or remove it, and the run goes on without comparing its corpus with the one it began with"
    return read_object(path, mend)


def newest_state(directory: Path, config: RunConfig, world: World) -> RunState | None:
    """What the newest undamaged checkpoint holds; None where the run had not come to its first.

    Several processes look for damage together, each in its share of the files, and pass over the same ones.

    Raises:
        RunError: it is of another run than `config` says, or not all processes see the same checkpoints.
    """
    checkpoints = directory / "checkpoints"
    seen = world.everyone(sorted(path.name for path in checkpoints.glob("step-*")))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise _behind(directory, rank, "the checkpoints it sees")
    if not seen[0]:
        return None
    try:
        saved = load_latest(checkpoints, (world.rank, world.size), world.everyone)
    except CheckpointError as error:
        error.everywhere = world.size > 1
        raise
    now = _config_of(saved, checkpoints)
    world.in_turn(lambda: _compare_configurations(directory, config, now, saved.state["step"]))
    return saved


def _config_of(saved: RunState, checkpoints: Path) -> RunConfig:
    """The configuration that a checkpoint was written with.

    Raises:
        ConfigError: it is none.
    """
    with damage_of(f"{checkpoints}: config.json of the newest checkpoint", "remove that checkpoint", ConfigError):
        raw = decode_json(saved.config.encode())
        return parse(RunConfig, dict(raw), f"{checkpoints}: config.json of the newest checkpoint")


def _compare_configurations(directory: Path, config: RunConfig, saved: RunConfig, step: int) -> None:
    """An edited config.json: another model or corpus is refused, anything else is said, unless `--set` asked for it."""
    changed = [name for name in RunConfig.model_fields if getattr(config, name) != getattr(saved, name)]
    if {"model", "data", "seed", "method", "trainable"} & set(changed) or config.optimizer.kind != saved.optimizer.kind:
        raise RunError(f"{directory}/config.json: {', '.join(changed)} differ from the checkpoint's; put them back")
    if changed and not was_changed(directory, step):
        logger.warning("%s differ from the checkpoint's: this is no longer the run that began here", ", ".join(changed))


def require_agreement(trainer: Trainer, config: RunConfig, directory: Path) -> None:
    """Check that all processes train the same: each has read the recipe, the data and the checkpoint for itself.

    Raises:
        RunError: one has read something else, as through a file system that is behind.
    """
    if trainer.world.size == 1:
        return
    hashes = {key: value for key, value in trainer.method.data.report.items() if key.endswith("sha256")}
    own = {
        "the step it goes on from": trainer.state.step,
        "the recipe": config.model_dump_json(exclude={"kernels"}),
        "the data": json.dumps(hashes, sort_keys=True, default=str),
        "the kind of device": trainer.plan.device.type,
    }
    everybody = trainer.world.everyone(own)
    for rank, other in enumerate(everybody):
        if apart := [what for what in own if other[what] != everybody[0][what]]:
            raise _behind(directory, rank, " and ".join(apart))


def _behind(directory: Path, rank: int, what: str) -> RunError:
    """Of a process that reads something else, as through a file system that is behind; all find it together."""
    error = RunError(
        f"{directory}: rank {rank} differs from rank 0 in {what}: all machines must see the same files; wait until they"
        " do, and start again"
    )
    error.everywhere = True
    return error
