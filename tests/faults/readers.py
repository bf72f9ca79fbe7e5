"""Everything of finemoe that reads files it wrote, in this process, and small sound ones to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finemoe.analysis.load import history, stages
from finemoe.analysis.passages import observe, read_passages
from finemoe.analysis.trace import read_trace, trace_info, write_trace
from finemoe.charts.run.figures import figures
from finemoe.charts.run.page import run_page
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.checkpoint.open import load_chat_template, load_model, load_tokenizer, read_model_config
from finemoe.checkpoint.selection import ExpertSelection, LayerSelection, read_selection, shape_of, write_selection
from finemoe.cli import runs, show
from finemoe.core.config import parse
from finemoe.data import DataConfig, prepare
from finemoe.evaluation.runner import Answers
from finemoe.evaluation.task import Generated, Scored
from finemoe.model.config import Kernels
from finemoe.runs.calibration import choose
from finemoe.runs.config import read_config
from finemoe.runs.listing import list_runs
from finemoe.runs.report import run_results
from finemoe.runs.result import Run
from finemoe.runs.run import resume, train
from finemoe.studies import compare as compare_module
from finemoe.studies.fleet import Job, _newest
from runs.tiny_runs import recipe

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Subject:
    """Sound files of one kind, and what reads them."""

    name: str
    home: Path
    reads: Mapping[str, Read]
    """By name. Each is given a copy of `home` with one damaged file."""
    writes: frozenset[str] = frozenset()
    """Those that may change files."""
    share: int = 1
    """How often it is drawn."""


def run_subject(corpus: Path, folder: Path) -> Subject:
    """A finished run of six steps with two checkpoints."""
    train(recipe(corpus), out=folder / "run", quiet=True)
    reads: dict[str, Read] = {
        "show": lambda run: show._print_table({str(run): show._summary(run)}),
        "load_model": load_model,
        "load_tokenizer": load_tokenizer,
        "chat template": load_chat_template,
        "open": open_language_model,
        "doctor": lambda run: examine(run, deep=True),
        "doctor of a checkpoint": lambda run: examine(run / "checkpoints" / "step-00000006"),
        "a checkpoint": lambda run: open_language_model(run / "checkpoints" / "step-00000006"),
        "read_config": lambda run: read_config(run / "config.json"),
        "model config": read_model_config,
        "load": lambda run: (stages([run]), history(run)),
        "page": lambda run: (run_page(results := run_results(run)), figures(results)),
        "list": lambda run: runs._print_table(run, list_runs(run)),
        "table": lambda run: Run(run, {}, interrupted=False).metrics,
        "train": lambda run: train(recipe(corpus), out=run, quiet=True),
        "resume finished": lambda run: resume(run, quiet=True),
        "resume": _resume_unfinished,
        "export": lambda run: export_hf(run, run.with_name("exported"), quiet=True),
        "fleet": lambda run: _fleet(run, folder / "run"),
    }
    return Subject("run", folder / "run", reads, frozenset({"resume", "resume finished"}), share=6)


def _resume_unfinished(run: Path) -> object:
    if (run / "summary.json").is_file():
        (run / "summary.json").unlink()
    return resume(run, quiet=True)


def _fleet(run: Path, sound: Path) -> object:
    job = Job("run", read_config(sound / "config.json"), run)
    return job.finished, _newest(job)


def trace_subject(opened: LanguageModel, folder: Path) -> Subject:
    """A trace of a few windows."""
    passages = read_passages(opened, tokens=60)
    path = folder / "trace" / "trace.parquet"
    for _ in write_trace(path, opened, passages, observe(opened, passages, rows=2, description=None), {}):
        pass
    reads: dict[str, Read] = {
        "info": lambda home: (lambda info: (info.domains, info.rows))(trace_info(home / "trace.parquet")),
        "rows": lambda home: [batch.to_pylist() for batch in read_trace(home / "trace.parquet")],
    }
    return Subject("trace", path.parent, reads)


def cache_subject(corpus: Path, folder: Path) -> Subject:
    """The cache of tokens and tokenizer of a corpus."""
    data = recipe(corpus)["data"]
    shutil.rmtree(folder / "cache", ignore_errors=True)

    def read(home: Path) -> object:
        prepared = prepare(parse(DataConfig, {**data, "cache_dir": str(home)}, "test"))
        return [prepared.validation_bytes_per_token, prepared.token_frequencies(), prepared.train_loader(0)]

    read(folder / "cache")
    return Subject("cache", folder / "cache", {"prepare": read}, frozenset({"prepare"}), share=2)


def answers_subject(folder: Path) -> Subject:
    """Kept answers of an evaluation."""
    path = folder / "answers" / "task.jsonl"
    answers = Answers(path)
    for number in range(4):
        answers.keep(f"a{number}", Scored(-1.5, 3, True), task="t", item=str(number))
        answers.keep(f"b{number}", Generated(("x", "y"), 3), task="t", item=str(number))
    answers.close()
    return Subject(
        "answers", path.parent, {"keep": lambda home: Answers(home / "task.jsonl").close()}, frozenset({"keep"})
    )


def selection_subject(opened: LanguageModel, folder: Path) -> Subject:
    """A selection of experts."""
    config = opened.model.config
    layers = tuple(LayerSelection(layer=n, experts=(0, 2), scores=(0.5, 0.2)) for n in config.moe_layers)
    made = ExpertSelection(
        source="run", router_sha256="0" * 64, model=shape_of(config), score="gate", p=0.5, samples=3, tokens=9,
        trainable_parameters=5, trainable_share=0.5, layers=layers,
    )  # fmt: skip
    (folder / "selection").mkdir()
    write_selection(folder / "selection" / "experts.json", made)
    return Subject(
        "selection", folder / "selection", {"read": lambda home: read_selection(home / "experts.json", config)}
    )


def kernels_subject(opened: LanguageModel, folder: Path, set_cache: Callable[[Path], object]) -> Subject:
    """What was measured of kernels."""
    home = folder / "kernels"
    home.mkdir()

    def read(cache: Path) -> object:
        set_cache(cache)
        return choose(
            opened.model.config, Kernels(), tokens=64, device=torch.device("cpu"), bf16=False,
            timer=lambda candidates, device: {name: 0.1 + n for n, name in enumerate(candidates)},
        )  # fmt: skip

    read(home)
    return Subject("kernels", home, {"choose": read}, frozenset({"choose"}))


def foreign_subjects(run: Path, folder: Path) -> list[Subject]:
    """An export, and what is imported from it again."""
    export_hf(run, folder / "hf", quiet=True, family="deepseek")
    import_hf(folder / "hf", folder / "imported", quiet=True)
    reads: dict[str, Read] = {
        "load_model": load_model,
        "open": open_language_model,
        "doctor": lambda home: examine(home, deep=True),
        "model config": read_model_config,
    }
    return [Subject(name, folder / name, reads) for name in ("hf", "imported")]


def comparison_subject(corpus: Path, folder: Path, raw: dict[str, Any]) -> Subject:
    """A comparison of two arms and a seed."""
    compare_module.compare(raw, out=folder / "comparison", quiet=True)
    again: Read = lambda home: compare_module.compare(raw, out=home, quiet=True)  # noqa: E731
    return Subject("comparison", folder / "comparison", {"compare": again}, frozenset({"compare"}), share=2)
