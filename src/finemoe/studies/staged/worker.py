"""One seed of a study of stages, in a process of its own: `python -m finemoe.studies.staged.worker JOB.json PARENT`.

Every stage is run, and its model examined when it is done; what is done already is left as it is. A stage that cannot
be run leaves out those that come from it. Exit status as of
`finemoe.studies.worker`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finemoe.studies.worker import FAILED, FINISHED, INTERRUPTED, stop_with_parent


@dataclass(frozen=True)
class Job:
    """One seed."""

    raw: Mapping[str, Any]
    """The recipe's tables, with its [study]."""
    source: str
    """What errors call it."""
    out: str
    """Folder of the stages' folders, and of examined/STAGE.json."""
    seed: int
    overrides: Sequence[str]


def examined(out: Path, stage: str) -> Path:
    """What is known of a stage that is done."""
    return out / "examined" / f"{stage}.json"


def failures_of(out: Path) -> Path:
    """Why stages could not be run, by name: written when all others are done."""
    return out / "failed.json"


def run(job: Job) -> None:
    """Run what is not done.

    Raises:
        FinemoeError: a stage cannot work, which is said when all that do not come from it are done; or was interrupted.
    """
    import torch

    from finemoe.core.config import parse
    from finemoe.core.errors import FinemoeError
    from finemoe.core.files import write_text
    from finemoe.runs.planning.stages import stages_of
    from finemoe.studies.staged.config import StudyConfig
    from finemoe.studies.staged.examination import questions
    from finemoe.studies.staged.family import line, parents
    from finemoe.studies.stages import StageInterruptedError, run_stage

    torch.set_num_threads(1)  # as its stages, unless they say otherwise
    out, config = Path(job.out), parse(StudyConfig, job.raw["study"], f"{job.source}: study")
    asked, family = questions(config.examination), parents(job.raw["stage"])
    failed: dict[str, FinemoeError] = {}
    out.mkdir(parents=True, exist_ok=True)
    failures_of(out).unlink(missing_ok=True)
    for stage in stages_of(job.raw, job.source, out, [f"seed={job.seed}", *job.overrides]):
        path = examined(out, stage.name)
        if path.exists() or failed.keys() & set(line(stage.name, family)):
            continue
        try:
            done = run_stage(stage, job.source, quiet=True)
            record = _record(stage, done, config, asked, job.seed)
        except StageInterruptedError:
            raise
        except FinemoeError as error:  # stages that do not come from it can be run all the same
            failed[stage.name] = error
            continue
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(record, indent=1))
    if failed:
        write_text(failures_of(out), json.dumps({name: str(error) for name, error in failed.items()}, indent=1))
        first = next(iter(failed.values()))
        raise type(first)("; ".join(f"stage {name}: {error}" for name, error in failed.items()))


def _record(stage: Any, done: Mapping[str, Any], config: Any, asked: Any, seed: int) -> dict[str, Any]:
    from finemoe.checkpoint.kinds import ANSWERS
    from finemoe.studies.staged.compute import sampled_flops, trained_flops
    from finemoe.studies.staged.examination import examine

    if "sampled" in done:
        drawn, kept = done["sampled"]["drawn"], done["sampled"]["kept"]
        flops = sampled_flops(Path(stage.raw["start_from"]), stage.folder / ANSWERS, drawn)
        return {"kind": "sampled", "drawn": drawn, "kept": kept, "flops": flops}
    summary = done["summary"]
    figures = examine(stage.folder, config.examination, asked, seed)
    return {
        "kind": "trained", "figures": figures, "flops": trained_flops(stage.folder, summary),
        "seconds": summary["seconds"], "parameters": summary["total_parameters"],
        "active": summary["active_parameters"],
    }  # fmt: skip


def write_job(job: Job, path: Path) -> None:
    """For the command line of this module."""
    from finemoe.core.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(job), indent=1))


def main(path: str) -> int:
    """Exit status."""
    from finemoe.core import logs
    from finemoe.core.errors import FinemoeError
    from finemoe.studies.stages import StageInterruptedError

    logs.set_up()
    try:
        run(Job(**json.loads(Path(path).read_text(encoding="utf-8"))))
    except StageInterruptedError:
        return INTERRUPTED
    except FinemoeError as error:
        print(error, file=sys.stderr)
        return FAILED
    return FINISHED


if __name__ == "__main__":
    stop_with_parent(int(sys.argv[2]))
    sys.exit(main(sys.argv[1]))
