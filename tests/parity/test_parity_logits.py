"""Our models compute what transformers' do, through files: config.json and safetensors in, logits out, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES, family_of
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from parity.foreign_models import CASES, fill, make, read_folder, relative, reload, tokens, write_folder

TOLERANCE = 1e-5


@pytest.mark.parametrize("case", CASES)
def test_logits_there_and_back(case: str, tmp_path: Path) -> None:
    theirs, ids = make(case), tokens()
    theirs.save_pretrained(tmp_path / "in")
    raw, weights = read_folder(tmp_path / "in")
    import_hf(tmp_path / "in", tmp_path / "imported", quiet=True)
    model = load_model(tmp_path / "imported")
    with torch.no_grad():
        expected, found = theirs(ids).logits, model.logits(model(ids).hidden)
        assert relative(found, expected) <= TOLERANCE
        direct = load_model(tmp_path / "in")
        assert torch.equal(direct.logits(direct(ids).hidden), found)

    export_hf(tmp_path / "imported", tmp_path / "out", quiet=True)
    same, written = read_folder(tmp_path / "out")
    assert same == raw
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    fresh = family_of(raw).from_config(model.config)  # the config of one that was never imported
    (tmp_path / "out" / "config.json").write_text(json.dumps(fresh))
    again = reload(tmp_path / "out")
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    if case == "llama-dynamic":  # plain rotation is written: the same up to the length that the model is made for
        assert again.config.rope_parameters["rope_type"] == "default"
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3"])
def test_no_shared_experts(case: str, tmp_path: Path) -> None:
    """transformers makes shared experts of width 0 then; a file without them fills it."""
    theirs, ids = make(case, n_shared_experts=0), tokens()
    theirs.save_pretrained(tmp_path / "in")
    raw, weights = read_folder(tmp_path / "in")
    write_folder(tmp_path / "out", raw, {name: tensor for name, tensor in weights.items() if tensor.numel()})
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(ids).logits
        assert relative(model.logits(model(ids).hidden), expected) <= TOLERANCE
        fresh = family_of(raw).from_config(model.config)
        (tmp_path / "out" / "config.json").write_text(json.dumps(fresh))
        assert torch.equal(reload(tmp_path / "out")(ids).logits, expected)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama-linear", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 3.0}}),
        ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("olmoe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("deepseek_v2", {"routed_scaling_factor": 15.0}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_group": 3}),
        ("deepseek_v2", {"num_experts_per_tok": 2}),
        ("deepseek_v3", {"n_group": 6}),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1 / 3}}),
        ("glm4_moe", {"topk_group": 3}),
        ("glm4_moe", {"norm_topk_prob": False}),
        ("glm4_moe", {"routed_scaling_factor": 2.4}),
        ("glm4_moe-whole-heads", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3-yarn-two", {"rope_parameters": {"mscale": 1.0}}),
        ("deepseek_v3-yarn-two", {"rope_parameters": {"mscale_all_dim": 1.0}}),
        ("deepseek_v3-yarn-two", {"rope_parameters": {"beta_slow": 0.5}}),
        ("deepseek_v3-yarn-two", {"rope_parameters": {"factor": 30.0}}),
    ],
    ids=str,
)
def test_every_setting_counts(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    """What the parity above would not notice, it does not test."""
    theirs, ids = make(case), tokens()
    theirs.save_pretrained(tmp_path)
    raw, weights = read_folder(tmp_path)
    rope = {**raw["rope_parameters"], **change.get("rope_parameters", {})}
    if rope["rope_type"] == "default":
        kept = ("rope_type", "rope_theta", "partial_rotary_factor")
        rope = {key: rope[key] for key in kept if key in rope}
    family = family_of(raw)
    model = fill(family.to_config({**raw, **change, "rope_parameters": rope}), family.name, weights)
    with torch.no_grad():
        assert relative(model.logits(model(ids).hidden), theirs(ids).logits) > 1e-3


CLASSES = {case.split("-")[0]: name for case, (name, _) in CASES.items()}
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "mistral": {"sliding_window": 131_072},
}
"""What a config needs said, though its class says nothing."""
OTHERWISE = {"deepseek_v2": {"n_routed_experts", "n_shared_experts"}}
"""Where DeepSeek's own code takes none, and transformers some."""


@pytest.mark.parametrize("family", CLASSES)
def test_a_field_that_is_left_out_means_what_transformers_takes(family: str) -> None:
    """Or it is missing, where the family has no default for it."""
    theirs = getattr(transformers, f"{CLASSES[family]}Config")(**NEEDED.get(family, {}))
    full = {key: value for key, value in json.loads(theirs.to_json_string(False)).items() if value is not None}
    read = FAMILIES[family].to_config
    expected, left_out = read(full), 0
    for name in sorted(full.keys() - {"model_type", *NEEDED.get(family, {}), *OTHERWISE.get(family, set())}):
        try:
            found: ModelConfig | str = read({key: value for key, value in full.items() if key != name})
        except CheckpointError as error:
            found = str(error)
        if isinstance(found, str):
            assert f"`{name}` is missing" in found
        else:
            left_out += 1
            assert found == expected, name
    assert left_out > 10


def test_every_native_family_has_a_case() -> None:
    assert {case.split("-")[0] for case in CASES} == {name for name, family in FAMILIES.items() if family.native}
