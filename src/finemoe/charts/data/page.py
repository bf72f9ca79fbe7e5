"""The page of what a recipe trains on: samples with the learnt tokens marked, counts, lengths."""

from __future__ import annotations

from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.data.words import counted, is_asked, title_of
from finemoe.charts.numbers import Results, clean
from finemoe.charts.page import Bullets, Figure, Marked, Section, Text, render_page
from finemoe.charts.words import footer


def figures(results: Results) -> dict[str, Any]:
    """How long the samples are."""
    return {"lengths": lengths_chart(results)}


def lengths_chart(results: Results) -> Any:
    """A histogram of tokens a sample."""
    rows = [{"tokens": length} for length in results["lengths"]]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("tokens:Q", bin=alt.Bin(maxbins=30), title="Tokens"),
            y=alt.Y("count():Q", title="Samples"),
            tooltip=[alt.Tooltip("count():Q", title="Samples")],
        )
        .properties(width=theme.WIDTH, height=180)
    )


def data_page(results: Results) -> str:
    """The whole page as one self-contained HTML document."""
    results = clean(results)
    shown: list[Any] = []
    for sample in results["samples"]:
        pieces = [(piece["text"], bool(piece["learnt"])) for piece in sample["pieces"]]
        shown += [Text([title_of(sample)]), Marked(pieces, title_of(sample))]
    said = "As the model reads them, in the order of training. What is marked is learnt; the rest is only read."
    if is_asked(results):
        said = "As the model is asked, in the order of training. What it learns are its own answers."
    what = "prompts" if is_asked(results) else "samples"
    caption = f"Tokens of each of the first {len(results['lengths']):,} {what}."
    return render_page(
        f"{results['name']}: what it trains on",
        [
            Section("What there is", [Bullets(counted(results)), Figure([lengths_chart(results)], caption)]),
            Section(what.capitalize(), [Text([said]), *shown]),
        ],
        subtitle=f"method {results['method']}, sequences of {results['sequence_length']} tokens",
        footer=footer(None),
    )
