"""Rows of results: from samples to a printed table and to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.growth import Growth
from benchmarks.speed.timing import Spread
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100
_SCALES = {  # unit -> (from this size on, divided by, printed as)
    "s": ((1.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (0.0, 1e-6, "µs")),
    "B": ((1e9, 1e9, "GB"), (0.0, 1e6, "MB")),
    "FLOP/s": ((0.0, 1e9, "GF/s"),),
    "B/s": ((1e9, 1e9, "GB/s"), (0.0, 1e6, "MB/s")),
    "tokens/s": ((0.0, 1.0, "t/s"),),
}


@dataclass(frozen=True)
class Measured:
    """What one side showed."""

    name: str
    samples: Sequence[float]
    unit: str = "s"


@dataclass(frozen=True)
class Row:
    """One line: ours beside a peer's, and the figure that a target is set for."""

    key: str
    """Of the part of the benchmark that it belongs to."""
    what: str
    ours: Measured
    peer: Measured | None
    values: Sequence[float]
    """The figure, repetition by repetition; a rate where `of` names a peak of the machine."""
    of: str | None = None
    """The peak whose median, over the whole run, `values` are divided by: `gemm` or `bandwidth`."""
    unit: str = ""
    """Of the figure; none for ratios."""
    higher: bool = False
    """Whether higher is better."""
    target: float | None = None
    stretch: float | None = None
    note: str = ""

    def figure(self, peaks: Mapping[str, Spread]) -> Spread:
        """Median and quartiles of the figure."""
        peak = 1.0 if self.of is None else peaks[self.of].median
        return Spread.of([value / peak for value in self.values])

    def met(self, peaks: Mapping[str, Spread]) -> str:
        """`stretch`, `yes` or `no`; nothing where there is no target."""
        median = self.figure(peaks).median
        for goal, word in ((self.stretch, "stretch"), (self.target, "yes")):
            if goal is not None and (median >= goal if self.higher else median <= goal):
                return word
        return "" if self.target is None else "no"

    def to_dict(self, peaks: Mapping[str, Spread]) -> dict[str, Any]:
        """JSON-able, with every sample."""
        figure = self.figure(peaks)
        return {
            "part": self.key,
            "what": self.what,
            "ours": _side(self.ours),
            "peer": None if self.peer is None else _side(self.peer),
            "figure": {**_spread(figure), "unit": self.unit, "share_of": self.of, "raw": list(self.values)},
            "better": "higher" if self.higher else "lower",
            "target": self.target,
            "stretch": self.stretch,
            "met": self.met(peaks),
            "note": self.note,
        }


def _side(side: Measured) -> dict[str, Any]:
    return {"name": side.name, "unit": side.unit, **_spread(Spread.of(side.samples)), "raw": list(side.samples)}


def _spread(spread: Spread) -> dict[str, Any]:
    return {"median": spread.median, "quartiles": [spread.low, spread.high]}


def quantity(value: float, unit: str) -> str:
    """A number of three digits and its unit."""
    for least, divisor, name in _SCALES[unit]:
        if value >= least:
            scaled = value / divisor
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {name}"
    raise ValueError(f"{value} {unit} is negative")


def _side_text(side: Measured | None) -> str:
    return "" if side is None else quantity(Spread.of(side.samples).median, side.unit)


def _goal(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def table(rows: Sequence[Row], peaks: Mapping[str, Spread]) -> Table:
    """All rows, for `WIDTH` columns."""
    printed = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    printed.add_column("what", no_wrap=True)
    for name in ("ours", "peer", "ratio", "quartiles", "target", "stretch"):
        printed.add_column(name, justify="right", no_wrap=True)
    printed.add_column("met", no_wrap=True)
    before = rows[0].key if rows else ""
    for row in rows:
        if row.key != before:
            printed.add_section()
            before = row.key
        figure = row.figure(peaks)
        printed.add_row(
            row.what,
            _side_text(row.ours),
            _side_text(row.peer),
            f"{figure.median:.2f}{row.unit and ' ' + row.unit}",
            f"{figure.low:.2f}-{figure.high:.2f}",
            _goal(row.target),
            _goal(row.stretch),
            row.met(peaks),
        )
    return printed


def growth_table(growth: Sequence[Growth]) -> Table:
    """The exponents, for `WIDTH` columns."""
    printed = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("time of a token", "grows with", "from", "to"):
        printed.add_column(name, justify="left" if name[0] in "tg" and name != "to" else "right")
    for name in ("exponent", "between neighbours", "FLOPs"):
        printed.add_column(name, justify="right", no_wrap=True)
    for line in growth:
        printed.add_row(
            line.what,
            line.variable,
            str(line.sizes[0]),
            str(line.sizes[-1]),
            f"{line.fit.exponent:.2f}",
            f"{line.fit.low:.2f} to {line.fit.high:.2f}",
            f"{line.flops.exponent:.2f}",
        )
    return printed


def show(
    rows: Sequence[Row], growth: Sequence[Growth], peaks: Mapping[str, Spread], notes: Sequence[str], title: str
) -> None:
    """Print everything on stdout."""
    console = Console(width=WIDTH, highlight=False)
    console.print(title)
    if peaks:
        console.print(
            f"Peaks here and now: torch.mm {_peak(peaks['gemm'], 'FLOP/s')}, "
            f"reading memory {_peak(peaks['bandwidth'], 'B/s')}"
        )
    if rows:
        console.print(table(rows, peaks))
    if growth:
        console.print(growth_table(growth))
    for note in notes:
        console.print(f"- {note}", markup=False)


def _peak(spread: Spread, unit: str) -> str:
    low, high = (quantity(value, unit).split()[0] for value in (spread.low, spread.high))
    return f"{quantity(spread.median, unit)} ({low} to {high})"
