"""What a run begins with: a model drawn or opened; and what it is gone on with, the newest checkpoint of that very run.

Several processes begin with a model that has no memory, keep their pieces of it, and fill those a whole tensor at a
time: none ever holds the whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.open import load_model, load_tensors
from finemoe.checkpoint.run_state.state import RunState, load_latest
from finemoe.core.config import parse
from finemoe.core.errors import CheckpointError, ConfigError, RunError
from finemoe.core.files import write_text
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of, decode_json, read_object
from finemoe.model.config import Kernels, ModelConfig, can_begin_with
from finemoe.model.initialize import initialize
from finemoe.model.transformer import Transformer
from finemoe.parallel.world import World
from finemoe.runs.changes import was_changed
from finemoe.runs.config import RunConfig
from finemoe.training.method import Method
from finemoe.training.trainer import Trainer

_BEGAN_WITH = {
    "corpus_sha256": "the corpus", "tokenizer_sha256": "the tokenizer", "template_sha256": "the chat template",
    "teacher_sha256": "the teacher", "reward_model_sha256": "the reward model",
}  # fmt: skip


def first_model(
    config: RunConfig, method: Method[Any], kernels: Kernels, *, starts: bool, world: World, device: torch.device
) -> tuple[Transformer, Callable[[Transformer], None] | None]:
    """The model that a run begins with, and what gives it weights once this process's pieces of it are known.

    Alone, and where the method prepares what it needs the whole model for, the model is whole at once, and the second
    is None.

    Args:
        config: of the run.
        method: how it trains.
        kernels: how to compute.
        starts: with the weights that the run began with; else a checkpoint's will replace whatever is in them.
        world: the processes that train together.
        device: where the model is to be.

    Raises:
        RunError: `start_from` holds another model than this run began with; also from what is given back.
    """

    def frequencies() -> Tensor:
        counts = torch.zeros(config.model.vocab_size, dtype=torch.int64)
        counts[: method.data.tokenizer.vocab_size] = method.data.token_frequencies()
        return counts

    if world.size == 1 or method.prepare:
        if config.start_from is not None and starts:
            return _opened(config.start_from, config.model, kernels).to(device), None
        model = Transformer(config.model, kernels)
        initialize(model, config.seed, frequencies)
        return model.to(device), None

    def fill(model: Transformer) -> None:
        model.to_empty(device=device)
        if config.start_from is not None and starts:
            _read(model, config.start_from, config.model, world)
        elif starts or method.stand_ins:  # these look at weights before a checkpoint's are there
            initialize(model, config.seed, frequencies, world.put)

    with torch.device("meta"):
        return Transformer(config.model, kernels), fill


def _opened(source: str, wanted: ModelConfig, kernels: Kernels) -> Transformer:
    """The model at `source`, without what the run does not have of it."""
    opened = load_model(source)
    _require_same(source, wanted, opened.config)
    with torch.device("meta"):
        model = Transformer(wanted, kernels)
    names = model.state_dict().keys()
    model.load_state_dict({name: one for name, one in opened.state_dict().items() if name in names}, assign=True)
    return model


def _read(model: Transformer, source: str, wanted: ModelConfig, world: World) -> None:
    """Into the pieces that lie here, the model at `source`."""
    found, tensors = load_tensors(source)
    _require_same(source, wanted, found)
    own = model.state_dict()
    for name, tensor in tensors:
        if name in own:
            world.put(own.pop(name), tensor)
    if own:
        raise RunError(f"{source} has no {', '.join(sorted(own)[:4])}, which this run's model has")


def _require_same(source: str, wanted: ModelConfig, found: ModelConfig) -> None:
    if not can_begin_with(wanted, found):
        raise RunError(f"{source} does not hold the model of this run's config.json any more")


def refuse_other_data(directory: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on where what is read is not what the run began with; `now`: the data's report.

    What was not recorded when the run began may be the same or not: that is said, and recorded from here on.

    Raises:
        RunError: corpus, tokenizer, chat template, teacher or reward model differ, or data.json is damaged.
    """
    had = _recorded_data(directory / "data.json")
    if had is None:
        return
    marks = {key: mark for key, mark in now.items() if key.endswith("sha256")}
    unknown = [key for key in marks if key not in had]
    changed = [key for key in marks if key in had and had[key] != marks[key]]
    if changed:
        older = ""
        if "corpus_sha256" in changed:
            older = "; where nobody changed it, another finemoe made or split it otherwise: environment.json says which"
        raise RunError(
            f"{directory}: {_named(changed)} not what this run began with ({', '.join(changed)} differ); put it back, "
            f"or start a new run{older}"
        )
    if unknown:
        logger.warning(
            "%s: whether %s what this run began with is not known, as data.json has no %s; the run goes on, and it is "
            "recorded from here on",
            directory, _named(unknown), " and no ".join(unknown),
        )  # fmt: skip
        new = {**had, **{key: marks[key] for key in unknown}}
        write_text(directory / "data.json", json.dumps(new, indent=2, ensure_ascii=False))


def _named(keys: Sequence[str]) -> str:
    return f"{' and '.join(_BEGAN_WITH.get(key, key) for key in keys)} {'are' if keys[1:] else 'is'}"


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
    group = world.apart()  # one may read a much larger file than the others
    try:
        saved = load_latest(checkpoints, (world.rank, world.size), lambda said: world.everyone(said, group))
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
    fixed = {"model", "data", "seed", "trainable"} & set(changed)
    if fixed or config.method.as_learnt() != saved.method.as_learnt() or config.optimizer.kind != saved.optimizer.kind:
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
