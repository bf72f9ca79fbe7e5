"""GGUF files that are older than a key or a layout, and ones whose tokenizer nobody here can read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.gguf.gguf_files import LATENT, LEAD, MODELS, SIGMOID, companions, config_of, moe, random_model, recipe
from checkpoint.gguf.written import exported, rewritten, stored
from finemoe.checkpoint.conversion import import_
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.config import Facts, read_model
from finemoe.checkpoint.gguf.keys import stored_tensors
from finemoe.checkpoint.gguf.metadata import describe
from finemoe.checkpoint.gguf.opening import import_gguf, load_gguf, open_gguf
from finemoe.checkpoint.open import load_model, load_tokenizer
from finemoe.checkpoint.proof.written import compare_import
from finemoe.core.errors import CheckpointError
from finemoe.runs.planning.sizing import size

GROUPS = {"deepseek2.expert_group_count": None, "deepseek2.expert_group_used_count": None}
V3 = recipe(LATENT, moe(SIGMOID), leading=LEAD)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("finemoe"), "propagate", True)


def test_groups_that_the_file_does_not_know_are_asked_for(tmp_path: Path, caplog: Any) -> None:
    model = random_model(V3)
    whole = exported(tmp_path, model)
    assert open_gguf(whole).warnings == ()
    old = rewritten(whole, tmp_path / "old.gguf", GROUPS, stored(whole))
    (warning,) = open_gguf(old).warnings
    assert "deepseek2.expert_group_count is missing" in warning
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        assert load_gguf(old).config.blocks[1].feed_forward.router.num_groups == 1
    assert [record.message for record in caplog.records] == [warning]
    assert warning in [f.text for f in examine(old).findings if f.severity == "warning"]
    assert import_gguf(old, tmp_path / "plain", quiet=True).warnings == (warning,)
    # Told what it lacks, it is the model that the weights were made for.
    added = {"expert_group_count": 4, "deepseek2.expert_group_used_count": 2}
    report = import_gguf(old, tmp_path / "told", metadata=added, quiet=True)
    assert report.warnings == ()
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        wanted, plain, told = (
            m.logits(m(tokens).hidden)
            for m in (load_gguf(whole), load_model(tmp_path / "plain"), load_model(tmp_path / "told"))
        )
    assert torch.equal(told, wanted)
    assert not torch.allclose(plain, wanted)
    with pytest.raises(CheckpointError, match=r"expert_count is 8 already"):
        open_gguf(old, metadata={"expert_count": 4})


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("deepseek2.expert_weights_norm", "gates are not normalised"),
        ("deepseek2.expert_weights_scale", "gates are not scaled"),
        ("deepseek2.rope.freq_base", "10000 is taken"),
    ],
)
def test_other_keys_whose_default_is_another_model(key: str, says: str) -> None:
    config = config_of(V3)
    found = describe(config)
    names = {entry.name for entry in stored_tensors(config, found.variants)}
    values = {"general.architecture": found.architecture, **found.values}
    assert read_model(values, Facts(names, config.vocab_size, None), "here")[1] == ()
    del values[key]
    (warning,) = read_model(values, Facts(names, config.vocab_size, None), "here")[1]
    assert warning.startswith(f"{key} is missing: {says}")


def test_a_factor_without_a_type_stretches_linearly() -> None:
    config = config_of(MODELS["llama-linear"])
    found = describe(config)
    names = {entry.name for entry in stored_tensors(config, found.variants)}
    values = {"general.architecture": "llama", **found.values}
    del values["llama.rope.scaling.type"]
    again, (warning,) = read_model(values, Facts(names, config.vocab_size, None), "here")
    assert again.blocks[0].attention.rope.scaling.kind == "linear"
    assert "rope.scaling.type is missing: linear is taken" in warning


def test_a_tensor_for_each_expert(tmp_path: Path) -> None:
    name = next(name for name, raw in MODELS.items() if name.startswith("mixtral"))
    whole = exported(tmp_path, random_model(MODELS[name]))
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in stored(whole).items():
        part = key.removesuffix("_exps.weight")
        if part == key:
            tensors[key] = tensor
        else:
            tensors |= {f"{part}.{expert}.weight": tensor[expert] for expert in range(len(tensor))}
    old = rewritten(whole, tmp_path / "old.gguf", {}, tensors)
    wanted, found = load_gguf(whole).state_dict(), load_gguf(old).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    report = import_gguf(old, tmp_path / "imported", quiet=True)
    assert any("one by one" in note for note in report.notes)
    assert examine(old).problems == ()
    del tensors["blk.1.ffn_up.3.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: blk\.1\.ffn_up\.3\.weight"):
        load_gguf(rewritten(whole, tmp_path / "torn.gguf", {}, tensors))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "the tokenizer is left out"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "the tokenizer is left out"),
    ],
)
def test_a_tokenizer_that_nobody_here_reads_stops_nothing_else(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    whole = exported(tmp_path, random_model(V3))
    path = rewritten(whole, tmp_path / "other.gguf", changes, stored(whole))
    report = import_gguf(path, tmp_path / "imported", quiet=True)
    assert any(says in warning for warning in report.warnings)
    assert not (tmp_path / "imported" / "tokenizer.json").exists()
    wanted, found = load_gguf(whole).state_dict(), load_model(tmp_path / "imported").state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert size(path) == size(whole)
    assert examine(path).problems == ()
    assert any("token ids alone" in finding.text for finding in examine(path).findings)


def test_what_an_import_was_told_counts_when_it_is_verified(tmp_path: Path) -> None:
    """A key that the file lacks may be one without which it is no model at all."""
    whole = exported(tmp_path, random_model(V3))
    old = rewritten(whole, tmp_path / "old.gguf", {"deepseek2.context_length": None}, stored(whole))
    told = {"context_length": 512}
    facts = import_(old, tmp_path / "told", metadata=told, verify=True, quiet=True)
    assert [check["sound"] for check in facts["checks"] if check["name"] == "tensors"] == [True]
    with pytest.raises(CheckpointError, match=r"no deepseek2\.context_length"):
        compare_import(old, tmp_path / "told")
    assert compare_import(old, tmp_path / "told", metadata=told).sound


def test_a_dimension_of_one_in_front_is_no_problem(tmp_path: Path) -> None:
    """As older converters wrote the gate of Qwen2-MoE's shared expert."""
    model = random_model(MODELS["qwen2moe"])
    new = exported(tmp_path, model)
    tensors = {name: values[None] if "inp_shexp" in name else values for name, values in stored(new).items()}
    old = rewritten(new, tmp_path / "old.gguf", {}, tensors)
    assert open_gguf(old).tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (1, 64)
    assert examine(old).problems == ()
    assert all(torch.equal(load_gguf(old).state_dict()[name], mine) for name, mine in model.state_dict().items())


