"""Child-Tuning beside full fine-tuning on few labelled sentences: its claim, and what is forgotten meanwhile.

python benchmarks/child_tuning.py --data FOLDER

FOLDER holds `subjectivity.zip` and `sentence_polarity.zip` of Pang and Lee (2004, 2005; CC BY 4.0), as NLTK packages
them; they are read where they are. A small mixture is pre-trained once on the sentences of both without their labels,
and then told in 100 or 400 of them, as conversations with an answer of one letter, which is which: fully, with the
child network F, with D, and with D by whole experts. For every seed all four see the same labelled sentences. The class
is the larger logit of the two letters where the answer begins. Learning rates are searched by one rule for each, on
sentences and seeds of their own: each twice the one before, until the best lies inside of them, or two were added. What
is forgotten depends on the rate, so that a second table has all four at one. Tables are printed, whatever their signs,
and benchmarks/results/child-tuning.json written, by a whole run only; `--quick` shows in two minutes that everything
works. One thread, an hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from finemoe.core.statistics import ratio
from finemoe.runs.config import resolve_run
from finemoe.runs.run import first_trainer, train
from finemoe.runs.start import build_method
from finemoe.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "child-tuning.json"
TASKS = {
    "subjectivity": ("subjectivity", ("plot.tok.gt9.5000", "quote.tok.gt9.5000")),
    "polarity": ("sentence_polarity", ("rt-polarity.neg", "rt-polarity.pos")),
}
ANSWERS = ("n", "y")
ARMS: dict[str, dict[str, Any]] = {
    "full": {"kind": "everything"},
    "F": {"kind": "child", "mode": "F", "share": 0.3},
    "D": {"kind": "child", "mode": "D", "share": 0.3},
    "D by expert": {"kind": "child", "mode": "D", "share": 0.3, "granularity": "expert"},
}
STEPS = {100: 120, 400: 240}
RATES = (5e-4, 1e-3, 2e-3)
COMMON_RATE, MORE_RATES = 1e-3, 2
SEEDS = tuple(range(8))
TUNING_SEEDS = {100: (100, 101), 400: (100,)}
TEST, DEV, HELD_OUT = 1000, 500, 1000
MODEL = {"preset": "tiny-moe", "num_layers": 2}
PRETRAINING_TOKENS = 2_000_000
KERNELS = {"attention": "sdpa", "experts": "native", "products": "native"}


def sentences(data: Path, task: str) -> list[list[str]]:
    """Different sentences of each class, in an order of their own."""
    name, files = TASKS[task]
    with zipfile.ZipFile(data / f"{name}.zip") as packed:
        texts = [packed.read(f"{name}/{file}").decode("latin-1").splitlines() for file in files]
    classes = [list(dict.fromkeys(line.strip() for line in lines if line.strip())) for lines in texts]
    both = set(classes[0]) & set(classes[1])
    classes = [[line for line in lines if line not in both] for lines in classes]
    for lines in classes:
        random.Random(0).shuffle(lines)
    return classes


class Study:
    """The parts of the data, the pre-trained model, and runs that begin with it."""

    def __init__(self, data: Path, folder: Path, tokens: int, test: int, steps: Mapping[int, int]) -> None:
        self.folder, self.steps = folder, steps
        self.parts = {task: self._split(sentences(data, task), test) for task in TASKS}
        kept = {line for part in self.parts.values() for side in ("test", "dev") for line, _ in part[side]}
        unlabelled = [line for part in self.parts.values() for line, _ in part["pool"] if line not in kept]
        unlabelled = list(dict.fromkeys(unlabelled))
        random.Random(1).shuffle(unlabelled)
        held = [line for part in self.parts.values() for line, _ in part["test"][: HELD_OUT // len(TASKS)]]
        self.num_unlabelled = len(unlabelled)
        corpus = self._corpus("pretraining", [{"text": line} for line in unlabelled], [{"text": line} for line in held])
        recipe = {
            "name": "pretrained",
            "model": MODEL,
            "data": {"corpus": corpus, "sequence_length": 64, "packing": "isolate", **self._cache()},
            "training": {"tokens": tokens, "tokens_per_step": 2048, "threads": 1, "device": "cpu"},
            "optimizer": {"learning_rate": 0.004},
            "kernels": KERNELS,
        }
        self.base = train(recipe, out=folder / "pretrained", quiet=True)
        self._language = build_method(resolve_run(recipe, "pretraining"))

    def _split(self, classes: list[list[str]], test: int) -> dict[str, list[tuple[str, int]]]:
        """As many of each class for testing and tuning; the rest is the pool that labelled sentences come from."""
        sizes = {"test": test // 2, "dev": DEV // 2, "pool": min(map(len, classes)) - test // 2 - DEV // 2}
        parts, start = {}, 0
        for name, size in sizes.items():
            parts[name] = [(line, label) for label in (0, 1) for line in classes[label][start : start + size]]
            start += size
        known = {line for name in ("test", "dev") for line, _ in parts[name]}
        parts["pool"] = [one for one in parts["pool"] if one[0] not in known]
        return parts

    def _cache(self) -> dict[str, str]:
        return {"cache_dir": str(self.folder / "cache")}

    def _corpus(
        self, name: str, records: Sequence[Mapping[str, str]], validation: Sequence[Mapping[str, str]]
    ) -> dict[str, Any]:
        paths = []
        for side, some in (("train", records), ("validation", validation)):
            path = self.folder / f"{name}-{side}.jsonl"
            path.write_text("\n".join(json.dumps(one) for one in some), encoding="utf-8")
            paths.append([str(path)])
        return {"kind": "files", "paths": paths[0], "validation_paths": paths[1]}

    def labelled(self, task: str, size: int, seed: int) -> list[tuple[str, int]]:
        """Labelled sentences of a seed, as many of each class."""
        drawing = random.Random(f"{task} {size} {seed}")
        pool = self.parts[task]["pool"]
        chosen = [drawing.sample([one for one in pool if one[1] == label], size // 2) for label in (0, 1)]
        return chosen[0] + chosen[1]

    def recipe(
        self, name: str, some: Sequence[tuple[str, int]], held: Sequence[tuple[str, int]], **tables: Any
    ) -> dict[str, Any]:
        """Fine-tuning on `some`."""
        corpus = self._corpus(
            name, *([{"prompt": x, "completion": ANSWERS[y]} for x, y in one] for one in (some, held))
        )
        data = {"corpus": corpus, "sequence_length": 128, "max_validation_tokens": 1_000_000, **self._cache()}
        return {
            "name": "tuned",
            "start_from": str(self.folder / "pretrained"),
            "method": {"kind": "sft", "samples": 0},
            "data": data,
            "training": {"steps": 1, "tokens_per_step": 512, "threads": 1, "device": "cpu"},
            "kernels": KERNELS,
            **tables,
        }

    @cache  # noqa: B019 - a study lives as long as the program
    def questions(self, task: str, side: str) -> Any:
        """Sentences to be classified, as the data of a method that holds them out."""
        recipe = self.recipe(f"{task}-{side}", self.parts[task]["pool"][:50], self.parts[task][side])
        return build_method(resolve_run(recipe, side)).data

    def run(self, task: str, size: int, seed: int, arm: str, rate: float) -> Trainer:
        """A trainer at its end."""
        recipe = self.recipe(
            f"{task}-{size}-{seed}",
            self.labelled(task, size, seed),
            self.parts[task]["dev"][:10],
            seed=seed,
            trainable=ARMS[arm],
            optimizer={"learning_rate": rate},
            training={"steps": self.steps[size], "tokens_per_step": 512, "threads": 1, "device": "cpu"},
        )
        config = resolve_run(recipe, "fine-tuning")
        trainer, _ = first_trainer(config, build_method(config))
        trainer.run()
        return trainer

    def accuracy(self, trainer: Trainer, task: str, side: str) -> float:
        """Share of the sentences of `side` whose class has the larger logit where the answer begins."""
        model, right, letters = trainer.model.eval(), [], self.letters(task, side)
        with torch.no_grad():
            for batch in self.questions(task, side).held_out():
                rows, places = batch.rows, _first_places(batch)
                hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents).hidden[0, places]
                guessed = letters[model.logits(hidden)[:, letters].argmax(-1)]
                right.append(guessed == rows.targets[0, places])
        return torch.cat(right).double().mean().item()

    @cache  # noqa: B019 - a study lives as long as the program
    def letters(self, task: str, side: str) -> torch.Tensor:
        """[2] ids of the tokens that answers begin with."""
        found = [b.rows.targets[0, _first_places(b)] for b in self.questions(task, side).held_out()]
        ids = torch.cat(found).unique()
        if len(ids) != len(ANSWERS):
            raise SystemExit(f"the answers {ANSWERS} begin with {len(ids)} different tokens, and must with two")
        return ids

    def language_loss(self, trainer: Trainer) -> float:
        """Nats a token on sentences that nothing was trained on."""
        with torch.no_grad():
            return float(self._language.measure(trainer.model.eval()).headline)


def _first_places(batch: Any) -> torch.Tensor:
    """Where the answer of each document begins."""
    places = batch.rows.weights[0].nonzero()[:, 0]
    documents = batch.rows.documents[0, places]
    return places[torch.cat((torch.ones(1, dtype=torch.bool), documents[1:] != documents[:-1]))]


def tuned_rates(study: Study, seeds: Mapping[int, Sequence[int]], rates: Sequence[float], more: int) -> dict[str, Any]:
    """Mean accuracy of each rate on the sentences for tuning, by size and arm; the best of them.

    While the best is the first or the last, one beyond it is tried, `more` times at most.
    """
    found: dict[str, Any] = {}
    for size, some in seeds.items():
        for arm in ARMS:
            means: dict[float, float] = {}
            runs = [(task, seed) for task in TASKS for seed in some]
            waiting = list(rates)
            while waiting:
                rate = waiting.pop(0)
                means[rate] = fmean(study.accuracy(study.run(t, size, s, arm, rate), t, "dev") for t, s in runs)
                best = max(means, key=means.__getitem__)
                if not waiting and len(means) < len(rates) + more and best in (min(means), max(means)):
                    waiting = [best * 2 if best == max(means) else best / 2]
            means = dict(sorted(means.items()))
            found[f"{size} {arm}"] = {"rate": best, "accuracy": {str(rate): mean for rate, mean in means.items()}}
            said = ", ".join(f"{rate:g}: {mean:.3f}" for rate, mean in means.items())
            print(f"tuning, {size} examples, {arm}: {said}; {best:g} is taken", flush=True)
    return found


def measured(
    study: Study, rates: Mapping[str, float], seeds: Sequence[int], tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[dict[str, Any]]:
    """A record of every run; `rates` by size and arm."""
    for seed in seeds:
        for task in tasks:
            for size in study.steps:
                for arm in ARMS:
                    started, rate = time.perf_counter(), rates[f"{size} {arm}"]
                    trainer = study.run(task, size, seed, arm, rate)
                    yield {
                        "task": task,
                        "examples": size,
                        "seed": seed,
                        "arm": arm,
                        "rate": rate,
                        "accuracy": study.accuracy(trainer, task, "test"),
                        "language_loss": study.language_loss(trainer),
                        "seconds": round(time.perf_counter() - started, 1),
                    }


def told(runs: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of them, each printed when it is there."""
    found = []
    for run in runs:
        found.append(run)
        said = f"accuracy {run['accuracy']:.3f}, LM loss {run['language_loss']:.3f}, {run['seconds']:.1f} s"
        where = f"seed {run['seed']}, {run['task']}, {run['examples']} examples, {run['arm']}"
        print(f"{where} at {run['rate']:g}: {said}", flush=True)
    return found


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and differences to full fine-tuning, pair by pair; also over both tasks, a pair each."""
    rows = []
    found = list(dict.fromkeys(run["task"] for run in runs))
    for task in (*found, *(["both"] if len(found) > 1 else [])):
        for size in sorted({run["examples"] for run in runs}):
            some = [run for run in runs if run["examples"] == size and task in (run["task"], "both")]
            full = {(run["task"], run["seed"]): run for run in some if run["arm"] == "full"}
            for arm in ARMS:
                own = [run for run in some if run["arm"] == arm]
                row: dict[str, Any] = {"task": task, "examples": size, "arm": arm, "pairs": len(own)}
                for figure in ("accuracy", "language_loss"):
                    mean = ratio([run[figure] for run in own])
                    row[figure] = {"mean": mean.value, "half_interval": mean.half_interval()}
                    if arm != "full":
                        gap = ratio([run[figure] - full[run["task"], run["seed"]][figure] for run in own])
                        row[figure] |= {
                            "difference": gap.value,
                            "difference_half_interval": gap.half_interval(),
                            "p": gap.p_value(),
                        }
                rows.append(row)
    return rows


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """As in docs/log.md."""
    lines = [
        "| task | examples | | accuracy | minus full | p | LM loss | minus full |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy, loss = row["accuracy"], row["language_loss"]
        cells = [row["task"], str(row["examples"]), row["arm"], _with(accuracy, "mean", "half_interval")]
        gap, p = "", ""
        if "p" in accuracy:
            gap, p = _with(accuracy, "difference", "difference_half_interval", "+"), f"{accuracy['p']:.3f}"
        cells += [gap, p, _with(loss, "mean", "half_interval")]
        cells.append(_with(loss, "difference", "difference_half_interval", "+") if "p" in loss else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with(figures: Mapping[str, Any], value: str, half: str, sign: str = "") -> str:
    """A figure with its interval, where there is one."""
    around = f" ± {figures[half]:.3f}" if figures[half] is not None else ""
    return f"{figures[value]:{sign}.3f}{around}"


def revision() -> str:
    """Of the code that ran."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def main() -> None:
    """Pre-train, search rates, run the grid, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two zip files")
    parser.add_argument("--quick", action="store_true", help="few steps, two seeds, one rate; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, started, code = arguments.quick, time.perf_counter(), revision()
    steps = {100: 20} if quick else STEPS
    seeds, rates = (SEEDS[:2], RATES[1:2]) if quick else (SEEDS, RATES)
    tokens, test = (100_000, 200) if quick else (PRETRAINING_TOKENS, TEST)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(arguments.data, Path(folder), tokens, test, steps)
        before = study.base.summary["final_validation_loss"]
        print(f"pre-trained on {study.num_unlabelled:,} sentences: held-out loss {before:.3f}", flush=True)
        found = tuned_rates(study, {size: TUNING_SEEDS[size] for size in steps}, rates, 0 if quick else MORE_RATES)
        runs = told(measured(study, {name: one["rate"] for name, one in found.items()}, seeds))
        alike = told(measured(study, dict.fromkeys(found, COMMON_RATE), seeds, ("subjectivity",)))
    rows, same = table(runs), table(alike)
    print(shown(rows), f"\n\nAll at a rate of {COMMON_RATE:g}:\n\n{shown(same)}", sep="")
    if quick:
        return
    result = {
        "made_by": "python benchmarks/child_tuning.py --data FOLDER",
        "date": date.today().isoformat(),
        "revision": code,
        "machine": f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}",
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "model": {**MODEL, "total_parameters": study.base.summary["total_parameters"]},
        "pretraining": {"tokens": tokens, "sentences": study.num_unlabelled, "held_out_loss": before},
        "steps": {str(size): count for size, count in STEPS.items()},
        "arms": ARMS,
        "tuning": found,
        "table": rows,
        "runs": runs,
        "common_rate": {"rate": COMMON_RATE, "table": same, "runs": alike},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{RESULTS}, {result['minutes']} minutes")


if __name__ == "__main__":
    main()
