"""What a training run gives back: where it lies, what came out, its metrics as a table, its figures as charts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finemoe.core.config import did_you_mean
from finemoe.core.errors import ConfigError
from finemoe.core.logs import as_html, as_text
from finemoe.training.directory import read_metrics

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

    from finemoe.charts.drawing import Drawing

_SHOWN = ("steps", "tokens", "seconds", "tokens_per_second", "total_parameters", "active_parameters", "max_vio")


@dataclass(frozen=True)
class Run:
    """A training run that ended or was interrupted."""

    directory: Path
    summary: dict[str, Any] = field(repr=False)
    """Contents of summary.json; empty when interrupted."""
    interrupted: bool

    @property
    def metrics(self) -> pa.Table:
        """A row for each step, as metrics.jsonl has them; what was measured after a step stands in its row.

        Figures of validation begin with `validation_`; where none was made they are null. Nested figures, such as the
        load of every expert, are left out. `.to_pandas()` makes a data frame of it where pandas is installed.

        Raises:
            RunError: there is no metrics.jsonl, or it cannot be read.
        """
        import pyarrow as pa

        records = read_metrics(self.directory)
        measured = {record["step"]: record for record in records if record["kind"] == "validation"}
        rows = [
            {**_flat(record), **_flat(measured.get(record["step"], {}), "validation_")}
            for record in records
            if record["kind"] == "step"
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: [row.get(name) for row in rows] for name in names})

    def plot(self, figure: str | None = None) -> Drawing:
        """A figure of the run's page, which notebooks show; `.save("loss.png")` writes it, `.chart` is altair's.

        Args:
            figure: loss (where a model learns from its own answers, reward), balance, load, speed, learning_rate or
                gradient, where there is one. None: the first of them.

        Raises:
            ConfigError: there is no such figure, or none at all yet.
            RunError: the run cannot be read.
        """
        from finemoe.charts.drawing import Drawing
        from finemoe.charts.run.figures import figures
        from finemoe.runs.report import run_results

        made = figures(run_results(self.directory))
        figure = figure or next(iter(made), "loss")
        if figure not in made:
            raise ConfigError(f"plot: there is no figure {figure!r}{did_you_mean(figure, list(made))}")
        return Drawing(figure, made[figure])

    def __str__(self) -> str:
        return as_text(self._table())

    def _repr_html_(self) -> str:
        return as_html(self._table())

    def _table(self) -> Table:
        from rich.table import Table

        from finemoe.charts.numbers import count, fixed

        table = Table(title=str(self.directory), title_justify="left", box=None, show_header=False)
        measured = {key: value for key, value in self.summary.items() if key.startswith("final_")}
        for key, value in measured.items():
            table.add_row(key.removeprefix("final_").replace("_", " "), fixed(value, 4))
        for key in _SHOWN:
            if isinstance(value := self.summary.get(key), int | float):
                table.add_row(key.replace("_", " "), fixed(value, 2) if key == "max_vio" else count(value))
        if self.interrupted:
            table.add_row("interrupted", f"finemoe.resume({str(self.directory)!r}) goes on")
        return table


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Figures of a record, without those that hold others; a prefix is not said twice."""
    return {
        name if name in ("step", "tokens") else prefix + name.removeprefix(prefix): value
        for name, value in record.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }
