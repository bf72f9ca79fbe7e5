"""What a plan says, in plain sentences: shared by the page and the terminal."""

from __future__ import annotations

from finemoe.charts.numbers import Results, count, duration, fixed

GIB = 1 << 30


def gib(value: float) -> str:
    """12.3 GiB."""
    return f"{value / GIB:,.1f} GiB" if value >= 0.1 * GIB else f"{value / (1 << 20):,.1f} MiB"


def uneven(row: Results) -> str:
    """Memory of a ranked layout at MaxVio 1, and whether that is too much."""
    return gib(row["memory_uneven"]) + ("" if row["fits_uneven"] else ", too much")


def moved(value: float) -> str:
    """Bytes that travel, in the units of links: 12.3 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def span(interval: Results, factor: float = 1.0) -> str:
    """`2.45M (2.13M to 5.06M)`."""
    values = (interval[key] * factor for key in ("value", "low", "high"))
    value, low, high = (count(number) if number >= 10 else fixed(number, 2) for number in values)
    return f"{value} ({low} to {high})"


def device_time(hours: Results) -> str:
    """`2.45M (2.13M to 5.06M) device-hours`; small ones in minutes or seconds, since 0.00 hours say nothing."""
    units = (("hours", 1), ("minutes", 60), ("seconds", 3600))
    unit, factor = next((one for one in units if hours["value"] * one[1] >= 1), units[-1])
    return f"{span(hours, factor)} device-{unit}"


def took(value: float) -> str:
    """22 s, and below one 120 ms."""
    return duration(value) if value >= 1 else f"{1000 * value:.3g} ms"


def seconds(interval: Results) -> str:
    """`22 s (19 s to 45 s)`."""
    return f"{took(interval['value'])} ({took(interval['low'])} to {took(interval['high'])})"


def summary(results: Results) -> list[str]:
    """Sentences: does it fit, how long, how sure."""
    memory, step = results["memory"], results["step"]
    peak, uneven = memory["peak"]["total"], memory["uneven"]["total"]
    fits = "fits" if memory["fits"] else "does not fit"
    lines = [
        f"{results['model']} on {results['on']}, {results['layout']}, with "
        f"{results['batch']}: it {fits}. The rank "
        f"that takes most needs {gib(peak)} of {gib(memory['available'])} with evenly used experts (MaxVio 0), and "
        f"{gib(uneven)} where a process's experts receive twice their share (MaxVio 1)"
        + ("." if memory["fits_uneven"] or not memory["fits"] else ", which does not fit: watch the balance."),
        f"A step of {count(results['tokens_per_step'])} tokens takes {seconds(step['seconds'])}, "
        f"{count(results['tokens_per_second']['value'])} tokens a second and device, "
        f"{fixed(100 * results['utilisation'], 1)} % of its peak; {fixed(100 * step['bubble'], 1)} % is bubble.",
    ]
    if results["refused"] is not None:
        lines.insert(1, f"This is a plan of others' software: finemoe does not train like that. {results['refused']}.")
    if results["device_hours"] is not None:
        lines.append(f"{count(results['tokens'])} tokens: {device_time(results['device_hours'])}.")
    return [*lines, *results["notes"], certainty(results)]


def certainty(results: Results) -> str:
    """Where the times come from, and how wrong they have been."""
    calibration = results["calibration"]
    errors = calibration["errors"]
    if results["device"]["family"] == "here":
        return (
            "Times by what this machine reached just now, and constants of a bare loop with torch's kernels. Four of "
            "five steps of `finemoe train` with its own kernels lay in the interval, on a processor that nothing was "
            "fitted on; `finemoe train RECIPE --check` measures a step of yours."
        )
    return (
        f"Times: {calibration['is']}. On {errors['points']} published runs of {results['device']['family']} devices "
        f"that had no part in the fit the median error is {fixed(100 * errors['median'], 1)} %, the worst "
        f"{fixed(100 * errors['worst'], 0)} % ({errors['worst_point']}); four of five lie in the interval."
    )
