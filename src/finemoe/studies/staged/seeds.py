"""Running the seeds of a study of stages side by side, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.core.logs import progress
from finemoe.studies.fleet import Active, Outcome, run_processes, start_worker, wait_for_orphan
from finemoe.studies.staged.worker import Job, examined, write_job


@dataclass(frozen=True)
class _Seed:
    name: str
    job: Job


def run_seeds(jobs: Mapping[str, Job], parallel: int, description: str, *, quiet: bool) -> Outcome:
    """Run `jobs`, by name, `parallel` at a time; stages that are done are left as they are: as of `run_processes`."""
    total, told = sum(len(job.raw["stage"]) for job in jobs.values()), 0
    shown: Any = nullcontext(lambda _: None) if quiet else progress(description, total, "stages")
    with shown as advance:

        def refresh(_: Sequence[_Seed]) -> None:
            nonlocal told
            done = sum(_done(job) for job in jobs.values())
            advance(done - told)
            told = done

        seeds = [_Seed(name, job) for name, job in jobs.items()]
        return run_processes(seeds, parallel, _start, finished=lambda _: None, refresh=refresh)


def _done(job: Job) -> int:
    return sum(examined(Path(job.out), str(one["name"])).exists() for one in job.raw["stage"])


def _start(seed: _Seed) -> Active[_Seed]:
    folder = Path(seed.job.out)
    path, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
    write_job(seed.job, path)
    for stage in sorted(folder.iterdir()) if folder.is_dir() else ():
        wait_for_orphan(stage)
    return Active(seed, start_worker("finemoe.studies.staged.worker", [str(path)], log), log)
