"""Every method and every choice of what may move, by two processes: the run of one, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import merge
from finemoe.core.errors import ConfigError
from finemoe.parallel.config import Layout
from finemoe.parallel.world import ROWS_FIGURE
from finemoe.runs import run as running
from finemoe.runs.config import resolve_run
from finemoe.runs.start import refuse_layout
from finemoe.training.directory import read_metrics
from methods.tiny_adaptations import ADAPT, MOVE, begin_all, of_kinds
from parallel.processes import run
from runs.tiny_runs import corpus

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin_all(corpus, tmp_path_factory.mktemp("many"))


def pairs() -> Iterator[tuple[str, str]]:
    """Each method but the one that one process alone can do, and each choice, once at least."""
    yield from (("sft", moving) for moving in MOVE)
    yield from ((method, "everything") for method in ADAPT if method not in ("sft", "grpo"))


def several(raws: list[dict[str, Any]], folders: list[Path]) -> None:
    for raw, folder in zip(raws, folders, strict=True):
        running.train(raw, out=folder, quiet=True)


def figures(folder: Path) -> list[dict[str, Any]]:
    """All that steps and validations say, but for times."""
    times = {"seconds", "tokens_per_second", "processor_seconds", "kind"}
    steps = [record for record in read_metrics(folder) if record["kind"] in ("step", "validation")]
    for record in steps:
        if record.get("figures", {}).pop(ROWS_FIGURE, None) is not None and not record["figures"]:
            del record["figures"]
    return [{key: value for key, value in record.items() if key not in times} for record in steps]


def apart(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """What differs by more than rounding in float32."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            yield from apart(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from apart(one, other, f"{where}/{number}")
    elif ours != (pytest.approx(theirs, rel=5e-4, abs=5e-5) if isinstance(theirs, float) else theirs):
        yield f"{where}: {ours!r}, alone {theirs!r}"


def raw_of(base: Path, method: str, moving: str) -> dict[str, Any]:
    return of_kinds(base, method, moving, training={"steps": 2, "checkpoint_every": 2, "evaluate_every": 2})


def test_grpo_by_two_processes_is_refused(base: Path) -> None:
    config = resolve_run(raw_of(base, "grpo", "everything"), "recipe")
    with pytest.raises(ConfigError, match="writes its answers by one engine in one process"):
        refuse_layout(config, Layout(replicate=2))


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for method, moving in pairs():
        running.train(raw_of(base, method, moving), out=folder / f"{method} {moving}", quiet=True)
    return folder


@pytest.mark.parametrize("parallel", [{"replicate": 2, "shard": 1}, {"shard": 2, "expert": 2}], ids=["copies", "cut"])
def test_methods_by_two_processes_are_those_of_one(
    base: Path, alone: Path, tmp_path: Path, parallel: dict[str, int]
) -> None:
    raws, folders = [], []
    for method, moving in pairs():
        together = merge(raw_of(base, method, moving), {"parallel": parallel})
        if "expert" in parallel and moving not in ("everything", "names"):
            with pytest.raises(ConfigError, match=r"--set parallel\.replicate=2 --set parallel\.shard=1 .*works"):
                refuse_layout(resolve_run(together, "recipe"), Layout(shard=2, expert=2))
            continue
        raws.append(together)
        folders.append(tmp_path / f"{method} {moving}")
    run(2, several, raws, folders, met=False, deadline=150)
    for folder in folders:
        assert list(apart(figures(folder), figures(alone / folder.name), folder.name)) == []
