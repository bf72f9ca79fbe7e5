"""The doctor and damage: it names each, and none stops it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.doctor.examined import (
    EXPERT,
    change_json,
    drop,
    said,
    truncate,
    with_template,
)
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.core.errors import CheckpointError
from finemoe.text import Tokenizer

WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("v3", lambda f: drop(f, EXPERT), f"weights: 1 tensor is missing: {EXPERT}"),
    "many missing": (
        "v3",
        lambda f: drop(f, *(f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(4))),
        "weights: 4 tensors are missing: model.layers.1.mlp.experts.0",
    ),
    "misshaped": ("v3", lambda f: drop(f, **{EXPERT: torch.zeros(3, 4)}), f"{EXPERT} ([3, 4] instead of [12, 136])"),
    "unexpected": (
        "v3",
        lambda f: drop(f, odd=torch.ones(2)),
        "weights: 1 tensor is known to no part of the model: odd",
    ),
    "unread type": (
        "v3",
        lambda f: drop(f, **{"model.norm.weight": torch.ones(136, dtype=torch.int8)}),
        "model.norm.weight (I8)",
    ),
    "nan": (
        "v3",
        lambda f: drop(f, **{"model.norm.weight": torch.full((136,), torch.nan)}),
        "weights: 1 tensor holds NaN or infinity: model.norm.weight (136 elements)",
    ),
    "cut short": ("v3", lambda f: truncate(f / "model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors"),
    "shard lost": (
        "v3",
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "names model-00002-of-00003.safetensors, not in the folder",
    ),
    "config no json": ("v3", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config lost": ("v3", lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "unknown family": ("v3", lambda f: change_json(f / "config.json", model_type="gpt9"), "`model_type` is"),
    "unknown function": ("v3", lambda f: change_json(f / "config.json", hidden_act="gelu"), "`hidden_act` is"),
    "config of another size": (
        "v3",
        lambda f: change_json(f / "config.json", num_hidden_layers=3),
        "weights: ",
    ),
    "factors lost": (
        "fp8",
        lambda f: drop(f, "model.layers.0.mlp.up_proj.weight_scale_inv"),
        "fp8: 1 FP8 matrix lacks its factors: model.layers.0.mlp.up_proj.weight",
    ),
    "factors of another shape": (
        "fp8",
        lambda f: drop(f, **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
        "1 matrix has factors that do not fit it",
    ),
    "factors infinite": (
        "fp8",
        lambda f: drop(f, **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.full((2, 2), torch.inf)}),
        "1 tensor of factors holds NaN or infinity",
    ),
    "complex numbers": (
        "v3",
        lambda f: drop(f, **{"model.norm.weight": torch.full((136,), complex(torch.nan, 1))}),
        "of an element type that is not read: model.norm.weight (C64)",
    ),
    "tokenizer of another model": (
        "v3",
        lambda f: (
            Tokenizer.train(["abcdefghi " * 40 + "xyz" * 20] * 5, 310).save(f / "tokenizer.json")
            or change_json(f / "config.json", vocab_size=200)
            or drop(f)
        ),
        "tokenizer: it has ",
    ),
    "tokenizer no json": ("v3", lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer: "),
    "template does not parse": ("v3", lambda f: with_template(f, "{% if %}"), "template: "),
    "template breaks out": (
        "v3",
        lambda f: with_template(f, "{{ ''.__class__.__mro__ }}"),
        "template: ",
    ),
    "link out": (
        "v3",
        lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer.json").symlink_to("/etc/hostname"),
        "leads out of ",
    ),
    "link in a circle": (
        "v3",
        lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer.json").symlink_to("tokenizer.json"),
        "tokenizer.json: ",
    ),
    "import unfinished": ("imported", lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "import cut short": ("imported", lambda f: truncate(f / "model.safetensors"), "manifest.json says"),
    "import without a file": ("imported", lambda f: (f / "source.json").write_text("{"), "not valid JSON"),
    "gguf cut short": ("v3.gguf", truncate, "truncated"),
    "gguf no gguf": ("v3.gguf", lambda f: f.write_bytes(b"nothing at all"), "not a GGUF file"),
    "run damaged": (
        "run",
        lambda f: truncate(f / "checkpoints/step-00000002/model.safetensors"),
        "files: checkpoint step-00000002: ",
    ),
    "run without checkpoints": (
        "run",
        lambda f: shutil.rmtree(f / "checkpoints/step-00000001") or shutil.rmtree(f / "checkpoints/step-00000002"),
        "no checkpoint to open: there is none yet",
    ),
    "empty folder": ("v3", lambda f: [p.unlink() for p in f.iterdir()], "neither a run, nor an imported folder"),
    "pickles alone": (
        "v3",
        lambda f: [p.unlink() for p in f.glob("model*")] and (f / "pytorch_model.bin").write_bytes(b""),
        "has only pickle weights",
    ),
}


@pytest.mark.parametrize("damage", WRONG)
def test_damage_is_a_problem_that_names_it(copy: Callable[[str], Path], damage: str) -> None:
    name, harm, words = WRONG[damage]
    path = copy(name)
    harm(path)
    diagnosis = examine(path)
    problems = said(diagnosis, "problem")
    assert any(words in text for text in problems), problems
    assert len(problems) <= 4, "one damage, not an avalanche"
    assert diagnosis.findings[: len(problems)] == diagnosis.problems, "problems first"
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_it_agrees_with_the_import(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """A Hugging Face folder has a problem of files, config, weights or FP8 exactly where an import refuses it."""
    for number, (name, harm, _) in enumerate(WRONG.values()):
        if name not in ("v3", "fp8"):
            continue
        path = copy(name)
        harm(path)
        found = {finding.about for finding in examine(path).problems}
        try:
            import_hf(path, tmp_path / f"out{number}", quiet=True)
            refused = False
        except CheckpointError:
            refused = True
        about = found & {"files", "config", "weights", "fp8"}
        if not found & {"tokenizer", "template"}:  # the import takes these along verbatim
            assert refused == bool(about), (number, found)
        shutil.rmtree(path)


def test_damage_that_only_checksums_show_needs_deep(copy: Callable[[str], Path]) -> None:
    path = copy("imported")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert examine(path).problems == ()
    assert any("checksum" in text for text in said(examine(path, deep=True), "problem"))


def test_a_run_with_a_damaged_checkpoint_is_judged_by_the_one_before(copy: Callable[[str], Path]) -> None:
    path = copy("run")
    truncate(path / "checkpoints/step-00000002/model.safetensors")
    diagnosis = examine(path)
    assert diagnosis.facts["keys"]["placed"] == diagnosis.facts["keys"]["tensors"] > 0
    assert diagnosis.facts["checkpoints"] == ["step-00000002", "step-00000001"]


def test_an_interrupted_import_is_recognised(tmp_path: Path) -> None:
    for name, out in (("V2.5.partial", "V2.5"), ("V2.5", "V2.5")):
        partial = tmp_path / name
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"")
        (partial / ".model.journal").write_text("")
        assert examine(partial).problems[0].text.endswith(f"give its command again to finish {tmp_path / out}")


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30), name=st.sampled_from(["v3", "imported", "llama.gguf", "run", "mixtral"]))
def test_random_damage_never_raises(
    originals: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, name: str
) -> None:
    """Bytes flipped, files cut, emptied or removed: always a diagnosis, and it can be written as JSON."""
    draw = random.Random(seed)
    home = tmp_path_factory.mktemp("damaged")
    source, path = originals / name, home / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    for file in draw.sample(files, min(len(files), draw.randint(1, 2))):
        data = bytearray(file.read_bytes())
        match draw.randrange(5):
            case 0 if data:
                for _ in range(draw.randint(1, 8)):  # headers and JSON are where it hurts
                    data[draw.randrange(min(len(data), 4096))] = draw.randrange(256)
                file.write_bytes(data)
            case 1:
                file.write_bytes(data[: draw.randrange(len(data) + 1)])
            case 2:
                file.write_bytes(b"")
            case 3 if path.is_dir():
                file.unlink()
                file.symlink_to(draw.choice(["/etc/hostname", "/dev/zero", file.name]))
            case _:
                file.unlink()
    if path.exists():
        json.dumps(examine(path, deep=draw.random() < 0.3).to_dict(), allow_nan=False)
    shutil.rmtree(home)
