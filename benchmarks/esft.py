"""Expert-specialised fine-tuning beside full fine-tuning and LoRA, at equal steps: what is gained, and what is lost.

python -m benchmarks.esft MODEL

MODEL is a mixture that was trained here on the interpreter's standard library, such as an arm of `make demo`. The task
is made of the same library, so that nothing has to be downloaded: given a function's signature, write the first
sentence of its docstring. Experts are chosen by their relevance on the task's training texts. Gained is the loss on
held-out answers, lost is the loss on held-out files of the library, both against the model before. For every arm
learning rates, each twice the one before, are tried on a seed of its own until the best lies inside of them. A table is
printed, whatever its signs, and a whole run writes benchmarks/results/esft.json; `--quick` shows in a minute that
everything works.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from finemoe.analysis.reports import relevance
from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.config import to_json
from finemoe.core.environment import environment
from finemoe.core.statistics import ratio
from finemoe.data.config import DataConfig
from finemoe.data.corpora import StdlibCorpus, read_corpus
from finemoe.data.documents.document import SkipReport
from finemoe.data.pipeline import PreparedData, prepare
from finemoe.runs.run import train
from finemoe.training.validation import validate

RESULTS = Path(__file__).parent / "results" / "esft.json"
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
RATES = {"full": (1e-3, 2e-3, 4e-3), "LoRA": (4e-3, 8e-3, 1.6e-2), "ESFT": (8e-3, 1.6e-2, 3.2e-2)}
LENGTH, STEPS, MOST = 160, 120, 3000


def functions(most: int) -> Iterator[dict[str, str]]:
    """Signatures of the standard library with the first sentence of their docstrings."""
    seen = set()
    for item in read_corpus(StdlibCorpus(), 0.05, SkipReport(quiet=True)):
        if item.side != "train":
            continue
        try:
            tree = ast.parse(item.document.text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not isinstance(node, ast.FunctionDef) or not said:
                continue
            first = said.split("\n\n")[0].replace("\n", " ").split(". ")[0].strip().rstrip(".") + "."
            asked = f"def {node.name}({ast.unparse(node.args)}):"
            if asked in seen or not 15 <= len(first) <= 160 or len(asked) > 160:
                continue
            seen.add(asked)
            yield {"prompt": asked, "completion": first}
            if len(seen) == most:
                return


def recipe(model: Path, task: Path, arm: dict[str, Any], rate: float, seed: int, steps: int) -> dict[str, Any]:
    """A run of one arm."""
    return {
        "start_from": str(model),
        "seed": seed,
        "method": {"kind": "sft", "samples": 1, "sample_tokens": 40},
        "trainable": arm,
        "data": {"corpus": {"kind": "files", "paths": [str(task)]}, "sequence_length": LENGTH, "validation_share": 0.1},
        "training": {"steps": steps, "tokens_per_step": 16 * LENGTH, "threads": 1, "evaluate_every": steps},
        "optimizer": {"learning_rate": rate},
        "kernels": {"experts": "native", "products": "native"},
    }


def general_loss(run: Path, held: PreparedData) -> float:
    """Nats a token on held-out files of the library."""
    model = open_language_model(run).model
    found = validate(model, held.validation_batches(32), isolate_documents=False, bytes_per_token=1.0)
    return found.loss


def sizes(run: Path) -> dict[str, int]:
    """What training keeps: trained parameters, bytes of the optimizer's state."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    nbytes = (newest / "optimizer.safetensors").stat().st_size
    return {"optimizer_bytes": nbytes, "trained": nbytes // 8}


def measured(model: Path, task: Path, held: PreparedData, arm: dict[str, Any], rate: float, seed: int,
             steps: int) -> dict[str, float]:  # fmt: skip
    """One run: what it gained and lost."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(recipe(model, task, arm, rate, seed, steps), out=Path(folder) / "run", quiet=True)
        summary = run.summary
        return {
            "task": summary["final_validation_loss"],
            "general": general_loss(run.directory, held),
            "seconds": summary["seconds"],
            **sizes(run.directory),
        }


def best_rate(loss: Callable[[float], float], rates: Sequence[float], most: int) -> tuple[float, dict[float, float]]:
    """The rate of the least loss, and the loss of each; while it is the first or the last, one beyond it is tried."""
    tried = {rate: loss(rate) for rate in rates}
    for _ in range(most):
        best = min(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            break
        beyond = best * 2 if best == max(tried) else best / 2
        tried[beyond] = loss(beyond)
    return min(tried, key=tried.__getitem__), dict(sorted(tried.items()))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half of its 95 % interval."""
    found = ratio(list(values))
    return {"mean": found.value, "half": found.half_interval()}


def main() -> None:
    """Run the whole, or a look at it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    seeds, steps, most = (SEEDS[:2], 10, 300) if args.quick else (SEEDS, STEPS, MOST)
    torch.set_num_threads(1)
    started = time.perf_counter()
    opened = open_language_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        task, texts, chosen = (Path(folder) / name for name in ("task.jsonl", "texts", "selection.json"))
        records = list(functions(most))
        task.write_text("".join(json.dumps(record) + "\n" for record in records))
        texts.mkdir()
        (texts / "task.txt").write_text("\n\n".join(f"{one['prompt']}\n{one['completion']}" for one in records))
        selected = relevance(args.model, corpora=[f"task={texts}"], selection=chosen, tokens=32_768)
        selection = json.loads(chosen.read_text())
        tokenizer = Path(folder) / "tokenizer.json"
        opened.tokenizer.save(tokenizer)
        config = DataConfig(corpus=StdlibCorpus(), tokenizer=str(tokenizer), sequence_length=256)
        held = prepare(config)
        arms: dict[str, dict[str, Any]] = {
            "full": {"kind": "everything"},
            "LoRA": {"kind": "lora", "rank": 4},
            "ESFT": {"kind": "experts", "selection": str(chosen)},
        }
        before = general_loss(args.model, held)
        results: dict[str, Any] = {"before": {"general": before}, "arms": {}}
        for name, arm in arms.items():

            def loss(rate: float, arm: dict[str, Any] = arm) -> float:
                return measured(args.model, task, held, arm, rate, TUNING_SEED, steps)["task"]

            rates = RATES[name][:1] if args.quick else RATES[name]
            best, tried = best_rate(loss, rates, most=0 if args.quick else 4)
            runs = [measured(args.model, task, held, arm, best, seed, steps) for seed in seeds]
            results["arms"][name] = {"rate": best, "tried": {str(k): v for k, v in tried.items()}, "runs": runs}
            print(name, json.dumps({key: spread([run[key] for run in runs]) for key in runs[0]}), flush=True)
        start = recipe(args.model, task, arms["full"], 1e-3, 0, 1)
        one = train(start, out=Path(folder) / "before", quiet=True)
        results["before"]["task"] = json.loads(first_validation(one.directory))["validation_loss"]
    results |= {
        "command": f"python -m benchmarks.esft MODEL{' --quick' if args.quick else ''}",
        "date": date.today().isoformat(),
        "model": json.loads(to_json(opened.model.config))
        if args.quick
        else hashlib.sha256(to_json(opened.model.config).encode()).hexdigest()[:12],
        "functions": len(records),
        "steps": steps,
        "trainable_share": selection["trainable_share"],
        "experts": {str(layer["layer"]): len(layer["experts"]) for layer in selection["layers"]},
        "relevance_tokens": selected.get("tokens"),
        "environment": environment(),
        "seconds": round(time.perf_counter() - started),
    }
    out = args.out or (None if args.quick else RESULTS)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    table(results)


def first_validation(run: Path) -> str:
    """The record of step 0."""
    return next(line for line in (run / "metrics.jsonl").read_text().splitlines() if '"validation"' in line)


def table(results: dict[str, Any]) -> None:
    """For people."""
    before = results["before"]
    print(f"before: task {before['task']:.4f}, general {before['general']:.4f}")
    for name, arm in results["arms"].items():
        runs = arm["runs"]
        gain = spread([run["task"] - before["task"] for run in runs])
        loss = spread([run["general"] - before["general"] for run in runs])
        print(
            f"{name:6} rate {arm['rate']:g}: task {gain['mean']:+.4f} ± {gain['half'] or 0:.4f}, general "
            f"{loss['mean']:+.4f} ± {loss['half'] or 0:.4f}, trained {runs[0]['trained']:,}, optimizer "
            f"{runs[0]['optimizer_bytes'] / 1e6:.2f} MB, {sum(run['seconds'] for run in runs) / len(runs):.1f} s"
        )
    for other in ("full", "LoRA"):
        for key in ("task", "general"):
            pairs = zip(results["arms"]["ESFT"]["runs"], results["arms"][other]["runs"], strict=True)
            apart = spread([ours[key] - theirs[key] for ours, theirs in pairs])
            print(f"ESFT minus {other}, {key}: {apart['mean']:+.4f} ± {apart['half'] or 0:.4f}")


if __name__ == "__main__":
    main()
