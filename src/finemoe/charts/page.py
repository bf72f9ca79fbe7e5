"""One HTML file that opens offline: text, tables and interactive charts, with the chart library inside.

A page is a list of `Section`s made of the blocks below; `templates/` lays them out. Everything handed in is untrusted
text: jinja2 escapes it, chart data travels as escaped JSON, and the page's content policy runs only the two scripts
whose hashes it names and forbids every connection.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jinja2
import vl_convert
from markupsafe import Markup

from finemoe.charts import theme
from finemoe.charts.numbers import clean


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: Sequence[str]
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Bullets:
    """An unordered list."""

    items: Sequence[str]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Table:
    """Rows of ready text. The first cell of a row is its header; `numeric` columns, by index, align right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    note: str = ""
    strong: Sequence[int] = ()
    """Indices of rows to stress."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """One chart, or several side by side where there is room; a chart without its own `description` takes `caption`."""

    charts: Sequence[Any]
    caption: str
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Code:
    """Text kept as typed, with a label for those who cannot see it."""

    text: str
    label: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Card:
    """A titled piece of text."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """Texts side by side, for comparison by eye."""

    cards: Sequence[Card]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that unfolds."""

    summary: str
    blocks: Sequence[Any]
    kind: ClassVar[str] = "details"


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    heading: str
    blocks: Sequence[Any] = field(default_factory=tuple)


def render_page(
    title: str, sections: Sequence[Section], *, subtitle: str = "", banner: str = "", footer: str = ""
) -> str:
    """The page as one HTML document.

    Args:
        title: heading and window title.
        sections: in reading order; with four or more the page begins with links to them.
        subtitle: one line under the title.
        banner: a warning above everything, such as that results are incomplete.
        footer: one line at the end.
    """
    charts: list[dict[str, Any]] = []

    def place(chart: Any, caption: str) -> int:
        charts.append(_fluid(theme.spec(chart), caption))
        return len(charts) - 1

    def after_body() -> dict[str, Any]:
        """Called at the end of the template, when every chart has been placed."""
        return clean({"charts": charts, "config": {"light": theme.config("light"), "dark": theme.config("dark")}})

    boot = _template_text("page.js")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            sections=sections,
            subtitle=subtitle,
            banner=banner,
            footer=footer,
            place=place,
            chart_data=after_body,
            has_charts=any(map(_has_chart, (block for section in sections for block in section.blocks))),
            style=Markup(_template_text("page.css")),
            bundle=Markup(_bundle()),
            boot=Markup(boot),
            policy=Markup(_policy(_bundle(), boot)),
        )
    )


def _has_chart(block: Any) -> bool:
    if isinstance(block, Details):
        return any(map(_has_chart, block.blocks))
    return isinstance(block, Figure) and bool(block.charts)


def _fluid(spec: dict[str, Any], caption: str) -> dict[str, Any]:
    """As wide as its column. Concatenated views cannot be (Vega-Lite), so they keep their width and scroll."""
    spec.setdefault("description", caption)
    if not {"hconcat", "vconcat", "concat", "facet"} & set(spec):
        spec["width"] = "container"
    return spec


def _policy(*scripts: str) -> str:
    """Nothing may load, connect or be sent; only `scripts` run. Vega compiles its expressions, hence unsafe-eval."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that can stand between script tags."""
    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return bundle.replace("\r\n", "\n").replace("</script", "<\\/script").strip()


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("finemoe.charts", "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@functools.cache
def _template_text(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0].strip()
