"""One HTML file that opens offline: text, tables and interactive charts, with the chart library inside.

A page is a list of `Section`s made of the blocks below; `templates/` lays them out, for every report alike. Everything
handed in is untrusted text: jinja2 escapes it, data for scripts travels as escaped JSON, and the page's content policy
runs only the scripts whose hashes it names and forbids every connection.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
    wrap: bool = False
    """Cells are sentences: break them, the first column's too."""
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
class Marked:
    """Text kept as typed, some of it marked."""

    pieces: Sequence[tuple[str, bool]]
    label: str
    kind: ClassVar[str] = "marked"


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
class Widget:
    """Something to search or click through, made by a script that lies beside the report's page.

    The script is the body of a function of `root`, an empty element, and `data`; it runs once for each widget. It must
    put text into the page as text (`textContent`), never as HTML. When it throws, the page says so in its place.
    """

    files: Path
    """The script without its ending: FILES.js, and FILES.css with what it looks like."""
    data: Any
    """Values for JSON."""
    label: str
    """What it is, for those who cannot see it."""
    kind: ClassVar[str] = "widget"

    @property
    def name(self) -> str:
        """What the page calls its maker."""
        return self.files.name


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    heading: str
    blocks: Sequence[Any] = field(default_factory=tuple)


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    banner: str = "",
    footer: str = "",
    refresh: int | None = None,
) -> str:
    """The page as one HTML document.

    Args:
        title: heading and window title.
        sections: in reading order; with four or more the page begins with links to them.
        subtitle: one line under the title.
        banner: a warning above everything, such as that results are incomplete.
        footer: one line at the end.
        refresh: seconds after which a browser opens the file again; never when None.
    """
    charts: list[dict[str, Any]] = []
    found = list(_every(block for section in sections for block in section.blocks))
    widgets = [block for block in found if isinstance(block, Widget)]
    makers = tuple(dict.fromkeys(widget.files for widget in widgets))

    def place(chart: Any, caption: str) -> int:
        charts.append(_fluid(theme.spec(chart), caption))
        return len(charts) - 1

    def after_body() -> dict[str, Any]:
        """Called at the end of the template, when every chart has been placed."""
        return clean({"charts": charts, "config": {"light": theme.config("light"), "dark": theme.config("dark")}})

    has_charts = any(isinstance(block, Figure) and block.charts for block in found)
    scripts = [_bundle(), _template_text("page.js")] if has_charts else []
    if makers:
        scripts.append(_widget_script(makers))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            sections=sections,
            subtitle=subtitle,
            banner=banner,
            footer=footer,
            refresh=refresh,
            place=place,
            place_widget=widgets.index,
            chart_data=after_body,
            has_charts=has_charts,
            widget_data=clean([widget.data for widget in widgets]),
            style=Markup("\n".join((_template_text("page.css"), *(_text(files, ".css") for files in makers)))),
            scripts=[Markup(script) for script in scripts],
            policy=Markup(_policy(scripts, compiles=has_charts)),
        )
    )


def _every(blocks: Iterable[Any]) -> Iterator[Any]:
    """The blocks and those inside of others."""
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from _every(block.blocks)


def _widget_script(makers: Sequence[Path]) -> str:
    """One script that makes every widget; what the makers declare stays inside of them."""
    made = ",\n".join(f'"{files.name}"(root, data) {{\n' + _text(files, ".js") + "\n}" for files in makers)
    return _template_text("widgets.js").replace("/* makers */", made)


def _fluid(spec: dict[str, Any], caption: str) -> dict[str, Any]:
    """As wide as its column. Concatenated views cannot be (Vega-Lite), so they keep their width and scroll."""
    spec.setdefault("description", caption)
    if not {"hconcat", "vconcat", "concat", "facet"} & set(spec):
        spec["width"] = "container"
    return spec


def _policy(scripts: Sequence[str], *, compiles: bool) -> str:
    """Nothing may load, connect or be sent; only `scripts` run. Vega compiles its expressions, hence unsafe-eval."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join([*(f"'sha256-{digest}'" for digest in hashes), *(["'unsafe-eval'"] if compiles else [])])
    allowed = allowed or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
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
def _text(files: Path, ending: str) -> str:
    return files.with_suffix(ending).read_text(encoding="utf-8").strip()


@functools.cache
def _template_text(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0].strip()
