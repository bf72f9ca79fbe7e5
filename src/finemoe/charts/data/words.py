"""What is said of the data of a recipe, on the page and in the terminal."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from finemoe.charts.numbers import Results


def title_of(sample: Results) -> str:
    """The line above a sample, or above a prompt, with what would be right."""
    if "right" in sample:
        right = " or ".join(shorten(one, 60, placeholder=" ...") for one in sample["right"][:3])
        said = f"right: {right}" if right else "its record says nothing of what is right"
        return f"Prompt {sample['number'] + 1}: {sample['tokens']} tokens; {said}"
    part = f", {sample['part']}" if sample["part"] else ""
    return f"Sample {sample['number'] + 1}{part}: {sample['tokens']} tokens, {sample['learnt']} learnt"


def counted(results: Results) -> list[str]:
    """What was read, cut and left out, a line each."""
    report: dict[str, Any] = dict(results["report"])
    lines = list(results["notes"])
    if isinstance(report.get("forms"), dict):
        lines.append("form: " + ", ".join(f"{name} ({count:,})" for name, count in report["forms"].items()))
        lines.append(f"template: {report['template']}")
    what = "answers" if is_asked(results) else "positions"
    lines.append(
        f"{results['sequences_per_epoch']:,} {what} an epoch, {results['sequences_per_step']} a step, "
        f"{results['steps']:,} steps"
    )
    for name, what in (("duplicates", "copies of others"), ("num_skipped", "skipped"), ("num_set_aside", "set aside")):
        if report.get(name):
            lines.append(f"{what}: {report[name]:,}{_few(report, name)}")
    return lines


def is_asked(results: Results) -> bool:
    """Whether these are prompts, whose answers the model will write itself."""
    return "right" in results["samples"][0]


def _few(report: dict[str, Any], name: str) -> str:
    """The first of what was skipped, with the reason."""
    found = report.get(name.removeprefix("num_")) or []
    if not isinstance(found, list) or not found:
        return ""
    few = "; ".join(f"{one['name']}: {one['reason']}" for one in found[:3])
    return f" ({few}{' ...' if len(found) > 3 else ''})"
