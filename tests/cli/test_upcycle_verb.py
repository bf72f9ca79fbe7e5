"""`finemoe upcycle` both ways, and options of one way that the other refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods.tiny_dense import dense_config, drawn, run_of


def test_there_and_back(command: Any, tmp_path: Path) -> None:
    dense = run_of(tmp_path / "dense", drawn(dense_config()))
    assert "6 routed" in command("upcycle", dense, tmp_path / "mixture", "--copies", "2", "-q").stdout
    said = command("upcycle", tmp_path / "mixture", tmp_path / "back", "--reverse", "-q")
    assert said.exit_code == 0
    assert "48 neurons wide; the gates of a token came to 1 to 1 together" in " ".join(said.stdout.split())
    options = ("--reverse", "--group", "similar", "--groups", "2", "--json", "-q")
    facts = json.loads(command("upcycle", tmp_path / "mixture", tmp_path / "narrow", *options).stdout)
    assert facts["largest_logit_difference"] > 1e-3  # three shards in two groups
    assert facts["gate_sums"] == {layer: pytest.approx(1.0) for layer in ("0", "1", "2")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--reverse", "--route-scale", "1.0"],
            "--route-scale is for making a mixture, and does nothing with --reverse",
        ),
        (["--groups", "3"], "--groups is for --reverse, and does nothing without"),
        (["--reverse"], "all 3 layers are dense already"),
    ],
    ids=str,
)
def test_nothing_is_accepted_that_has_no_effect(command: Any, tmp_path: Path, options: list[str], says: str) -> None:
    dense = run_of(tmp_path / "dense", drawn(dense_config()))
    result = command("upcycle", dense, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
