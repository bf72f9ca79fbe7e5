"""`finemoe paper RECIPE`: the stages of a recipe over several seeds, and what they say of its claims.

The directory holds seeds/seed-N/ with the stages' folders, tuning/ where something is tried before, and results.json,
summary.md, report.html and figures/. What is done there is never done again.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finemoe.charts.paper.stages import figures, stages_page
from finemoe.charts.paper.words import summary_markdown
from finemoe.charts.report import write_report
from finemoe.core.config import parse, read_tables, with_overrides
from finemoe.core.environment import environment
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.files import sole_writer, write_text
from finemoe.core.reading import read_object
from finemoe.data.conversations.questions import question_in
from finemoe.data.documents.document import SkipReport
from finemoe.data.problems.corpus import ProblemsCorpus
from finemoe.runs.changes import began_as, changed_since
from finemoe.runs.config import read_config
from finemoe.runs.planning.stages import Stage, checked_stages
from finemoe.studies.paper import Paper
from finemoe.studies.staged.config import SHARES, ClaimConfig, StudyConfig
from finemoe.studies.staged.examination import questions
from finemoe.studies.staged.family import parents
from finemoe.studies.staged.records import records_of
from finemoe.studies.staged.seeds import run_seeds
from finemoe.studies.staged.tuning import expanded, require_free, tune
from finemoe.studies.staged.worker import Job
from finemoe.studies.statistics import CONFIDENCE, NO_ROOM, interval, points_against, verdict_on

STUDY = "study.json"
_BOUNDS_OF_JUDGING = ("reward_seconds", "reward_memory")
"""What they were says nothing of a reward that was computed."""
Records = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""What is known of every stage that is done, by seed and name."""


def study(
    recipe: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Paper:
    """Run the stages of `recipe` once a seed, examine every stage's model, and judge the claims; or go on with it.

    Args:
        recipe: a recipe with [[stage]] tables and a table [study].
        out: the study's directory; runs/paper-NAME when None.
        overrides: KEY=VALUE: study.KEY, stage.NAME.KEY, or of every stage.
        quiet: show no progress.

    Raises:
        ConfigError, DataError: the recipe cannot work; nothing was written.
        RunError: `out` holds something else, or no stage was done.
    """
    path = Path(recipe)
    raw, laid, config = _read(path, overrides)
    directory = Path(out) if out is not None else Path("runs") / f"paper-{path.stem}"
    stages = checked_stages(raw, str(path), directory, laid)
    config.check_stages([one.name for one in stages if one.sampling is None], str(path))
    questions(config.examination)
    require_free(config.tuned, laid)
    trial = expanded(config.tuned, raw, str(path))
    _require_same(directory, raw, laid)
    parallel = min(config.parallel or os.cpu_count() or 1, len(config.seeds))
    with sole_writer(directory):
        write_text(directory / STUDY, json.dumps({"recipe": _identity(raw, laid)}, indent=1))
        tuned = tune(config, trial, path, directory, laid, quiet)
        interrupted, failures = tuned.interrupted, dict(tuned.failures)
        if not interrupted:
            jobs = {
                f"seed {seed}": Job(raw, str(path), str(_home(directory, seed)), seed, [*laid, *tuned.chosen])
                for seed in config.seeds
            }
            outcome = run_seeds(jobs, parallel, path.stem, quiet=quiet)
            interrupted, failures = outcome.interrupted, failures | outcome.failures
        records = {seed: records_of(_home(directory, seed), raw) for seed in config.seeds}
        if not any(records.values()):
            if interrupted:
                return Paper(directory, {}, True, failures)
            raise RunError(f"{directory}: no stage was done; first failure: {next(iter(failures.values()), 'none')}")
        command = _command(path, overrides, out)
        results = _results(config, raw, records, tuned.trials, failures, command, parallel)
        results["notes"] += [*_changed(directory), *_met_before(config, stages)]
        write_results(results, directory)
    return Paper(directory, results, interrupted, failures)


def write_results(results: dict[str, Any], directory: Path) -> None:
    """results.json, summary.md, report.html, figures/."""
    write_report(directory, results, stages_page, figures, beside={"summary.md": summary_markdown(results)})


def _home(directory: Path, seed: int) -> Path:
    return directory / "seeds" / f"seed-{seed}"


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str], StudyConfig]:
    """The recipe with the study's own overrides in it, the others, and the study."""
    raw = read_tables(path)
    if "stage" not in raw or "study" not in raw:
        raise ConfigError(f"{path}: a study needs [[stage]] tables, and a table [study] with claims")
    own = [one for one in overrides if one.startswith("study.")]
    study = with_overrides({"study": raw["study"]}, own)["study"]
    laid = [one for one in overrides if not one.startswith("study.")]
    for one in laid:
        if one.split("=")[0].strip().split(".")[-1] == "seed" and "corpus" not in one:
            raise ConfigError(f"--set {one}: a study runs by seeds of its own; say study.seeds=[...]")
    for one in raw["stage"]:
        if isinstance(one, Mapping) and "seed" in one:
            raise ConfigError(
                f"{path}: stage {one.get('name')} has a `seed`: a study runs by study.seeds; leave it out"
            )
    training = {"threads": 1, **raw.get("training", {})}  # so that no result depends on how many run at once
    raw = {**raw, "training": training}
    return {**raw, "study": study}, laid, parse(StudyConfig, study, f"{path}: study")


