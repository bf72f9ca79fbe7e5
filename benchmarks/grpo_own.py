"""finemoe's GRPO in a process of its own: `python -m benchmarks.grpo_own JOB`, asked for one step at a time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.serving import serve

from finemoe.core.environment import package_version
from finemoe.runs.config import resolve_run
from finemoe.runs.run import first_trainer
from finemoe.runs.start import build_method
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer


def recipe(job: Mapping[str, Any]) -> dict[str, Any]:
    """What `finemoe train` would be given: all that is not said is as it is by default."""
    settings = job["settings"]
    length = settings["sequence_length"]
    return {
        "seed": job["seed"],
        "start_from": job["model"],
        "method": {
            "kind": "grpo", "template": "{prompt}", "order": "given", "rewards": [{"kind": "number"}],
            **{name: settings[name] for name in ("group", "answer_tokens", "temperature", "beta", "clip")},
        },
        "data": {"corpus": job["corpus"], "sequence_length": length},
        "training": {
            "steps": settings["steps"], "tokens_per_step": settings["answers"] * length, "threads": 1, "device": "cpu",
        },
        "optimizer": {
            "weight_decay": 0.0,
            **{name: settings[name] for name in ("learning_rate", "betas", "eps", "max_gradient_norm")},
        },
        "schedule": {"kind": "constant"},
    }  # fmt: skip


class Own:
    """A run that stands still between two steps. An observer of its own trainer."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        config = resolve_run(recipe(job), "the benchmark")
        self.answers = job["settings"]["answers"]
        self.method = build_method(config)
        self.trainer, self.kernels = first_trainer(config, self.method)
        self.trainer.observers = (self,)
        self.report: StepReport

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Keep it."""
        self.report = report

    def close(self) -> None:
        """Nothing to release."""

    def step(self) -> dict[str, Any]:
        """The next one: its seconds, the mean reward, and the tokens of all answers."""
        begun = time.perf_counter()
        self.trainer.run(self.trainer.state.step + 1)
        for take in self.method.writes.values():  # what a run would write is thrown away
            take()
        seconds = time.perf_counter() - begun
        figures = self.report.figures
        return {
            "seconds": seconds,
            "reward": figures["reward"],
            "answer_tokens": round(figures["length"] * self.answers),
        }


def main() -> None:
    """Serve one job."""
    torch.set_num_threads(1)
    own = Own(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    parameters = sum(one.numel() for one in own.trainer.model.parameters())
    versions = {"finemoe": package_version("finemoe"), "torch": torch.__version__}
    choices = {"kernels": own.kernels, "threads": torch.get_num_threads()}
    try:
        serve({"step": own.step}, versions=versions, parameters=parameters, choices=choices)
    finally:
        own.method.close()


if __name__ == "__main__":
    main()
