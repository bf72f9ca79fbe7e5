"""Ways to harm a checkpoint, and what the doctor says of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from checkpoint.huggingface.published import LLAMA, V3, V3_FP8, tensors_of, write_weights
from finemoe.checkpoint.doctor.examine import Diagnosis
from finemoe.text import END_OF_TEXT, Tokenizer

ROOMY = {"vocab_size": 300}  # for the 260 ids of the published tokenizer
V3_WIDE, V3_FP8_WIDE, LLAMA_WIDE = {**V3, **ROOMY}, {**V3_FP8, **ROOMY}, {**LLAMA, **ROOMY}
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def tokenizer() -> Tokenizer:
    """One that splits as GPT-2's does, which GGUF has a name for."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["abc abd " * 9], trainer)
    return Tokenizer(inner, "test")


def mended(folder: Path) -> Path:
    """A published folder whose tokenizer and template have nothing to complain about."""
    tokenizer().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}'
    )
    (folder / "chat_template.jinja").unlink()  # each rendering starts a process
    return folder


def with_template(folder: Path, text: str) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


def said(diagnosis: Diagnosis, severity: str) -> list[str]:
    return [f"{f.about}: {f.text}" for f in diagnosis.findings if f.severity == severity]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop(folder: Path, *names: str, **replace: torch.Tensor) -> None:
    """Write the V3 folder's weights again, in one file, without some and with others."""
    raw = json.loads((folder / "config.json").read_text())
    for file in folder.glob("model*"):
        file.unlink()
    found = tensors_of(raw) | replace
    write_weights(folder, {name: tensor for name, tensor in found.items() if name not in names})


def truncate(path: Path, cut: int = 100) -> None:
    os.truncate(path, path.stat().st_size - cut)


EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
