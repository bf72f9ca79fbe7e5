"""Where a run stands, in plain sentences."""

from __future__ import annotations

from finemoe.charts.numbers import Results, count, duration, finite, fixed

_CALM = ("recovered", "note")
"""Levels of what is told in the list of alerts, and is none."""


def state(results: Results) -> str:
    """`finished`, `failed`, `training` while a process is at work there, or `stopped`."""
    if results["finished"]:
        return "finished"
    return "training" if results["running"] else "failed" if results["failure"] else "stopped"


def summary(results: Results) -> list[str]:
    """How far, how good, how fast, and what is left: a handful of sentences."""
    steps, validations = results["steps"], results["validations"]
    if not steps:
        return ["No step is done yet."]
    last = steps[-1]
    lines = [_how_far(results)]
    if validations and finite(validations[-1].get("validation_loss")) is None:
        first, newest = validations[0], validations[-1]
        said = f"Reward of held-out questions {fixed(newest.get('validation_reward'))} at step {newest['step']:,}"
        lines.append(f"{said}; it was {fixed(first.get('validation_reward'))} at step {first['step']:,}.")
    elif validations:
        best = min(validations, key=lambda one: finite(one.get("validation_loss")) or float("inf"))
        newest = validations[-1]
        lines.append(
            f"Validation loss {fixed(newest.get('validation_loss'))} nats per token at step {newest['step']:,}"
            + ("." if best is newest else f"; the lowest was {fixed(best.get('validation_loss'))} at {best['step']:,}.")
        )
    if state(results) in ("training", "stopped"):
        left = _left(results) * last["seconds"]
        lines.append(f"About {duration(left)} of training left at the speed so far.")
    if failure := results["failure"]:
        lines.append(f"It stopped: {failure.get('message')}")
    alarming = [alert for alert in results["alerts"] if alert.get("level") not in _CALM]
    said = "1 alert" if len(alarming) == 1 else f"{len(alarming)} alerts"
    about = " about its experts" if all(alert.get("kind") == "alert" for alert in alarming) else ""
    calm = len(results["alerts"]) - len(alarming)
    notes = f"No alerts; {'one note' if calm == 1 else f'{calm} notes'} below." if calm else "No alerts."
    lines.append(f"{said}{about}: see below." if alarming else notes)
    return lines


def _how_far(results: Results) -> str:
    last, total, most = results["steps"][-1], results["total_steps"], results.get("max_tokens")
    done = f"{count(last['tokens'])} tokens in {duration(last['seconds'])}"
    if most is None:
        return f"Step {last['step']:,} of {total:,}, {done}."
    if last["tokens"] < most:
        return f"Step {last['step']:,} of at most {total:,}, {done}; it ends with {count(most)} tokens."
    return f"Step {last['step']:,} of at most {total:,}, {done}: it has read the {count(most)} that it may."


def _left(results: Results) -> float:
    """What is left to train, as a multiple of what was trained: of steps, or of tokens where those end it sooner."""
    last, most = results["steps"][-1], results.get("max_tokens")
    left = results["total_steps"] / last["step"] - 1
    return left if most is None or not last["tokens"] else max(0.0, min(left, most / last["tokens"] - 1))
