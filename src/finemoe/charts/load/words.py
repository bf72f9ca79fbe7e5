"""What the load of the experts says, in plain sentences: shared by the page and the terminal."""

from __future__ import annotations

from finemoe.charts.numbers import Results, fixed


def summary(results: Results) -> list[str]:
    """Sentences about the last model and what it says of collapse."""
    last = results["series"][-1]
    worst = max(last["layers"], key=lambda number: last["layers"][number]["max_vio"])
    lines = [
        f"{last['name']}: MaxVio {fixed(last['max_vio'], 2)} over all the text and {fixed(last['max_vio_batch'], 2)} "
        f"in a batch (mean of {len(last['layers'])} layers), highest in layer {worst} "
        f"({fixed(last['layers'][worst]['max_vio'], 2)}).",
        f"{last['dead']} of {last['experts']} experts got no token at all, {last['starved']} less than a tenth of the "
        "even share.",
    ]
    if not last["enough"]:
        lines.append("Too little text to say whether the experts are used: an even load would give each fewer than 50.")
    elif not last["alerts"]:
        lines.append("Nothing to worry about: no layer has stopped using its experts.")
    return lines + [alert["message"] for alert in last["alerts"]]
