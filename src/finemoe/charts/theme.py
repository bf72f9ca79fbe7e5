"""One look for every figure: sizes, colours for light and dark pages, and an identity for each arm.

Charts carry no colours of their own: the configuration made here does, so that a page can draw the same specification
on light or on dark paper. An arm is told by colour, by dash or marker, and by a direct label, never by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import altair as alt
import vl_convert

from finemoe.charts.numbers import clean, finite

Scheme = Literal["light", "dark"]
FONT = "system-ui, Helvetica, Arial, sans-serif"
WIDTH = 680  # of a saved figure, in pixels; a page stretches the figure to its column

# Okabe-Ito, moved just far enough that each colour has a contrast of 3 or more with its paper (their yellow and sky
# blue vanish on white, their black on dark) and that pairs stay apart for deuteranopes and protanopes.
PALETTES: Mapping[Scheme, Sequence[str]] = {
    "light": ("#5b626c", "#db7e00", "#2f93cd", "#009e73", "#da3a01", "#0060a0", "#c868a0", "#837711"),
    "dark": ("#c2cbd7", "#e49e00", "#5bb4eb", "#2ab17e", "#de6a38", "#5b8def", "#c77fab", "#fff050"),
}
PAPERS: Mapping[Scheme, str] = {"light": "#ffffff", "dark": "#15181c"}
_INKS: Mapping[Scheme, str] = {"light": "#20242a", "dark": "#e4e7eb"}
_SOFT: Mapping[Scheme, str] = {"light": "#5a616b", "dark": "#a4acb6"}
_GRID: Mapping[Scheme, str] = {"light": "#e4e7ea", "dark": "#2e343b"}
# Below, at and above the uniform load. The middle is the paper, so that what is balanced recedes.
_DIVERGING: Mapping[Scheme, Sequence[str]] = {
    "light": ("#1d4f91", "#7fb0dc", "#f3f3f1", "#f0a45c", "#9c3a00"),
    "dark": ("#8cc4ff", "#3f78b8", "#2a2f35", "#c9722a", "#ffc48a"),
}

DASHES = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3), (16, 3), (9, 2, 2, 2, 2, 2))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")


def config(scheme: Scheme) -> dict[str, Any]:
    """The Vega-Lite configuration for light or dark paper; the background stays transparent."""
    ink, soft, grid = _INKS[scheme], _SOFT[scheme], _GRID[scheme]
    return {
        "background": "transparent",
        "font": FONT,
        "aria": False,  # one description a figure reads better than an announcement for each of its thousand marks
        "view": {"stroke": None},
        "axis": {
            "labelColor": ink, "titleColor": soft, "gridColor": grid, "domainColor": soft, "tickColor": soft,
            "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, "labelPadding": 4,
        },
        "legend": {"labelColor": ink, "titleColor": soft, "labelFontSize": 12, "titleFontSize": 12,
                   "titleFontWeight": "normal", "titleLimit": 320, "symbolBaseFillColor": ink,
                   "symbolBaseStrokeColor": ink},
        "title": {"color": ink, "subtitleColor": soft, "fontSize": 14, "subtitleFontSize": 12, "anchor": "start",
                  "fontWeight": 600},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": soft},
        "mark": {"color": ink},
        "range": {"category": list(PALETTES[scheme]), "diverging": list(_DIVERGING[scheme])},
    }  # fmt: skip


def arm_dashes(count: int) -> list[list[int]]:
    """Dash patterns for `count` arms: shifted by one each time the colours start again, so that no pair returns."""
    return [list(DASHES[_shifted(index) % len(DASHES)]) for index in range(count)]


def arm_shapes(count: int) -> list[str]:
    """Marker shapes for `count` arms, shifted like the dashes."""
    return [SHAPES[_shifted(index) % len(SHAPES)] for index in range(count)]


def _shifted(index: int) -> int:
    return index + index // len(PALETTES["light"])


def arm_color(names: Sequence[str]) -> alt.Color:
    """Colour by the field `arm`, in the order of `names`; which colours is the scheme's affair."""
    return alt.Color("arm:N", scale=alt.Scale(domain=list(names)), legend=None)