def _identity(raw: Mapping[str, Any], laid: Sequence[str]) -> Any:
    """What decides the runs and their figures: seeds may be added, claims changed, and rewards given more time."""
    study = {key: raw["study"][key] for key in ("examination", "tuned", "tuning_seed") if key in raw["study"]}
    if "examination" in study:
        study["examination"] = {key: one for key, one in study["examination"].items() if key not in _BOUNDS_OF_JUDGING}
    return json.loads(json.dumps({**raw, "study": study, "overrides": list(laid)}, default=str))


def _require_same(directory: Path, raw: Mapping[str, Any], laid: Sequence[str]) -> None:
    """Raises RunError where `directory` holds anything but this very study."""
    kept = directory / STUDY
    if kept.exists():
        if read_object(kept, "put it back, or choose another --out").get("recipe") != _identity(raw, laid):
            raise RunError(f"{directory} holds a study of other stages; choose another --out")
    elif directory.is_dir() and any(not inside.name.startswith(".") for inside in directory.iterdir()):
        raise RunError(f"{directory} is not empty and not a study of stages; choose another --out")


def _changed(directory: Path) -> list[str]:
    """Which runs were changed since they began: what came of them is not what the recipe describes."""
    said = []
    for path in sorted([*directory.glob("tuning/*/config.json"), *directory.glob("seeds/*/*/config.json")]):
        if (first := began_as(path.parent)) is not None:
            keys = ", ".join(changed_since(first, read_config(path)))
            said.append(f"{path.parent.relative_to(directory)} was changed by `finemoe resume --set`: {keys}.")
    return said


def _met_before(config: StudyConfig, stages: Sequence[Stage]) -> list[str]:
    """Which stages train on questions that are examined, or have them answered, of problems that are made in code."""
    asked = {one.text for one in questions(config.examination)}
    met: dict[str, int] = {}
    """By corpus: stages often read the same one."""
    said = []
    for stage in stages:
        corpus, does = _problems_of(stage), "trains on" if stage.sampling is None else "has its model answer"
        if corpus is None:
            continue
        key = corpus.model_dump_json(exclude={"reasoned"})
        if key not in met:
            found = corpus.documents(SkipReport(quiet=True), whole=True)
            met[key] = len(asked & {question_in(one.text).text for one in found})
        if met[key]:
            said.append(f"{met[key]} of the {len(asked)} questions are among what stage {stage.name} {does}.")
    return said


def _problems_of(stage: Stage) -> ProblemsCorpus | None:
    """Those that a stage trains on, or has its model answer for a later one; None where it reads anything else."""
    if stage.sampling is not None:
        return stage.sampling.corpus if isinstance(stage.sampling.corpus, ProblemsCorpus) else None
    given = stage.raw.get("data", {}).get("corpus", {})
    if not isinstance(given, Mapping) or given.get("kind") != "problems":
        return None
    return parse(ProblemsCorpus, given, f"stage {stage.name}: data.corpus")


