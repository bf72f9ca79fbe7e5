"""The doctor: what it says of sound checkpoints of every kind, and of what opens and may disappoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint.doctor.examined import (
    EXPERT,
    ROUTER_BIAS,
    V3_WIDE,
    change_json,
    drop,
    said,
)
from checkpoint.huggingface.published import tensors_of, write_weights
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.huggingface.importing import open_source
from finemoe.core.errors import CheckpointError

SOUND = {
    "v3": ("huggingface", "deepseek_v3"),
    "fp8": ("huggingface", "deepseek_v3"),
    "llama": ("huggingface", "llama"),
    "mixtral": ("huggingface", "mixtral"),
    "imported": ("imported", "deepseek_v3"),
    "imported_fp8": ("imported", "deepseek_v3"),
    "v3.gguf": ("gguf", "deepseek2"),
    "llama.gguf": ("gguf", "llama"),
    "run": ("run", None),
    "run/checkpoints/step-00000002": ("checkpoint", None),
    "llama/model.safetensors": ("tensors", None),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_sound_has_no_problems(originals: Path, name: str, deep: bool) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in originals.rglob("*"))
    diagnosis = examine(originals / name, deep=deep)
    assert said(diagnosis, "problem") == []
    assert said(diagnosis, "warning") == []
    assert (diagnosis.kind, diagnosis.family) == SOUND[name]
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))["sound"] is True
    assert sorted((p, p.stat().st_mtime_ns) for p in originals.rglob("*")) == before


def test_the_facts_of_a_v3_folder(originals: Path) -> None:
    facts = examine(originals / "fp8").facts
    opened = open_source(originals / "fp8")
    assert facts["keys"]["placed"] == len(opened.account.loaded) + len(opened.account.copies)
    assert facts["keys"]["carried"] == len(opened.account.scales) > 0
    assert facts["mtp"] == {"announced": 1, "present": 1}
    assert facts["fp8"]["matrices"] == facts["fp8"]["factors"] == len(opened.account.scales)
    assert facts["fp8"]["blocks"] > facts["fp8"]["matrices"], "hidden size 136 needs two blocks"
    assert facts["router"]["weights"] == ["BF16"]
    bias = opened.tensors.read(ROUTER_BIAS)
    entry = facts["router"]["bias"][0]
    assert entry == {"layer": 1, "dtype": "F32", "low": bias.min().item(), "high": bias.max().item()}
    assert [entry["layer"] for entry in facts["router"]["bias"]] == [1, 2], "the prediction module counts as layer 2"
    assert sum(entry["bytes"] for entry in facts["dtypes"]) == opened.tensors.nbytes
    assert facts["size"]["mtp_parameters"] > 0
    assert facts["tokenizer"]["faithful"]
    assert facts["template"]["rendered"] == "Hello<|end_of_text|>"
    possible = {entry["family"]: entry for entry in facts["exports"] if entry["possible"]}
    assert set(possible) == {"deepseek_v3", "kimi_k2", "deepseek2"}
    assert possible["deepseek_v3"]["lost"] == []
    assert "multi-token prediction" in possible["deepseek2"]["lost"][0]
    assert all(entry["reason"] for entry in facts["exports"] if not entry["possible"])


def test_an_imported_folder_accounts_for_its_source(originals: Path) -> None:
    facts = examine(originals / "imported_fp8").facts
    opened = open_source(originals / "fp8")
    assert facts["keys"]["source"] == {
        "loaded": len(opened.account.loaded) + len(opened.account.copies),
        "carried": len(opened.account.carried),
    }


def test_small_tensors_alone_are_read_unless_deep(tmp_path: Path) -> None:
    large = torch.zeros(600, 600)  # above 1 MiB
    large[599, 599] = torch.nan
    folder = tmp_path / "one"
    folder.mkdir()
    write_weights(folder, {"large": large, "small": torch.ones(3)})
    quick, deep = (examine(folder / "model.safetensors", deep=value) for value in (False, True))
    assert quick.facts["values"] == {"looked_at": 1, "of": 2, "deep": False}
    assert quick.problems == ()
    assert said(deep, "problem") == ["weights: 1 tensor holds NaN or infinity: large (1 element)"]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        examine(tmp_path / "absent")


MILD: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "bf16 bias": (
        "v3",
        lambda f: drop(f, **{ROUTER_BIAS: torch.ones(4, dtype=torch.bfloat16)}),
        "warning",
        "router: selection bias stored as BF16 in layer 1",
    ),
    "biases lost": (
        "v3",
        lambda f: drop(f, **{ROUTER_BIAS: torch.zeros(4), ROUTER_BIAS.replace("layers.1", "layers.2"): torch.zeros(4)}),
        "warning",
        "router: every selection bias is 0",
    ),
    "fp8 router": (
        "fp8",
        lambda f: drop(
            f,
            **{
                "model.layers.1.mlp.gate.weight": torch.ones(4, 136).to(torch.float8_e4m3fn),
                "model.layers.1.mlp.gate.weight_scale_inv": torch.ones(1, 2),
            },
        ),
        "warning",
        "router: weights of less than 16 bits",
    ),
    "a tensor of nothing": ("v3", lambda f: drop(f, more=torch.zeros(0, 4)), "note", "not needed: holds no element"),
    "a matrix of zeros": ("v3", lambda f: drop(f, **{EXPERT: torch.zeros(12, 136)}), "warning", "nothing but zeros"),
    "prediction module lost": (
        "v3",
        lambda f: drop(f, *(name for name in tensors_of(V3_WIDE) if name.startswith("model.layers.2."))),
        "warning",
        "weights: config.json promises 1 ",
    ),
    "class trap": (
        "v3",
        lambda f: change_json(f / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"),
        "warning",
        "tokenizer: tokenizer_class is LlamaTokenizerFast",
    ),
    "no tokenizer": ("v3", lambda f: (f / "tokenizer.json").unlink(), "warning", "tokenizer: no tokenizer.json"),
    "sentencepiece alone": (
        "v3",
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "warning",
        "only tokenizer.model",
    ),
    "stop beyond": (
        "v3",
        lambda f: change_json(f / "generation_config.json", eos_token_id=100_001),
        "warning",
        "stops at id 100,001",
    ),
    "reach": (
        "v3",
        lambda f: change_json(
            f / "config.json",
            max_position_embeddings=9000,
            rope_scaling={"type": "yarn", "factor": 2, "original_max_position_embeddings": 4096, "mscale": 1},
        ),
        "warning",
        "rope: yarn scaling by 2 from 4,096 positions reaches 8,192, and max_position_embeddings says 9,000",
    ),
    "pickle": ("v3", lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "note", "1 pickle file, which may run"),
    "code": ("v3", lambda f: (f / "modeling.py").write_text("boom"), "note", "never run: modeling.py"),
    "auto_map": ("v3", lambda f: None, "note", "named by `auto_map` alone"),
    "frequencies": (
        "llama",
        lambda f: drop(f, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        "note",
        "weights: 1 tensor is not needed: rotary frequencies",
    ),
    "stray link": ("v3", lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "warning", "leads out of the folder"),
}


@pytest.mark.parametrize("case", MILD)
def test_what_still_opens_is_no_problem(copy: Callable[[str], Path], case: str) -> None:
    name, change, severity, words = MILD[case]
    path = copy(name)
    change(path)
    diagnosis = examine(path)
    assert said(diagnosis, "problem") == []
    assert any(words in text for text in said(diagnosis, severity)), diagnosis.findings


def test_copies_that_differ_show_where_all_is_read(copy: Callable[[str], Path]) -> None:
    path = copy("v3")
    drop(path, **{"model.layers.2.embed_tokens.weight": torch.ones(300, 136, dtype=torch.bfloat16)})
    assert said(examine(path), "warning") == []
    deep = examine(path, deep=True)
    assert deep.problems == ()
    assert "model.layers.2.embed_tokens.weight should equal" in said(deep, "warning")[0]