def arm_dash(names: Sequence[str]) -> alt.StrokeDash:
    """Line dash by the field `arm`, in the order of `names`."""
    scale = alt.Scale(domain=list(names), range=arm_dashes(len(names)))
    return alt.StrokeDash("arm:N", scale=scale, legend=None)


def arm_shape(names: Sequence[str]) -> alt.Shape:
    """Marker by the field `arm`, in the order of `names`."""
    return alt.Shape("arm:N", scale=alt.Scale(domain=list(names), range=arm_shapes(len(names))), legend=None)


FEW_TICKS = alt.Axis(tickCount=6, grid=True, labelOverlap="parity", labelSeparation=6, labelFlush=False)
HOTTEST = 4.0
"""A load of four times even or more has the last colour: a hotter outlier would flatten the rest."""


def expert_ticks(experts: int) -> list[int]:
    """Numbers of the experts that have a label on an axis: evenly, and at most seventeen of up to a thousand."""
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64) if experts <= 17 * step or step == 64)
    return list(range(0, experts, every))


def load_color(field: str, top: float, title: str, *, length: int = 220, legend: bool = True) -> alt.Color:
    """Colours of a load relative to an even one: 1 has the paper's, `top` and beyond the last."""
    scale = alt.Scale(domain=[0, top], domainMid=1, clamp=True, interpolate="lab")
    shown = alt.Legend(title=title, orient="top", gradientLength=length, values=[0, 1, *range(2, int(top) + 1)])
    return alt.Color(field, scale=scale, legend=shown if legend else None)


def decided_dots(marks: Any, x: alt.X, y: alt.Y, **more: Any) -> list[Any]:
    """A marker for each pair by the field `decided`: filled where the pair is decided, hollow where it is not."""
    return [
        marks.transform_filter(f"datum.decided === '{decided}'")
        .mark_point(size=80, filled=filled, opacity=1, strokeWidth=2, yOffset=8)
        .encode(x, y, **more)
        for decided, filled in (("decided", True), ("undecided", False))
    ]


CERTAIN = ("decided", "undecided")
"""Whether an interval leaves out 0."""


def certain(low: Any, high: Any) -> str:
    """The word of `CERTAIN` for an effect with this interval; undecided where there is none."""
    lowest, highest = finite(low), finite(high)
    return CERTAIN[lowest is None or highest is None or lowest <= 0 <= highest]


def fade() -> alt.Opacity:
    """Cells of a map by the field `certain`: what is undecided is faded, lest its colour be read as a finding."""
    legend = alt.Legend(title=None, orient="top", symbolType="square", symbolSize=160, symbolStrokeWidth=0)
    return alt.Opacity("certain:O", scale=alt.Scale(domain=list(CERTAIN), range=[1, 0.3]), legend=legend)


def base(records: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A chart over plain records. NaN and infinities become null, which JSON can say and Vega leaves out."""
    return alt.Chart(alt.InlineData(values=[clean(record) for record in records]))


def spec(chart: Any, scheme: Scheme | None = None) -> dict[str, Any]:
    """The Vega-Lite specification of `chart`, with the configuration of `scheme`, or none for a page to fill in."""
    with alt.data_transformers.enable("default", max_rows=None):  # 12 arms x 28 layers x 64 experts are past 5000
        made: dict[str, Any] = chart.to_dict()
    made.pop("config", None)
    if scheme is not None:
        made["config"] = config(scheme) | {"background": PAPERS[scheme]}
    return made


def draw(chart: Any, scheme: Scheme = "light") -> str:
    """The chart as SVG, on opaque paper."""
    made = spec(chart, scheme)
    made["padding"] = made.get("padding", 12)
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    drawn: str = vl_convert.vegalite_to_svg(made, vl_version=version)
    return drawn


def save(charts: Mapping[str, Any], folder: Path, scheme: Scheme = "light") -> list[Path]:
    """Write NAME.svg and NAME.png (twice the pixels) for each chart, on opaque paper; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, chart in charts.items():
        svg, png = folder / f"{name}.svg", folder / f"{name}.png"
        drawn = draw(chart, scheme)
        svg.write_text(drawn, encoding="utf-8")
        png.write_bytes(vl_convert.svg_to_png(drawn, scale=2))
        paths += [svg, png]
    return paths
