"""`finemoe paper`: the claims of the papers, tested at a size that fits the machine.

The directory is a study's (compare.json, arms/NAME/seed-N/) with knockouts/ beside it: what is finished there is never
done again, so experiments can be added one by one. The results: results.json, summary.md, report.html, figures/.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finemoe.charts.paper.figures import figures
from finemoe.charts.paper.page import paper_page
from finemoe.charts.paper.words import summary_markdown
from finemoe.charts.report import write_report
from finemoe.core.config import did_you_mean, to_json, with_overrides
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.files import sole_writer, write_text
from finemoe.core.logs import logger
from finemoe.runs.start import build_method
from finemoe.studies.arms import ARMS, SizedArm, solve
from finemoe.studies.claims import ALL_ARMS, EXPERIMENTS, MARGIN, Claim, Experiment, Quantity
from finemoe.studies.config import CompareConfig, resolve_comparison
from finemoe.studies.knockouts import Figures, gather, seeds_of
from finemoe.studies.results import build_results
from finemoe.studies.scales import SCALES
from finemoe.studies.statistics import CONFIDENCE, Interval, interval, points_against, verdict_on
from finemoe.studies.study import Study, holds_study

_KEPT = (
    "label", "routing", "validation_loss", "training_loss", "max_vio", "total_parameters", "active_parameters",
    "training_flops", "tokens", "tokens_per_second", "seconds", "learning_rate", "mismatch", "paper",
)  # fmt: skip
"""Of what a comparison says of an arm."""


@dataclass(frozen=True)
class Paper:
    """A study of the papers' claims that ended or was interrupted."""

    directory: Path
    results: dict[str, Any]
    """Contents of results.json; what is finished so far when interrupted."""
    interrupted: bool
    failures: Mapping[str, str]
    """Message by run, of the runs that could not finish."""


def paper(
    scale: str = "tiny",
    *,
    only: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Paper:
    """Run the experiments `only`, or all, or go on with what `out` holds. What `out` holds of others is reported too.

    Args:
        scale: one of SCALES.
        only: names of EXPERIMENTS.
        out: the study's directory; runs/paper-SCALE when None.
        overrides: KEY=VALUE, of the scale's recipe.
        quiet: show no progress.

    Raises:
        ConfigError, DataError: settings that cannot work; nothing was written.
        RunError: `out` holds something else, or no run finished.
    """
    wanted = chosen(only)
    config = _config(scale, overrides)
    seq_len = config.data.sequence_length
    arms = {name: solve(name, config.base, config.matching, config.routing, seq_len) for name in config.arms}
    directory = Path(out) if out is not None else Path("runs") / f"paper-{scale}"
    needed = dict.fromkeys(arm for experiment in wanted.values() for arm in experiment.all_arms)
    parallel = min(config.parallel_runs or os.cpu_count() or 1, len(needed) * len(config.seeds))
    study = Study(config, arms, directory, parallel, quiet, "paper")
    holds_study(directory, config)
    study.check()
    data = build_method(study.example()).data  # into the cache, once for all runs
    command = _command(scale, [], overrides, out)
    with sole_writer(directory):
        if not holds_study(directory, config):
            write_text(directory / "compare.json", to_json(config))
        if not quiet:
            runs = len(needed) * len(config.seeds)
            logger.info("%d experiments, %d runs of %d arms, %d at a time", len(wanted), runs, len(needed), parallel)
        interrupted, failures = study.run(needed)
        comparison = build_results(
            config, arms, directory, study.plan(), data.tokenizer, study.threads, parallel, failures, command
        )
        if not comparison["arms"]:
            if interrupted:
                return Paper(directory, {}, True, failures)
            raise RunError(f"{directory}: no run finished; first failure: {next(iter(failures.values()), 'none')}")
        asked = [quantity for experiment in wanted.values() for quantity in experiment.quantities()]
        knocked = {quantity.arm for quantity in asked if quantity.needs_knockout and not interrupted}
        try:
            quantities = gather(directory, arms, config, EXPERIMENTS.values(), quiet=quiet, measure=knocked)
        except KeyboardInterrupt:
            interrupted = True
            quantities = gather(directory, arms, config, EXPERIMENTS.values(), quiet=True, measure=())
        passes = config.budget.value / data.report["tokens"]["train"]
        results = _results(scale, config, arms, comparison, quantities, failures, passes, (command, overrides, out))
        write_results(results, directory)
    return Paper(directory, results, interrupted, failures)


def chosen(only: Sequence[str]) -> dict[str, Experiment]:
    """The experiments of that name; all when none is named.

    Raises:
        ConfigError: an unknown name.
    """
    for name in only:
        if name not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            raise ConfigError(f"unknown experiment `{name}`{did_you_mean(name, [*EXPERIMENTS])}; known: {known}")
    return {name: EXPERIMENTS[name] for name in only or EXPERIMENTS}


def _config(scale: str, overrides: Sequence[str]) -> CompareConfig:
    if scale not in SCALES:
        raise ConfigError(f"unknown scale `{scale}`{did_you_mean(scale, [*SCALES])}; known: {', '.join(SCALES)}")
    for key in (override.split("=")[0].strip() for override in overrides):
        if key.split(".")[0] in ("arms", "tuning") or key == "budget.kind":
            raise ConfigError(f"--set {key}: the experiments set it; choose among them with --only")
        if key.split(".")[0] == "model":
            raise ConfigError(
                f"--set {key}: every arm is sized from the dense model `base`; did you mean base{key[5:]}?"
            )
    recipe = {"name": f"paper-{scale}", "title": "DeepSeekMoE in miniature", **SCALES[scale].recipe}
    return resolve_comparison({**with_overrides(recipe, overrides), "arms": list(ALL_ARMS)}, f"scale {scale}")


def _command(scale: str, only: Sequence[str], overrides: Sequence[str], out: str | os.PathLike[str] | None) -> str:
    words = ["finemoe", "paper", "--scale", scale, *(["--only", ",".join(only)] if only else [])]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--out", os.fspath(out)] if out is not None else []
    return shlex.join(words)


def _results(
    scale: str,
    config: CompareConfig,
    arms: Mapping[str, SizedArm],
    comparison: Mapping[str, Any],
    figures: Figures,
    failures: Mapping[str, str],
    passes: float,
    asked: tuple[str, Sequence[str], str | os.PathLike[str] | None],
) -> dict[str, Any]:
    command, overrides, out = asked
    return {
        "schema": 1,
        "finemoe_version": comparison["finemoe_version"],
        "title": config.title,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "machine": comparison["machine"],
        "scale": scale,
        "scale_about": SCALES[scale].about,
        "recipe": config.model_dump(mode="json"),
        "seeds": list(config.seeds),
        "confidence": CONFIDENCE,
        "margin": MARGIN,
        "notes": [*comparison["notes"][:3], *(f"Failed: {name}: {text}" for name, text in failures.items())],
        "experiments": {
            name: {
                "title": experiment.title,
                "note": experiment.note,
                "command": _command(scale, [name], overrides, out),
                "claims": [_judged(claim, figures) for claim in experiment.claims],
            }
            for name, experiment in EXPERIMENTS.items()
        },
        "passes": passes,
        "arms": {name: {key: record[key] for key in _KEPT} for name, record in comparison["arms"].items()},
        "curves": {name: _points(arms, figures, name) for name in ("masked", "active")},
    }


def _points(arms: Mapping[str, SizedArm], figures: Figures, kind: str) -> list[dict[str, Any]]:
    """Mean loss over seeds with its interval, of every setting of `kind` that was measured."""
    points = []
    for quantity, values in figures.items():
        if quantity.kind == kind and values:
            found = asdict(interval(list(values.values())))
            points.append({"arm": arms[quantity.arm].label, "setting": quantity.setting, **found})
    return sorted(points, key=lambda point: (point["arm"], point["setting"]))


def _judged(claim: Claim, figures: Figures) -> dict[str, Any]:
    """The claim with our figures and the verdict on it."""
    a, b = figures.get(claim.a, {}), figures.get(claim.b, {})
    twin = claim.on_training_text
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "printed": claim.printed,
        "printed_difference": claim.printed_difference,
        "relation": claim.relation,
        "unit": "MaxVio" if claim.a.kind == "max_vio" else "nats per token",
        "a": _side(claim.a, a),
        "b": _side(claim.b, b),
        **_outcome(claim, a, b),
        "on_training_text": twin and _outcome(twin, figures.get(twin.a, {}), figures.get(twin.b, {})),
    }


