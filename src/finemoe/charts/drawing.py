"""A chart that a notebook shows as a picture, so that nothing has to be fetched for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert

from finemoe.charts.theme import draw
from finemoe.core.errors import ConfigError


@dataclass(frozen=True, repr=False)
class Drawing:
    """Notebooks show it; `chart` is the altair chart itself, to change or to combine."""

    name: str
    chart: Any

    def save(self, path: str | Path) -> None:
        """Write it as a picture.

        Raises:
            ConfigError: neither .svg nor .png.
        """
        path = Path(path)
        drawn = draw(self.chart)
        if path.suffix == ".png":
            path.write_bytes(vl_convert.svg_to_png(drawn, scale=2))
        elif path.suffix == ".svg":
            path.write_text(drawn, encoding="utf-8")
        else:
            raise ConfigError(
                f"{path}: a drawing is saved as .svg or .png; for others take `.chart`, which is altair's"
            )

    def __repr__(self) -> str:
        return f"a drawing of {self.name}; .save('{self.name}.png') writes it"

    def _repr_svg_(self) -> str:
        return draw(self.chart)
