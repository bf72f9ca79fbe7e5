"""What a method keeps is saved with the run and given back, whatever else happens in a step; another's is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.errors import CheckpointError, RunError, TrainingError
from finemoe.model.transformer import Transformer
from finemoe.runs import run as run_module
from finemoe.runs import saving
from finemoe.runs.run import resume, train
from finemoe.training.directory import read_summary
from finemoe.training.method import Figures, Group, Method, Saved
from finemoe.training.trainer import Trainer
from runs.tiny_runs import assert_same_run, checkpoints, recipe, stop_after


class Counter:
    """Counts what it was asked, and remembers a tensor."""

    def __init__(self) -> None:
        self.seen, self.sum = 0, torch.zeros(2)

    def state(self) -> Saved:
        return Saved({"sum/all": self.sum}, {"seen": self.seen})

    def restore(self, saved: Saved) -> None:
        self.seen, self.sum = saved.values["seen"], saved.tensors["sum/all"].clone()

    def __call__(self, parameters: Any, norm: torch.Tensor) -> dict[str, float]:
        self.seen += 1
        self.sum += norm.detach()
        return {"seen": float(self.seen)}


def keep(monkeypatch: pytest.MonkeyPatch, original: Any, **parts: Counter) -> None:
    """Runs from here on have a method with these parts, which count its steps."""

    def build(*given: Any) -> Method[Any]:
        method = original(*given)
        return replace(method, before_update=(*method.before_update, *parts.values()), state=parts)

    monkeypatch.setattr(run_module, "build_method", build)


@pytest.fixture
def stopped(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Counter, Any]:
    """A run that was stopped after 2 of 6 steps, what its method had counted, and how methods are built."""
    original, counter = run_module.build_method, Counter()
    keep(monkeypatch, original, counter=counter)
    with monkeypatch.context() as patch:
        run = Trainer.run
        patch.setattr(Trainer, "run", lambda trainer: run(trainer, until=2))
        train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    assert counter.seen == 2
    return tmp_path / "run", counter, original


def test_it_goes_on_where_it_was(stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, before, original = stopped
    after = Counter()
    keep(monkeypatch, original, counter=after)
    assert not resume(directory, quiet=True).interrupted
    assert after.seen == 6
    assert (after.sum > before.sum).all()


@pytest.mark.parametrize("parts", [(), ("other",), ("counter", "other")])
def test_state_of_another_method_is_refused(
    stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]
) -> None:
    directory, _, original = stopped
    keep(monkeypatch, original, **{name: Counter() for name in parts})
    with pytest.raises(CheckpointError, match=r"holds state of \['counter'\].*not of the same run"):
        resume(directory, quiet=True)


Build = Callable[[Method[Any]], Method[Any]]


def method_with(monkeypatch: pytest.MonkeyPatch, change: Build) -> None:
    """Runs from here on train with their usual method, changed."""
    original = run_module.build_method
    monkeypatch.setattr(run_module, "build_method", lambda *given: change(original(*given)))


def saved(directory: Path) -> list[dict[str, Any]]:
    """What state.json of each checkpoint holds of the method, oldest first."""
    return [json.loads((folder / "state.json").read_text())["method"] for folder in checkpoints(directory)]


def test_several_parts_resume_to_the_bit(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One name begins another, and each part sees the norms of every step of the unbroken run."""
    made: list[dict[str, Counter]] = []

    def two(method: Method[Any]) -> Method[Any]:
        parts = {"a": Counter(), "ab": Counter()}
        parts["ab"].seen, parts["ab"].sum = 100, torch.full((2,), 50.0)
        made.append(parts)
        return replace(method, before_update=(*method.before_update, *parts.values()), state=parts)

    method_with(monkeypatch, two)
    train(recipe(corpus, "gshard"), out=tmp_path / "unbroken", quiet=True)
    stop_after(monkeypatch, 3)
    train(recipe(corpus, "gshard"), out=tmp_path / "broken", quiet=True)
    resume(tmp_path / "broken", quiet=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    unbroken, _, resumed = made
    for name, part in unbroken.items():
        assert resumed[name].seen == part.seen
        assert torch.equal(resumed[name].sum, part.sum)
    assert saved(tmp_path / "broken")[-1] == {"a": {"seen": 6}, "ab": {"seen": 106}}


def test_damage_to_the_state_of_a_method_is_damage(
    stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory, _, original = stopped
    keep(monkeypatch, original, counter=Counter())
    (path,) = (folder / "method.safetensors" for folder in checkpoints(directory))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match="all 1 are damaged"):
        resume(directory, quiet=True)


def test_a_step_that_is_refused_leaves_the_last_regular_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights can be those before the step; what a method has counted since then nobody can take back.

    The thread that writes the checkpoint is slow here: what is said of it is said when it is there.
    """
    counter = Counter()

    def slowly(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments, **named)

    def poison(parameters: Any, norm: torch.Tensor) -> dict[str, float]:
        return {"bad": float("nan") if counter.seen == 4 else 0.0}

    def counting(method: Method[Any]) -> Method[Any]:
        return replace(method, before_update=(counter, poison), state={"counter": counter})

    write = saving.save
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save", slowly)
        method_with(patch, counting)
        with pytest.raises(TrainingError, match=r"step 4 is not finite: bad.*What was saved last is in"):
            train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert saved(tmp_path / "run") == [{"counter": {"seen": 2}}]


def test_where_nothing_was_saved_it_says_so(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = (lambda parameters, norm: {"bad": float("inf")},)
    method_with(monkeypatch, lambda m: replace(m, before_update=bad, state={"counter": Counter()}))
    with pytest.raises(TrainingError, match=r"step 1 is not finite: bad.*Nothing was saved before it\."):
        train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    assert not checkpoints(tmp_path / "run")


def test_a_method_sees_no_gradient_of_a_step_that_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter()
    method_with(monkeypatch, lambda m: replace(m, before_update=(counter,), state={"counter": counter}))
    raw = recipe(corpus, "dense", optimizer={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match="is not finite"):
        train(raw, out=tmp_path / "run", quiet=True)
    assert counter.sum.isfinite().all()


def test_values_are_written_as_they_were_when_the_checkpoint_was_taken(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that grows while the thread writes."""

    class History:
        steps: list[int] = []  # noqa: RUF012 - one run

        def state(self) -> Saved:
            return Saved(values={"steps": self.steps})

        def restore(self, saved: Saved) -> None:
            self.steps[:] = saved.values["steps"]

        def __call__(self, model: Transformer, load: Mapping[int, torch.Tensor], progress: float) -> None:
            self.steps.append(len(self.steps))

    history = History()
    written = run_module.Save._write

    def slowly(save: Any, step: int, state: Any) -> float:
        history.steps.append(-1)  # as training would, meanwhile
        return written(save, step, state)

    monkeypatch.setattr(run_module.Save, "_write", slowly)
    method_with(monkeypatch, lambda m: replace(m, after_update=(history,), state={"history": history}))
    raw = recipe(corpus, "dense", training={"keep_checkpoints": 9})
    train(raw, out=tmp_path / "run", quiet=True)
    lengths = [len(one["history"]["steps"]) for one in saved(tmp_path / "run")]
    assert lengths == [2, 5, 8]  # two steps more each time, and the one that slipped in after the copy before


def test_a_measurement_leaves_no_trace(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws, and switches modes, and the run is the same however often it is measured and wherever it is stopped."""
    modes: list[bool] = []

    class Drawing:
        """The usual objective, with gradients that depend on the default generator."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.headline = inner, inner.headline
            self.counts, self.weights = inner.counts, inner.weights

        def terms(self, model: Transformer, batch: Any) -> Any:
            found = self.inner.terms(model, batch)
            return replace(found, sums={name: value * (1 + torch.rand(())) for name, value in found.sums.items()})

    def measure(model: Transformer) -> Figures:
        modes.append(model.training)
        model.train()
        return Figures({"luck": torch.rand(3).sum().item()})

    method_with(monkeypatch, lambda m: replace(m, objective=Drawing(m.objective), measure=measure))
    rarely, often = ({"training": {"evaluate_every": every}} for every in (6, 1))
    train(recipe(corpus, "dense", **rarely), out=tmp_path / "rarely", quiet=True)
    train(recipe(corpus, "dense", **often), out=tmp_path / "often", quiet=True)
    stop_after(monkeypatch, 3)
    train(recipe(corpus, "dense", **often), out=tmp_path / "broken", quiet=True)
    resume(tmp_path / "broken", quiet=True)
    assert_same_run(tmp_path / "often", tmp_path / "broken")
    weights = [(checkpoints(tmp_path / name)[-1] / "model.safetensors").read_bytes() for name in ("rarely", "often")]
    assert weights[0] == weights[1]
    assert set(modes) == {False}


def test_prepare_knows_whether_the_run_begins(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, bool]] = []
    first, second = (lambda model, begins, name=name: told.append((name, begins)) for name in ("first", "second"))
    method_with(monkeypatch, lambda m: replace(m, prepare=(first, second)))
    stop_after(monkeypatch, 2)
    train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True)
    assert told == [("first", True), ("second", True), ("first", False), ("second", False)]


