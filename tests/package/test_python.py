"""finemoe from Python: each verb is a function, shows what the command line shows, and says the same."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import finemoe
from finemoe.cli.main import app
from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.core.logs import logger, speak
from finemoe.generation.generate import Completion
from finemoe.text.tokenizer import Tokenizer
from runs.tiny_runs import recipe, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture after a few steps."""
    folder = tmp_path_factory.mktemp("package")
    finemoe.train(recipe(write_corpus(folder / "corpus"), "deepseek-moe"), out=folder / "run", quiet=True)
    return folder / "run"


def said(*words: str) -> list[dict[str, object]]:
    return json.loads(CliRunner().invoke(app, list(words)).stdout)


def test_public_names_are_pinned_and_resolve() -> None:
    assert sorted(finemoe.__all__) == [
        "Check",
        "Comparison",
        "Completion",
        "Conversation",
        "FinemoeError",
        "LanguageModel",
        "LayoutCheck",
        "ModelConfig",
        "Run",
        "Tokenizer",
        "Transformer",
        "analyze",
        "chat",
        "check",
        "compare",
        "data_excerpts",
        "densify",
        "doctor",
        "env",
        "evaluate",
        "export",
        "generate",
        "import_",
        "launch",
        "list_runs",
        "load",
        "load_chat_template",
        "load_model",
        "load_tokenizer",
        "merge",
        "new_recipe",
        "paper",
        "plan",
        "quantize",
        "recipe_keys",
        "rejection",
        "resume",
        "rewards",
        "rollouts",
        "sample",
        "serve",
        "show",
        "size",
        "study",
        "trace",
        "train",
        "train_stages",
        "upcycle",
        "verify_parallel",
    ]
    assert set(finemoe.__all__) < set(dir(finemoe))
    assert all(getattr(finemoe, name) is not None for name in finemoe.__all__)


def test_generate_says_what_the_command_line_says(run: Path) -> None:
    ours = finemoe.generate(run, ["a b", "c"], max_new_tokens=5, seed=3, quiet=True)
    options = ["--max-new-tokens", "5", "--seed", "3", "--json"]
    assert json.loads(json.dumps([one.to_dict() for one in ours])) == said(
        "generate", str(run), "-p", "a b", "-p", "c", *options
    )
    assert [str(one) for one in ours] == [one.prompt + one.completion for one in ours]


def test_generate_takes_one_prompt_and_a_model_that_is_open(run: Path) -> None:
    opened = finemoe.load(run)
    (again,) = finemoe.generate(opened, "a b", max_new_tokens=5, seed=3, quiet=True)
    assert again == finemoe.generate(run, ["a b"], max_new_tokens=5, seed=3, quiet=True)[0]
    assert isinstance(again, Completion)
    assert len(again.tokens) == len(again.logprobs) == 5


