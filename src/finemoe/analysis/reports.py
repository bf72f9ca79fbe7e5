"""The reports on a model: each function opens it, reads text, measures and, with `out`, writes the whole folder.

`finemoe analyze VERB` calls the function of its name and prints a table; `trace` is a verb of its own, and writes a
file. For a model or text that is in memory already, the parts are in the modules beside this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finemoe.analysis import load as loads
from finemoe.analysis.cards import expert_cards
from finemoe.analysis.difference import pair, routing_difference
from finemoe.analysis.knockout import DEFAULT_PAIRS, check_names, moe_configs, run_experiments
from finemoe.analysis.load import Tally, save_pairs, study_load
from finemoe.analysis.passages import ReadAs, observe, read_passages, require_experts
from finemoe.analysis.placement import placement
from finemoe.analysis.provenance import made_by, provenance
from finemoe.analysis.relevance import expert_relevance, relevance_results, sample_length, select_experts
from finemoe.analysis.trace import require_new_file, trace_info, write_trace
from finemoe.charts.report import require_report_folder, write_report
from finemoe.checkpoint.language_model import open_language_model
from finemoe.checkpoint.selection import Score, require_place, write_selection
from finemoe.core.config import did_you_mean
from finemoe.core.errors import ConfigError
from finemoe.training.alerts import routed_layers

Source = str | os.PathLike[str]
"""A run directory or one checkpoint in it, an imported or Hugging Face folder, or a GGUF file."""


def load(
    models: Sequence[Source],
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 16_384,
    length: int | None = None,
    rows: int = 8,
    last: bool = False,
    out: Source | None = None,
) -> dict[str, Any]:
    """How evenly the experts are used, by layer and domain, together, and over the checkpoints of a run.

    Args:
        models: a series, oldest first; a run stands for all its checkpoints. All read the same text.
        texts, corpora, tokens, length: what is read, as in `read_passages`.
        rows: windows in one forward pass.
        last: of a run only the newest checkpoint.
        out: folder for the report; together.npz in it counts the pairs of experts.

    Returns:
        What results.json holds, as of every function here.

    Raises:
        FinemoeError: a dense model, nothing to open or to read, or a folder that holds something else.
    """
    folder = require_report_folder(out, "load")
    study = study_load(
        [Path(model) for model in models],
        texts=texts, corpora=corpora, tokens=tokens, length=length, rows=rows, last=last,
    )  # fmt: skip
    results = {**study.results, **made_by()}
    if folder is not None:
        from finemoe.charts.load.figures import figures
        from finemoe.charts.load.page import load_page

        write_report(folder, results, load_page, figures)
        save_pairs(folder / "together.npz", study.last)
    return results


def knockout(
    model: Source,
    experiments: Sequence[str] | None = None,
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 4096,
    length: int | None = None,
    rows: int = 4,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    pairs: int = DEFAULT_PAIRS,
    out: Source | None = None,
) -> dict[str, Any]:
    """What the model loses without some of its experts. Ctrl-C keeps the experiments that are finished.

    Args:
        model: what to open.
        experiments, layers, experts, pairs: as in `run_experiments`.
        texts, corpora, tokens, length: what is read, as in `read_passages`.
        rows: windows in one forward pass.
        out: folder for the report; nothing is written where no experiment was finished.

    Raises:
        FinemoeError: a dense model, an unknown name, layer or expert, or a folder that holds something else.
    """
    folder = require_report_folder(out, "knockout")
    check_names(experiments)
    opened = open_language_model(model)
    moe_configs(opened)
    passages = read_passages(opened, texts=texts, corpora=corpora, tokens=tokens, length=length)
    found = run_experiments(opened, passages, experiments, rows=rows, layers=layers, experts=experts, pairs=pairs)
    results = {**provenance("knockout", opened, passages), **found}
    if folder is not None and found["experiments"]:
        from finemoe.charts.knockout.figures import figures
        from finemoe.charts.knockout.page import knockout_page

        write_report(folder, results, knockout_page, figures)
    return results


def experts(
    model: Source,
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 16_384,
    length: int | None = None,
    rows: int = 8,
    stability: bool = True,
    out: Source | None = None,
) -> dict[str, Any]:
    """A card for every routed expert: what it takes, how special that is, and who is near it.

    Args:
        model: what to open.
        texts, corpora, tokens, length: what is read, as in `read_passages`.
        rows: windows in one forward pass.
        stability: compare with the earlier checkpoints of its run.
        out: folder for the report.

    Raises:
        FinemoeError: a dense model, or a folder that holds something else.
    """
    folder = require_report_folder(out, "experts")
    opened = open_language_model(model)
    require_experts(opened)
    passages = read_passages(opened, texts=texts, corpora=corpora, tokens=tokens, length=length)
    found = expert_cards(opened, passages, rows=rows, stability=stability)
    results = {**provenance("experts", opened, passages), **found}
    if folder is not None:
        from finemoe.charts.cards.figures import figures
        from finemoe.charts.cards.page import cards_page

        write_report(folder, results, cards_page, figures)
    return results


def difference(
    before: Source,
    after: Source,
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 16_384,
    length: int | None = None,
    rows: int = 8,
    out: Source | None = None,
) -> dict[str, Any]:
    """Which choices of experts changed from one checkpoint to another, why, and what became of load and loss.

    Args:
        before, after: what to open.
        texts, corpora, tokens, length: what both read, as in `read_passages`.
        rows: windows in one forward pass.
        out: folder for the report.

    Raises:
        FinemoeError: two models that cannot be compared, or a folder that holds something else.
    """
    folder = require_report_folder(out, "difference")
    first, second = open_language_model(before), open_language_model(after)
    pair(first, second)  # what cannot be compared is said before any text is read
    passages = read_passages(first, texts=texts, corpora=corpora, tokens=tokens, length=length)
    found = routing_difference(first, second, passages, rows=rows)
    head = provenance("difference", first, passages)
    results = {**head, "before": str(before), "after": str(after), **found}
    if folder is not None:
        from finemoe.charts.difference.figures import figures
        from finemoe.charts.difference.page import difference_page

        write_report(folder, results, difference_page, figures)
    return results


def relevance(
    model: Source,
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    score: Score = "gate",
    p: float | None = None,
    tokens: int = 131_072,
    length: int | None = None,
    rows: int = 4,
    selection: Source | None = None,
    out: Source | None = None,
) -> dict[str, Any]:
    """Which experts a task needs (ESFT): the fewest of each layer whose relevance reaches `p`.

    Args:
        model: what to open.
        texts, corpora, tokens: the task's text, as in `read_passages`.
        score, p: as in `select_experts`.
        length: tokens of a sample; the model's own length, at most the paper's, when None.
        rows: samples in one forward pass.
        selection: file for the selection, which expert tuning reads; only an older selection is written over.
        out: folder for the report.

    Raises:
        FinemoeError: a dense model, an impossible `p`, or a folder or file that holds something else.
    """
    folder = require_report_folder(out, "relevance")
    if selection is not None:
        require_place(Path(selection))
    opened = open_language_model(model)
    require_experts(opened)
    size = sample_length(opened) if length is None else length
    passages = read_passages(opened, texts=texts, corpora=corpora, tokens=tokens, length=size)
    found = expert_relevance(opened, passages, rows=rows)
    selected = select_experts(opened, found, score, p)
    results = {**provenance("relevance", opened, passages), **relevance_results(found, selected)}
    if selection is not None:
        write_selection(Path(selection), selected)
    if folder is not None:
        from finemoe.charts.relevance.figures import figures
        from finemoe.charts.relevance.page import relevance_page

        write_report(folder, results, relevance_page, figures)
    return results


REPORTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "load": load,
    "knockout": knockout,
    "experts": experts,
    "difference": difference,
    "relevance": relevance,
    "placement": placement,
}
"""By the name of the verb: `finemoe analyze NAME`."""


def trace(
    model: Source,
    out: Source,
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 16_384,
    length: int | None = None,
    rows: int = 8,
    summary: bool = True,
) -> dict[str, Any]:
    """Where every token goes, written to a Parquet file of one row for each token and MoE layer (`analysis.trace`).

    Args:
        model: what to open.
        out: the file; it must not exist, and has its name only once it is whole.
        texts, corpora, tokens, length: what is read, as in `read_passages`.
        rows: windows in one forward pass.
        summary: count loads on the way.

    Returns:
        `file`, `rows`, `bytes`, `tokens` of each domain, and with `summary` the loads and losses.

    Raises:
        FinemoeError: a dense model, nothing to read, or a file that is there.
    """
    path = Path(out)
    require_new_file(path)
    opened = open_language_model(model)
    require_experts(opened)
    passages = read_passages(opened, texts=texts, corpora=corpora, tokens=tokens, length=length)
    counted = Tally(routed_layers(opened.model.config), pairs=False)
    about = made_by()
    observed = observe(opened, passages, rows=rows, description="tracing")
    for one in write_trace(path, opened, passages, observed, about):
        if summary:
            counted.add(one)
    info = trace_info(path)
    results: dict[str, Any] = {
        "kind": "trace", "schema": info.metadata["version"], "file": str(path), "rows": info.rows,
        "bytes": path.stat().st_size, "tokens": info.metadata["domains"], "model": str(model), **about,
    }  # fmt: skip
    return {**results, "summary": loads.figures(opened, counted)} if summary else results


def analyze(report: str, *models: Source, **options: Any) -> dict[str, Any]:
    """One of REPORTS by its name, as on the command line: `analyze("experts", "runs/tiny", out="experts")`.

    Args:
        report: load, knockout, experts, difference, relevance or placement.
        models: what to open: one; of load one or more, of difference two; of placement the folder of a load.
        options: as in the function of that name.

    Raises:
        ConfigError: no such report, or another number of models.
        FinemoeError: as in the function of that name.
    """
    if report not in REPORTS:
        raise ConfigError(f"analyze: no report is called {report!r}{did_you_mean(report, list(REPORTS))}")
    wanted = {"difference": 2, "load": max(1, len(models))}.get(report, 1)
    if len(models) != wanted:
        raise ConfigError(f"analyze({report!r}): needs {wanted} model{'s' * (wanted > 1)}, got {len(models)}")
    return load(models, **options) if report == "load" else REPORTS[report](*models, **options)
