"""Whatever happens to one file of ours, every reader answers in words or goes on, and nothing else is touched.

`FINEMOE_CORRUPTIONS=10000 pytest -m slow tests/faults/test_own_files.py` tries as many as it says.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.damages import contents, copy_of, damage, files_in
from faults.readers import (
    Subject,
    answers_subject,
    cache_subject,
    comparison_subject,
    foreign_subjects,
    kernels_subject,
    run_subject,
    selection_subject,
    trace_subject,
)
from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.errors import FinemoeError
from finemoe.studies import compare as compare_module
from studies.in_process import run_here
from studies.test_compare import recipe as comparison_recipe

CASES = 120
RAW_WORDS = ("Errno", "Traceback", "pydantic", "validation error", "Input should be", "object has no attribute")


@pytest.fixture(scope="module")
def subjects(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Subject]]:
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("finemoe.studies.study.run_fleet", run_here)
        patched.setattr(compare_module, "write_results", lambda results, directory: None)
        patched.setattr("finemoe.studies.results._samples", lambda run, tokenizer, prompts: [])
        run = run_subject(corpus, folder)
        opened = open_language_model(run.home)
        yield [
            run,
            trace_subject(opened, folder),
            cache_subject(corpus, folder),
            answers_subject(folder),
            selection_subject(opened, folder),
            kernels_subject(opened, folder, lambda cache: patched.setenv("FINEMOE_CACHE", str(cache))),
            *foreign_subjects(run.home, folder),
            comparison_subject(corpus, folder, comparison_recipe(corpus, seeds=[0])),
        ]


def one_case(subjects: list[Subject], seed: int, place: Path) -> str | None:
    """Damage one file, let one reader at it; what is wrong with how it took it."""
    rng = random.Random(f"corruption {seed}")
    subject = rng.choice([one for one in subjects for _ in range(one.share)])
    name = rng.choice(sorted(subject.reads))
    home = copy_of(subject.home, place / "it")
    files = files_in(home)
    hit = rng.choice(files)
    done = damage(hit, rng, [path for path in files if path != hit] or files)
    before = contents(home)
    label = f"seed {seed}: {subject.name}/{hit.relative_to(home)} {done}, read by {name}"
    raised = False
    try:
        subject.reads[name](home)
    except FinemoeError as error:
        raised = True
        if not str(error) or any(word in str(error) for word in RAW_WORDS):
            return f"{label}: says {str(error)[:300]!r}"
    except Exception as error:
        return f"{label}: {type(error).__name__}: {str(error)[:300]}"
    after = contents(home)
    if name not in subject.writes and after != before:
        return f"{label}: changed {sorted(set(after.items()) ^ set(before.items()))[:1]}"
    if raised and (lost := [path for path in before if path not in after and path != "summary.json"]):
        return f"{label}: lost {lost}"
    if not raised and name.startswith("resume") and not (home / "summary.json").is_file():
        return f"{label}: no summary"
    return None


def test_no_damage_to_one_file_escapes(subjects: list[Subject], tmp_path: Path) -> None:
    found = [wrong for seed in range(CASES) if (wrong := one_case(subjects, seed, tmp_path))]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_no_damage_in_thousands_escapes(subjects: list[Subject], tmp_path: Path) -> None:
    cases, started, found = int(os.environ.get("FINEMOE_CORRUPTIONS", "2000")), time.monotonic(), []
    for number in range(cases):
        wrong = one_case(subjects, CASES + number, tmp_path)
        if wrong:
            found.append(wrong)
            print(wrong, file=sys.stderr)
        if number and not number % 500:
            left = (time.monotonic() - started) / number * (cases - number)
            print(f"{number} of {cases} corruptions, {len(found)} escaped, {left:.0f} s left", file=sys.stderr)
    assert not found, f"{len(found)} of {cases} escaped\n" + "\n".join(found)
