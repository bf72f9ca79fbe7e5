"""Optional mirrors of metrics.jsonl: TensorBoard, Weights & Biases, trackio. Each package is imported here only."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from finemoe.core.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """Takes the records of metrics.jsonl."""

    def write(self, record: dict[str, Any]) -> None:
        """One record; its numbers become curves."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class TensorBoard:
    """Event files in the run directory's `tensorboard/`."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        """Scalars under `kind/name`."""
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class _RunTracker:
    """wandb and trackio share one interface: init, log, finish."""

    def __init__(self, module: Any, directory: Path, config: dict[str, Any]) -> None:
        self._module = module
        module.init(project="finemoe", name=directory.name, config=config)

    def write(self, record: dict[str, Any]) -> None:
        """Scalars under `kind/name`."""
        self._module.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        """End the run there."""
        self._module.finish()


def _wandb(directory: Path, config: dict[str, Any]) -> Tracker:
    import wandb

    return _RunTracker(wandb, directory, config)


def _trackio(directory: Path, config: dict[str, Any]) -> Tracker:
    import trackio

    return _RunTracker(trackio, directory, config)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def require_tracker(name: TrackerName) -> None:
    """Check before a run begins.

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        raise ConfigError(f"training.trackers: {name} is not installed; pip install 'finemoe[track]'") from error


def open_tracker(name: TrackerName, directory: Path, config: dict[str, Any]) -> Tracker:
    """Start one.

    Raises:
        ConfigError: its package is not installed.
    """
    require_tracker(name)
    return TRACKERS[name](directory, config)


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    scalars = {f"{record['kind']}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
    for group in ("terms", "max_vio_per_layer", "dead_experts_per_layer"):
        scalars |= {f"{record['kind']}/{group}/{key}": value for key, value in record.get(group, {}).items()}
    return scalars
