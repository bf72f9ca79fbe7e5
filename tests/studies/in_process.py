"""The runs of a study in this process: a process apart for each takes seconds to start."""

from __future__ import annotations

from collections.abc import Sequence

from finemoe.core.errors import FinemoeError
from finemoe.runs.run import resume, train
from finemoe.studies.fleet import Job, Outcome


def run_here(jobs: Sequence[Job], parallel: int, *, description: str, quiet: bool) -> Outcome:
    """In place of the fleet: one run after the other, in this process."""
    outcome = Outcome()
    for job in jobs:
        if not job.finished:
            try:
                if (job.directory / "config.json").exists():
                    resume(job.directory, quiet=True)
                else:
                    train(job.config, out=job.directory, quiet=True)
            except FinemoeError as error:
                outcome.failures[job.name] = str(error)
    return outcome
