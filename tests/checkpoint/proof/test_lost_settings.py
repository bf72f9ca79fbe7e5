"""What was written is read back: a setting that a format has no field for refuses the export, and is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finemoe
from checkpoint.gguf.gguf_files import DENSE, LATENT, LLAMA3, MODELS, QUERIES, config_of, recipe
from finemoe.checkpoint.weights.agreement import SINGLE, differences
from finemoe.model.config import ModelConfig

ROOT = Path(__file__).parents[3]
FIELD = """    route_scale: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
"""
CODE = """
import sys
from pathlib import Path
from checkpoint.gguf.gguf_files import MODELS, config_of, import_folder, random_model
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.metadata import describe
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import representable_as
from finemoe.core.errors import CheckpointError

def model(temperature):
    raw = {**MODELS["deepseek"], "feed_forward": {**MODELS["deepseek"]["feed_forward"]}}
    raw["feed_forward"]["router"] = {"kind": "softmax_topk", "temperature": temperature}
    return raw

def refusal(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except CheckpointError as error:
        return str(error)
    raise SystemExit(f"{call.__name__} accepted it")

plain, warm = config_of(model(1.0)), config_of(model(2.0))
assert representable_as(plain)["deepseek"] is None
assert describe(plain).architecture == "deepseek"
lost = "the format has no place for blocks.1.feed_forward.router.temperature 2.0 (1.0 there)"
assert representable_as(warm)["deepseek"].startswith(f"the model cannot be written as deepseek: {lost}")
assert None not in representable_as(warm).values()
assert lost in refusal(describe, warm)
here = Path(sys.argv[1])
folder = import_folder(here / "imported", random_model(model(2.0)))
for family in ("deepseek", None):
    assert lost in refusal(export_hf, folder, here / "out", family=family, quiet=True)
assert lost in refusal(export_gguf, folder, here / "out.gguf", quiet=True)
assert sorted(path.name for path in here.iterdir()) == ["imported"]
exports = {entry["family"]: entry for entry in examine(folder).facts["exports"]}
assert not any(entry["possible"] for entry in exports.values())
assert lost in exports["deepseek"]["reason"] and lost in exports["gguf"]["reason"]
"""


def test_a_new_field_of_a_router_is_never_lost_in_silence(tmp_path: Path) -> None:
    """Somebody adds a temperature to a router, in a copy of the package, and thinks of no writer."""
    shutil.copytree(Path(finemoe.__file__).parents[1], tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    router = tmp_path / "src/finemoe/model/moe/routers/softmax_topk.py"
    text = router.read_text()
    assert FIELD.splitlines(keepends=True)[0] in text
    router.write_text(text.replace(FIELD.splitlines(keepends=True)[0], FIELD, 1))
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "here")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def changed(config: ModelConfig, layer: int, part: str, **values: Any) -> ModelConfig:
    table = config.model_dump()
    table["blocks"][layer][part].update(values)
    return ModelConfig.model_validate(table)


CONFIG = config_of(MODELS["deepseek2-v3"])
ROUTER = CONFIG.blocks[2].feed_forward.router.model_dump()


@pytest.mark.parametrize(
    ("layer", "part", "values", "expected"),
    [
        (1, "feed_forward", {"experts_per_token": 2}, ["blocks.1.feed_forward.experts_per_token 3 (2 there)"]),
        (
            2,
            "feed_forward",
            {"router": {**ROUTER, "route_scale": 2.4}},
            ["blocks.2.feed_forward.router.route_scale 2.5 (2.4 there)"],
        ),
        (0, "attention", {"v_head_dim": 8}, ["blocks.0.attention.v_head_dim 16 (8 there)"]),
        (
            0,
            "attention",
            {"rope": {"theta": 9e3}},
            [
                "blocks.0.attention.rope.theta 10000.0 (9000.0 there)",
                "blocks.0.attention.rope.layout interleaved (half_split there)",
            ],
        ),
        (1, "feed_forward", {"balance": {"sequence": 1e-4}, "capacity_factor": 2.0}, []),
    ],
)
def test_every_difference_is_named(layer: int, part: str, values: dict[str, Any], expected: list[str]) -> None:
    assert differences(CONFIG, changed(CONFIG, layer, part, **values)) == expected


def test_models_of_other_shapes_differ() -> None:
    shorter = CONFIG.model_copy(update={"blocks": CONFIG.blocks[:2], "tie_embeddings": True})
    assert differences(CONFIG, shorter) == ["blocks: 3 of them (2 there)", "tie_embeddings False (True there)"]
    dense = CONFIG.model_copy(update={"blocks": (CONFIG.blocks[0],) * 3})
    assert differences(CONFIG, dense)[0] == "blocks.1.feed_forward.kind moe (dense there)"
    assert differences(CONFIG, CONFIG.model_copy(update={"init_std": 0.5, "max_positions": 7})) == []


ROTATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "NTK is a base": ({"scaling": {"kind": "ntk", "factor": 4.0}}, {"theta": 1e4 * 4 ** (16 / 14)}, True),
    "NTK is no other base": ({"scaling": {"kind": "ntk", "factor": 4.0}}, {"theta": 1e4 * 4 ** (16 / 13)}, False),
    "Llama 3 in another unit": (
        {"scaling": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0}},
        {"scaling": {**LLAMA3, "original_max_positions": 4096}},
        True,
    ),
    "Llama 3, another blend": ({"scaling": LLAMA3}, {"scaling": {**LLAMA3, "high_freq_factor": 3.0}}, False),
    "a factor of 1": ({"scaling": {"kind": "linear", "factor": 1.0}}, {}, True),
    "a factor of 2": ({"scaling": {"kind": "linear", "factor": 2.0}}, {}, False),
}


@pytest.mark.parametrize(("ours", "theirs", "same"), ROTATIONS.values(), ids=ROTATIONS)
def test_spellings_of_one_rotation(ours: dict[str, Any], theirs: dict[str, Any], same: bool) -> None:
    first, second = (config_of(recipe({**QUERIES, "rope": rope}, DENSE)) for rope in (ours, theirs))
    assert (differences(first, second) == []) == same


def test_numbers_may_have_been_float32_where_that_is_said() -> None:
    first, second = (config_of(recipe(LATENT, DENSE, norm_eps=eps)) for eps in (1e-6, 1e-6 * (1 + 1e-7)))
    assert differences(first, second, SINGLE) == []
    assert differences(first, second) == ["norm_eps 1e-06 (1.0000001e-06 there)"]