def test_a_special_token_that_nobody_needs_may_be_none(tmp_path: Path) -> None:
    """A padding of -1, as some converters wrote it: tokenizer and template are whole without it."""
    files = companions()
    files["tokenizer_config.json"] = files["tokenizer_config.json"].replace(b"{", b'{"pad_token": "</s>", ', 1)
    whole = exported(tmp_path, random_model(MODELS["llama"]), files=files)
    assert open_gguf(whole).metadata["tokenizer.ggml.padding_token_id"] == 1
    odd = rewritten(whole, tmp_path / "odd.gguf", {"tokenizer.ggml.padding_token_id": 2**32 - 1}, stored(whole))
    template = open_gguf(odd).chat_template()
    assert template is not None
    assert template.render([{"role": "user", "content": "a"}]) == "<s>a</s>"
    said = "tokenizer.ggml.padding_token_id is 4294967295, outside the 288 tokens: left out, as in llama.cpp"
    assert import_gguf(odd, tmp_path / "in", quiet=True).warnings == (said,)
    assert load_tokenizer(tmp_path / "in").encode("abc") == load_tokenizer(whole).encode("abc")
    assert "pad_token_id" not in (tmp_path / "in" / "generation_config.json").read_text()
    assert "pad_token" not in (tmp_path / "in" / "tokenizer_config.json").read_text()
