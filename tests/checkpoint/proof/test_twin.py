"""Twins: small, with every switch of the original, compared with transformers in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint.huggingface.released_configs import RELEASED
from finemoe.checkpoint.huggingface.families import family_of
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.proof import twin as verify
from finemoe.checkpoint.proof import witness
from finemoe.checkpoint.proof.twin import shrink, verify_twin
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def switches(config: ModelConfig) -> Any:
    """What of a model is no size: the kinds of its layers, and every setting that is a word, a flag, or none at all."""

    def flags(value: Any) -> Any:
        if isinstance(value, dict):
            sizes = {"ffn_hidden_size", "groups_per_token", "num_groups", "original_max_positions"}
            found = {key: flags(inner) for key, inner in value.items() if key not in sizes}
            return {key: inner for key, inner in found.items() if inner is not ...}
        return ... if isinstance(value, int) and not isinstance(value, bool) else value

    blocks = [flags(block.model_dump(exclude={"feed_forward": {"balance"}})) for block in config.blocks]
    kinds = {str(block): block for block in blocks}
    return config.tie_embeddings, config.norm_eps, sorted(kinds)


@pytest.mark.parametrize("name", RELEASED)
def test_a_twin_is_small_and_has_every_switch(name: str) -> None:
    raw = RELEASED[name]
    family = family_of(raw)
    config, twin = family.to_config(raw), family.to_config(shrink(raw))
    assert switches(twin) == switches(config)
    assert twin.max_positions is not None
    assert len(twin.blocks) <= 4
    assert bool(twin.moe_layers) == bool(config.moe_layers)
    routed = twin.blocks[-1].feed_forward
    if not config.moe_layers:
        return
    assert 1 < routed.experts_per_token < routed.num_routed_experts
    if config.blocks[-1].feed_forward.router.model_dump().get("num_groups", 1) > 1:
        assert routed.router.num_groups > 1
        assert routed.router.groups_per_token < routed.router.num_groups


def test_a_dense_layer_among_routed_ones_stays() -> None:
    raw = {**RELEASED["qwen3-30b-a3b"], "mlp_only_layers": [17, 30]}
    twin = family_of(raw).to_config(shrink(raw))
    assert twin.moe_layers == (1, 2, 3)


def test_verified() -> None:
    pytest.importorskip("transformers")
    result = verify_twin(RELEASED["deepseek-v3"])
    assert result.status == "verified", result.reason
    assert result.difference is not None
    assert result.difference <= 1e-5
    assert result.transformers
    assert result.transformers in result.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RELEASED if name not in ("deepseek-moe-16b", "kimi-k2")])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_published_config_is_verified(name: str, seed: int) -> None:
    result = verify_twin(RELEASED[name], seed=seed)
    assert result.status == "verified", result.reason


@pytest.mark.parametrize(
    ("factor", "odd", "status", "reason"),
    [
        (1.0, {}, "verified", "logits differ by"),
        (1.02, {}, "differs", "is rounding"),
        (1.0, {"missing_keys": ["model.layers.0.self_attn.q_norm.weight"]}, "differs", "missing keys: model.layers.0"),
    ],
)
def test_a_difference_is_seen(
    factor: float, odd: dict[str, list[str]], status: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(folder: Path) -> None:
        """A witness that computes what we do, with other keys."""
        model = load_model(folder)
        with torch.no_grad():
            model.blocks[0].attention.k_proj.weight.mul_(factor)  # type: ignore[union-attr, operator]
            logits = model.logits(model(load_file(folder / "tokens.safetensors")["tokens"]).hidden)
        save_file({"logits": logits}, folder / "logits.safetensors")
        (folder / "witness.json").write_text(json.dumps({"transformers": "0.0", "odd": odd}))

    monkeypatch.setattr(verify, "_run_witness", stand_in)
    result = verify_twin(RELEASED["smollm2-135m"])
    assert result.status == status
    assert result.difference is not None
    assert (result.difference > result.tolerance) == (factor != 1)
    assert reason in result.reason


def fake_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the witness import this in place of transformers."""
    (folder / "transformers.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ModuleNotFoundError(\"No module named 'transformers'\")", "is not installed; `pip install"),
        ("raise ImportError('hub>=9 is required')", "is installed, and cannot be imported: hub>=9 is required"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by signal 9"),
        ("import time; time.sleep(60)", "within 1 seconds"),
    ],
)
def test_could_not(code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_transformers(tmp_path, monkeypatch, code)
    monkeypatch.setattr(verify, "DEADLINE_SECONDS", 1 if "sleep" in code else 60)
    result = verify_twin(RELEASED["smollm2-135m"])
    assert (result.status, result.difference) == ("could not", None)
    assert reason in result.reason


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_twin_that_cannot_be_written_is_no_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(verify, "_write", full)
    result = verify_twin(RELEASED["smollm2-135m"])
    assert (result.status, "no twin can be written: No space left" in result.reason) == ("could not", True)


def test_a_witness_that_fails_is_no_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_transformers(tmp_path, monkeypatch, "raise RuntimeError('broken inside')")
    result = verify_twin(RELEASED["smollm2-135m"])
    assert (result.status, result.difference) == ("differs", None)
    assert "broken inside" in result.reason


def test_no_class_no_witness() -> None:
    result = verify_twin(RELEASED["deepseek-moe-16b"])
    assert result.status == "could not"
    assert "never run" in result.reason


def test_what_we_refuse_is_not_verified() -> None:
    with pytest.raises(CheckpointError, match="attention_bias"):
        verify_twin({**RELEASED["smollm2-135m"], "attention_bias": True})


def test_the_witness_knows_no_module_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder holds modules called `open` and `keys`; as top-level ones they would stand before others."""
    code = "import sys\nsys.exit(str([path for path in sys.path if path.endswith('checkpoint')]))"
    fake_transformers(tmp_path, monkeypatch, code)
    command = [sys.executable, "-P", witness.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("[]")