def _command(path: Path, overrides: Sequence[str], out: str | os.PathLike[str] | None) -> str:
    words = ["finemoe", "paper", str(path), *(word for one in overrides for word in ("--set", one))]
    return shlex.join([*words, *(["--out", os.fspath(out)] if out is not None else [])])


def _results(
    config: StudyConfig,
    raw: Mapping[str, Any],
    records: Records,
    trials: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
    command: str,
    parallel: int,
) -> dict[str, Any]:
    here = environment()
    machine = {key: here[key] for key in ("processor", "cores", "memory_gib", "python", "git_revision")}
    return {
        "schema": 1,
        "kind": "study",
        "finemoe_version": here["packages"]["finemoe"],
        "title": config.title,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "machine": {
            **machine,
            "torch": here["packages"]["torch"],
            "parallel_runs": parallel,
        },
        "recipe": raw,
        "seeds": list(config.seeds),
        "confidence": CONFIDENCE,
        "notes": [f"Failed: {name}: {text}" for name, text in failures.items()],
        "tuning": list(trials),
        "samples": config.examination.samples,
        "questions": config.examination.num_prompts,
        "temperature": config.examination.temperature,
        "stages": _stages(config, raw, records),
        "experiments": {
            "claims": {"title": "Claims", "note": config.note, "command": command,
                       "claims": [_judged(one, records) for one in config.claims]}
        },
    }  # fmt: skip


def _stages(config: StudyConfig, raw: Mapping[str, Any], records: Records) -> list[dict[str, Any]]:
    """Of every stage: what it came from, its figures over seeds, its compute."""
    family, told = parents(raw["stage"]), []
    for name, before in family.items():
        done = {seed: found[name] for seed, found in records.items() if name in found}
        if not done:
            continue
        one = next(iter(done.values()))
        figures = {
            figure: {**asdict(interval([each["figures"][figure] for each in done.values()])),
                     "seeds": {str(seed): each["figures"][figure] for seed, each in done.items()}}
            for figure in (config.figures if one["kind"] == "trained" else ())
        }  # fmt: skip
        shared = {key: interval([float(each[key]) for each in done.values()]).mean for key in ("flops", "all_flops")}
        kept = {key: one.get(key) for key in ("kind", "parameters", "active")}
        more = {
            key: interval([each[key] for each in done.values()]).mean
            for key in ("seconds", "drawn", "kept")
            if key in one
        }
        told.append({"name": name, "from": list(before), **kept, **shared, **more, "figures": figures})
    return told


def _judged(claim: ClaimConfig, records: Records) -> dict[str, Any]:
    """The claim with our figures and the verdict on it."""
    a, b = _values(claim.a, records), _values(claim.b, records)
    seeds = sorted(a.keys() & b.keys())
    if seeds:  # a seed that only one of them has would make the two means of different seeds
        a, b = {seed: a[seed] for seed in seeds}, {seed: b[seed] for seed in seeds}
    difference = interval([a[seed] - b[seed] for seed in seeds]) if seeds else None
    figure = claim.a.partition(".")[2]
    room = 1 - interval(list(b.values())).mean if b and claim.b.partition(".")[2] in SHARES else None
    verdict, reason = verdict_on(claim.relation, difference, len(seeds), claim.margin, room)
    mean = difference.mean if difference is not None and verdict == "undecided" else None
    return {
        **claim.model_dump(mode="json", include={"id", "statement", "source", "printed", "relation", "margin"}),
        "printed_difference": None, "unit": figure, "a": _side(claim.a, a), "b": _side(claim.b, b),
        "seeds": seeds, "difference": None if difference is None else asdict(difference), "verdict": verdict,
        "points_against": mean is not None and points_against(claim.relation, mean, claim.margin),
        "reason": reason, "no_room": reason.startswith(NO_ROOM), "on_training_text": None,
    }  # fmt: skip


def _values(side: str, records: Records) -> dict[int, float]:
    stage, _, figure = side.partition(".")
    return {seed: found[stage]["figures"][figure] for seed, found in records.items() if stage in found}


def _side(side: str, values: Mapping[int, float]) -> dict[str, Any]:
    found = asdict(interval(list(values.values()))) if values else {"mean": None, "low": None, "high": None}
    return {"label": side, **found, "seeds": {str(seed): value for seed, value in values.items()}}
