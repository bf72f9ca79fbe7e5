"""What weights of 8 and 4 bits lose: held-out loss, and how often the best next token is still the same.

PYTHONPATH=src python -m benchmarks.small_weights MODEL [--text FILE]

MODEL is anything that `finemoe generate` opens. The text is a file, or Python's language reference, which every
interpreter carries. Each form of the model reads the same windows: float32; int8 and int4 as `--weights` makes them;
and Q8_0 and Q4_0 as `finemoe export --dtype` writes them, whose rounding is that of the package `gguf`, ggml's own.
Results go to benchmarks/results/small-weights.json, under the model's name.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.smollm2 import reference_text
from torch import Tensor

from finemoe.checkpoint.conversion import export
from finemoe.checkpoint.open import load_model, load_tokenizer
from finemoe.model.transformer import Transformer

RESULTS = Path(__file__).parent / "results" / "small-weights.json"
WINDOW, WINDOWS = 256, 16


def forms(source: Path, folder: Path) -> Iterator[tuple[str, Transformer]]:
    """Each form of the model by name, one at a time."""
    yield "float32", load_model(source)
    yield "int8", load_model(source, small="int8")
    yield "int4", load_model(source, small="int4")
    for kind in ("Q8_0", "Q4_0"):
        path = folder / f"{kind}.gguf"
        export(source, path, dtype=kind.lower(), tokenizer=False, quiet=True)
        yield f"ggml's {kind}", load_model(path, small="stored")


@torch.inference_mode()
def read(model: Transformer, windows: Tensor) -> tuple[float, Tensor, float]:
    """Nats a token, the best next tokens, and seconds."""
    total, best, started = 0.0, [], time.perf_counter()
    for window in windows:
        hidden = model(window[None, :-1]).hidden[0]
        logits = model.logits(hidden).float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        best.append(logits.argmax(-1))
    return total / windows[:, 1:].numel(), torch.stack(best), time.perf_counter() - started


def measure(source: Path, text: str) -> dict[str, Any]:
    """Of every form: bytes of weights, loss, agreement with float32."""
    table: dict[str, Any] = {}
    ids = torch.tensor(load_tokenizer(source).encode(text)[: WINDOWS * (WINDOW + 1)])
    windows = ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    best: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, model in forms(source, Path(folder)):
            loss, chosen, seconds = read(model, windows)
            best = chosen if best is None else best
            agreement = (chosen == best).float().mean().item()
            nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
            table[name] = {"bytes": nbytes, "loss": loss, "agreement": agreement}
            print(
                f"{name:>12}  {nbytes / 1e6:8.1f} MB  loss {loss:.4f}  same best token {agreement:.4f}  {seconds:.1f} s"
            )
    return {"tokens": windows[:, 1:].numel(), "forms": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    text = reference_text() if options.text is None else options.text.read_text(encoding="utf-8")
    found = measure(options.model, text)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    place = {"machine": platform.machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    results[options.model.resolve().name] = {**place, "text": str(options.text or "pydoc_data.topics"), **found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