@pytest.mark.parametrize(
    ("table", "key", "value"), [("optimizer", "kind", "muon"), (None, "seed", 5), ("data", "packing", "isolate")]
)
def test_what_makes_it_another_run_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str | None, key: str, value: Any
) -> None:
    stop_after(monkeypatch, 2)
    train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    config = json.loads((tmp_path / "run/config.json").read_text())
    if key == "kind":
        config["optimizer"] = {"kind": value, "learning_rate": config["optimizer"]["learning_rate"]}
    else:
        (config if table is None else config[table])[key] = value
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"{table or key} differ from the checkpoint's; put them back"):
        resume(tmp_path / "run", quiet=True)


def test_other_parameters_than_the_checkpoint_s_are_refused(
    stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _, original = stopped

    def fewer(*given: Any) -> Method[Any]:
        method = original(*given)
        parts = {"counter": Counter()}
        return replace(method, select=lambda name: None if "embedding" in name else Group(), state=parts)

    monkeypatch.setattr(run_module, "build_method", fewer)
    with pytest.raises(CheckpointError, match=r"optimizer state of unknown parameters.*put back what was trained"):
        resume(directory, quiet=True)


def test_the_threads_of_the_run_come_back(stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _, original = stopped
    keep(monkeypatch, original, counter=Counter())
    (folder,) = checkpoints(directory)
    assert json.loads((folder / "state.json").read_text())["threads"] == 1
    config = json.loads((directory / "config.json").read_text())
    config["training"]["threads"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    try:
        resume(directory, quiet=True)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["kind", "step", "tokens", "seconds", "training_loss"])
def test_figures_do_not_take_the_names_of_the_run(name: str) -> None:
    with pytest.raises(ValueError, match=f"the run has figures of that name itself: {name}"):
        Figures({name: 1.0})


def test_a_part_s_name_has_no_slash(corpus: Path) -> None:
    method = run_module.build_method(run_module.resolve_run(recipe(corpus, "dense"), "recipe"))
    with pytest.raises(ValueError, match="no NAME has a slash"):
        replace(method, state={"a/b": Counter()})


def test_a_run_whose_method_cannot_finish_is_not_taken_as_done(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds summary.json leaves the run as it is: what finish was to do would never be done."""
    asked: list[bool] = []

    def finish() -> None:
        asked.append((tmp_path / "run" / "summary.json").exists())
        if len(asked) == 1:
            raise OSError("the disk is gone")

    method_with(monkeypatch, lambda method: replace(method, finish=finish))
    with pytest.raises(OSError, match="the disk is gone"):
        train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    assert read_summary(tmp_path / "run") is None
    done = resume(tmp_path / "run", quiet=True)
    assert done.summary == read_summary(tmp_path / "run")
    assert asked == [False, False]