def test_trace_writes_a_row_for_each_token_and_layer(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.parquet"
    found = finemoe.trace(run, out, corpora=[f"words={run.parent / 'corpus' / 'train'}"], tokens=256)
    assert (
        found["rows"] == pq.read_table(out).num_rows == sum(found["tokens"].values()) * len(found["summary"]["layers"])
    )
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        finemoe.trace(run, out, tokens=256)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({}, "nothing to continue"), ({"prompts": "a", "messages": []}, "prompts or messages")],
)
def test_generate_wants_prompts_or_messages(run: Path, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        finemoe.generate(run, quiet=True, **arguments)


def test_generate_refuses_impossible_sampling_before_the_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        finemoe.generate(tmp_path / "nothing", "a", top_p=2.0)


def test_samples_of_a_prompt_are_drawn_apart_and_alternatives_are_told(run: Path) -> None:
    drawn = finemoe.generate(run, ["a b", "c"], n=3, max_new_tokens=8, logprobs=2, quiet=True)
    assert [one.prompt for one in drawn] == ["a b"] * 3 + ["c"] * 3
    assert len({one.tokens for one in drawn[:3]}) == 3
    assert drawn[0].tokens == finemoe.generate(run, "a b", max_new_tokens=8, quiet=True)[0].tokens
    for one in drawn:
        assert len(one.likely) == len(one.tokens)
        for logprob, likely in zip(one.logprobs, one.likely, strict=True):
            assert likely[0][1] >= likely[1][1]
            assert logprob <= likely[0][1] + 1e-6
    assert "likely" in drawn[0].to_dict()


def test_guesses_and_the_type_of_the_cache_reach_the_engine(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    greedy = {"temperature": 0.0, "max_new_tokens": 30}
    (plain,) = finemoe.generate(run, "a b a b a b", quiet=True, **greedy)
    with caplog.at_level("INFO", "finemoe"):
        (guessed,) = finemoe.generate(run, "a b a b a b", guess="text", guess_tokens=2, **greedy)
    assert "tokens a pass" in caplog.text
    (by_itself,) = finemoe.generate(run, "a b a b a b", guess=str(run), quiet=True, **greedy)
    assert guessed.tokens == by_itself.tokens == plain.tokens
    (narrow,) = finemoe.generate(run, "a b", cache_dtype="bf16", cache_bytes=1 << 20, quiet=True, **greedy)
    assert len(narrow.tokens) <= 30


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, "n: 0 completions"),
        ({"guess_tokens": 2}, "goes with guess"),
        ({"guess": "text", "guess_tokens": 0}, "guess_tokens: 0"),
        ({"guess": "module"}, "no multi-token prediction module"),
        ({"cache_dtype": "int4"}, "fp32, bf16, fp8"),
        ({"regex": "a", "choice": ["b"]}, "exactly one"),
        ({"choice": []}, "choice"),
        ({"temprature": 1.0}, "temperature"),
        ({"stop": ""}, "empty string"),
    ],
    ids=str,
)
def test_generate_refuses_what_it_cannot_do(run: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        finemoe.generate(run, "a", quiet=True, **arguments)


def test_a_model_with_another_tokenizer_cannot_guess(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    Tokenizer.train(["zzz yyy xxx www zzz yyy"] * 9, vocab_size=270).save(other / "tokenizer.json")
    for folder in (other / "checkpoints").glob("*/tokenizer.json"):
        shutil.copy(other / "tokenizer.json", folder)
    with pytest.raises(FinemoeError, match="tokenizer"):
        finemoe.generate(run, "a", guess=other, quiet=True)


def test_analyze_calls_the_report_of_that_name(run: Path) -> None:
    options = {"tokens": 256, "corpora": [f"words={run.parent / 'corpus' / 'train'}"]}
    experts = finemoe.analyze("experts", run, **options)
    assert experts["cards"]
    assert finemoe.analyze("load", run, run, last=True, **options)
    assert finemoe.analyze("difference", run, run, **options)


@pytest.mark.parametrize(
    ("report", "count", "named"),
    [("expert", 1, "did you mean `experts`"), ("knockout", 2, "needs 1 model, got 2"), ("difference", 1, "needs 2")],
)
def test_analyze_wants_a_report_and_its_models(run: Path, report: str, count: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        finemoe.analyze(report, *[run] * count)


def test_doctor_examines(run: Path) -> None:
    found = finemoe.doctor(run)
    assert found.kind == "run"
    assert not found.problems


def test_a_run_is_a_table_and_charts(run: Path, tmp_path: Path) -> None:
    ended = finemoe.resume(run, quiet=True)
    table = ended.metrics
    assert table.column("step").to_pylist() == [1, 2, 3, 4, 5, 6]
    losses, measured = table.column("loss").to_pylist(), table.column("validation_loss").to_pylist()
    assert all(loss > 0 for loss in losses)
    assert measured[-1] == pytest.approx(ended.summary["final_validation_loss"])
    assert len(repr(ended)) < 300
    assert "validation loss" in str(ended)
    assert ended._repr_html_().startswith("<pre")
    assert ended.plot().chart.to_dict()["$schema"]
    assert ended.plot()._repr_svg_().startswith("<svg")  # a notebook needs no network for it
    ended.plot("balance").save(tmp_path / "balance.png")
    assert (tmp_path / "balance.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        ended.plot().save(tmp_path / "balance.gif")
    with pytest.raises(ConfigError, match="did you mean `balance`"):
        ended.plot("balanc")


def test_training_shows_itself_to_somebody_in_python(tmp_path: Path) -> None:
    """Nobody who types `finemoe.train(...)` has configured logging, and a run of minutes must not be mute."""
    raw = recipe(write_corpus(tmp_path / "corpus"), "dense")
    code = f"import finemoe; print(finemoe.train({raw!r}, out={str(tmp_path / 'run')!r}).directory)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "parameters" in done.stderr
    assert "loss" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "run")


@pytest.fixture
def mute() -> Iterator[None]:
    """The logger as it is at the start of a process."""
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    yield
    root.setLevel(level)


@pytest.mark.usefixtures("mute")
def test_whoever_set_up_logging_is_left_alone() -> None:
    logger.setLevel(logging.WARNING)
    speak()
    assert not logger.handlers
    logger.setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.INFO)
    speak()
    assert not logger.handlers


@pytest.mark.usefixtures("mute")
def test_the_lines_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    speak()
    speak()
    logger.info("one line")
    assert capsys.readouterr().err == "one line\n"
