"""The terminal's table fits 80 columns; the CSV holds every arm."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console

from finemoe.charts.comparison.words import summary
from finemoe.studies.tables import comparison_csv, comparison_table

_spec = importlib.util.spec_from_file_location("fake_results", Path(__file__).parents[1] / "charts/fake_results.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
fake_results = _module.fake_results


def printed(results) -> str:
    screen = Console(width=80, file=io.StringIO(), highlight=False)
    screen.print(comparison_table(results))
    return screen.file.getvalue()


@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_fits_eighty_columns(count, seeds):
    text = printed(fake_results(count=count, seeds=seeds))
    assert max(len(line) for line in text.splitlines()) <= 80
    names = [arm["label"] for arm in fake_results(count=count, seeds=seeds)["arms"].values()]
    assert all(name[:19] in text for name in names)
    assert "…" not in text


def test_arms_are_ordered_by_loss():
    results = fake_results()
    lines = printed(results).splitlines()
    order = sorted(results["arms"].values(), key=lambda arm: arm["validation_loss"]["mean"])
    rows = [next(i for i, line in enumerate(lines) if line.startswith(arm["label"])) for arm in order]
    assert rows == sorted(rows)


def test_undecided_pairs_share_one_sentence_a_reason():
    text = " ".join(printed(fake_results(seeds=1)).split())
    assert "All 10 pairs are undecided (" in text
    results = fake_results(seeds=1)
    results["pairs"][0]["verdict"] = "better"
    assert " ".join(printed(results).split()).count("Undecided (") == 1


def test_the_csv_has_a_row_an_arm():
    results = fake_results()
    rows = list(csv.DictReader(io.StringIO(comparison_csv(results))))
    assert [row["arm"] for row in rows] == list(results["arms"])
    for row, arm in zip(rows, results["arms"].values(), strict=True):
        assert float(row["validation_loss"]) == arm["validation_loss"]["mean"]
        assert int(row["total_parameters"]) == arm["total_parameters"]


def test_an_arm_that_was_not_sized_to_the_others_says_what_it_cost():
    results = fake_results()
    said = "did not cost the same"
    assert said not in " ".join(summary(results))  # sized, and as unequal as in the paper
    dear, cheap = results["arms"]["deepseek-moe"], results["arms"]["dense"]
    dear["mismatch"] = dict.fromkeys(dear["mismatch"])
    dear["training_flops"] = 1.5 * max(arm["training_flops"] for arm in results["arms"].values())
    cheap["training_flops"] = dear["training_flops"] / 4
    least = min(results["arms"].values(), key=lambda arm: arm["training_flops"])["training_flops"]
    for lines in (" ".join(summary(results)), " ".join(printed(results).split())):
        assert f"DeepSeekMoE computed {dear['training_flops'] / least:.2f} times what" in lines
    for change in ({"budget": {"kind": "flops"}}, {"arms": {"deepseek-moe": dear}}):
        assert said not in " ".join(summary({**results, **change}))
