"""Files that finemoe writes, in llama.cpp: it loads them, and its logits are ours.

llama-cpp-python need not be in this interpreter: `FINEMOE_PEER=/path/to/python` names one that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.gguf.gguf_files import DENSE, LATENT, MODELS, QUERIES, SIGMOID, import_folder, moe, random_model, recipe
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import load_gguf

pytest.importorskip("gguf")

PEER = os.environ.get("FINEMOE_PEER", sys.executable)
WITNESS = """
import json, sys
import llama_cpp, numpy as np
for path, ids in json.load(sys.stdin):
    model = llama_cpp.Llama(
        path, n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, type_k=0, type_v=0
    )
    model.eval(ids)
    np.save(path + ".npy", np.array(model.scores[: len(ids)]))
"""
LEAD = {"count": 1, "feed_forward": DENSE}
LITE = recipe({**LATENT, "q_lora_rank": None}, moe({"kind": "softmax_topk"}), leading=LEAD)
MORE = {
    "interleaved": recipe({**QUERIES, "rope": {"layout": "interleaved"}}, DENSE),
    "ntk": recipe({**QUERIES, "rope": {"scaling": {"kind": "ntk", "factor": 4.0}}}, DENSE),
    "deepseek-bias": recipe({**QUERIES, "qkv_bias": True}, moe({"kind": "softmax_topk", "route_scale": 1.5})),
    "27-layers": {**LITE, "num_layers": 27},
    "sigmoid-as-it-is": recipe(LATENT, moe({"kind": "sigmoid_biased", "normalize_gates": False}), tie_embeddings=True),
    "sigmoid-mtp": recipe(LATENT, moe(SIGMOID), leading=LEAD, mtp_depth=1),
}


@pytest.fixture(scope="module")
def peer() -> str:
    if subprocess.run([PEER, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{PEER} has no llama_cpp")
    return PEER


def difference(peer: str, path: Path) -> float:
    """Largest difference of llama.cpp's logits from ours, of the largest of ours."""
    ids = torch.randint(2, 260, (24,))
    subprocess.run([peer, "-c", WITNESS], input=json.dumps([[str(path), ids.tolist()]]), text=True, check=True)
    model = load_gguf(path)
    with torch.no_grad():
        ours = model.logits(model(ids[None]).hidden)[0].numpy()
    return float(np.abs(np.load(f"{path}.npy") - ours).max() / np.abs(ours).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_float32_logits_are_ours(tmp_path: Path, peer: str, name: str) -> None:
    path = tmp_path / "model.gguf"
    source = import_folder(tmp_path / "source", random_model({**MODELS, **MORE}[name]))
    export_gguf(source, path, dtype="F32", quiet=True)
    assert difference(peer, path) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 0.005), ("BF16", 0.05), ("Q8_0", 0.15), ("Q4_0", 0.15)])
def test_other_types_are_loaded_too(tmp_path: Path, peer: str, dtype: str, tolerance: float) -> None:
    """llama.cpp also rounds what it multiplies these by, so that its logits are near, not equal."""
    path = tmp_path / "model.gguf"
    source = import_folder(tmp_path / "source", random_model(MODELS["llama"]))
    export_gguf(source, path, dtype=dtype, quiet=True)
    assert difference(peer, path) < tolerance