def _outcome(claim: Claim, a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
    """Seeds, difference with its interval, verdict and reason."""
    seeds = seeds_of(a, b)
    difference = interval([a[seed] - b[seed] for seed in seeds]) if seeds else None
    verdict, reason = judge(claim, difference, len(seeds))
    found = None if difference is None else asdict(difference)
    mean = difference.mean if difference is not None and verdict == "undecided" else None
    against = mean is not None and points_against(claim.relation, mean, MARGIN)
    return {"seeds": seeds, "difference": found, "verdict": verdict, "points_against": against, "reason": reason}


def _side(quantity: Quantity, values: Mapping[int, float]) -> dict[str, Any]:
    label = ARMS[quantity.arm].label
    words = {
        "loss": label,
        "training": label,
        "max_vio": f"{label}: MaxVio",
        "masked": f"{label}, {quantity.setting:.3g} masked" if quantity.setting else f"{label}, intact",
        "masked_rise": f"{label}: rise",
        "active": f"{label}, {quantity.setting:.2f} active" if quantity.setting < 1 else f"{label}, intact",
        "without_shared": f"{label} without its shared expert",
    }
    found = asdict(interval(list(values.values()))) if values else {"mean": None, "low": None, "high": None}
    return {"label": words[quantity.kind], **found, "seeds": {str(seed): value for seed, value in values.items()}}


def judge(claim: Claim, difference: Interval | None, seeds: int) -> tuple[str, str]:
    """Verdict and reason; losses count as equal within MARGIN, and MaxVio that must not be higher must not be so."""
    exact = claim.relation == "no_higher" and claim.a.kind == "max_vio"
    return verdict_on(claim.relation, difference, seeds, 0.0 if exact else MARGIN)


def write_results(results: dict[str, Any], directory: Path) -> None:
    """results.json, summary.md, report.html, figures/."""
    write_report(directory, results, paper_page, figures, beside={"summary.md": summary_markdown(results)})
