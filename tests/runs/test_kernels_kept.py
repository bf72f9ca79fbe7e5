"""What a stopwatch chose is written down: the same config.json computes the same bits, whatever the watch says then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from finemoe.core.errors import RunError
from finemoe.model import native
from finemoe.runs import calibration
from finemoe.runs.run import resume, train
from runs.tiny_runs import assert_same_run, recipe


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Make the stopwatch find these kernels fastest, with nothing remembered."""
    caches, original = iter(range(100)), calibration._Setting

    def seconds(names: set[str]) -> calibration.Timer:
        def of(candidates: calibration.Candidates, device: torch.device) -> Mapping[str, float]:
            return {name: 1.0 if name in names else 2.0 for name in candidates}

        return of

    def make(experts: str, products: str) -> None:
        monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / f"cache-{next(caches)}")
        names = {experts, products}

        def setting(hidden: int, tokens: int, device: torch.device, bf16: bool, timer: calibration.Timer) -> object:
            return original(hidden, tokens, device, bf16, seconds(names))

        monkeypatch.setattr(calibration, "_Setting", setting)

    return make


def kernels_of(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "config.json").read_text())["kernels"])


def test_config_json_names_them_and_running_it_again_measures_nothing(
    corpus: Path, tmp_path: Path, prefer: Callable[[str, str], None]
) -> None:
    prefer("loop", "torch")
    first = train(recipe(corpus), out=tmp_path / "first", quiet=True).directory
    assert (kernels_of(first)["experts"], kernels_of(first)["products"]) == ("loop", "torch")
    prefer("sorted_slices", "native")  # a cold cache, and another mood of the machine
    other = train(recipe(corpus), out=tmp_path / "other", quiet=True).directory
    assert kernels_of(other)["experts"] == "sorted_slices"
    assert kernels_of(other)["products"] == ("native" if native.available() else "torch")
    again = train(first / "config.json", out=tmp_path / "again", quiet=True).directory
    assert (again / "config.json").read_text() == (first / "config.json").read_text()
    assert_same_run(first, again)


def test_a_run_that_was_killed_before_its_first_checkpoint_keeps_them(
    corpus: Path, tmp_path: Path, prefer: Callable[[str, str], None]
) -> None:
    prefer("loop", "torch")
    whole = train(recipe(corpus), out=tmp_path / "whole", quiet=True).directory
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text((whole / "config.json").read_text())
    prefer("sorted_slices", "native")
    assert not resume(begun, quiet=True).interrupted
    assert_same_run(whole, begun)


def test_a_run_of_an_earlier_version_that_says_auto_goes_on_with_what_its_checkpoint_had(
    corpus: Path, tmp_path: Path, prefer: Callable[[str, str], None]
) -> None:
    prefer("loop", "torch")
    whole = train(recipe(corpus), out=tmp_path / "whole", quiet=True).directory
    old = train(recipe(corpus), out=tmp_path / "old", quiet=True).directory
    (old / "summary.json").unlink()
    for config in (old / "config.json", *old.glob("checkpoints/*/config.json")):
        table = json.loads(config.read_text())
        table["kernels"] |= {"experts": "auto", "products": "auto"}
        config.write_text(json.dumps(table))
    for folder in sorted(old.glob("checkpoints/*"))[1:]:
        (folder / "manifest.json").unlink()
    first = min(old.glob("checkpoints/*"))
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"]["config.json"] = recorded(first / "config.json")
    (first / "manifest.json").write_text(json.dumps(manifest))
    prefer("sorted_slices", "native")
    resume(old, quiet=True)
    assert_same_run(whole, old)


def recorded(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_same_recipe_in_the_same_folder_is_this_very_run(
    corpus: Path, tmp_path: Path, prefer: Callable[[str, str], None]
) -> None:
    prefer("loop", "torch")
    out = train(recipe(corpus), out=tmp_path / "run", quiet=True).directory
    with pytest.raises(RunError, match="this very run"):
        train(recipe(corpus), out=out, quiet=True)
    with pytest.raises(RunError, match="a run of another configuration"):
        train(recipe(corpus, kernels={"experts": "sorted_slices"}), out=out, quiet=True)
