"""A mixture of 16.4 billion weights on this machine: DeepSeekMoE 16B's shape, weights drawn at random, 4 bits each.

PYTHONPATH=src python -m benchmarks.large_mixture [--folder DIR] [--peer PYTHON] [--memory GIB ...] [--scale SHARE]

Weights are drawn as blocks, by the names of their tensors, so that whatever form they are written in they are the
same: first the folder that `finemoe quantize` would make, which is decoded where it lies, as a whole and with less
memory than it has (a control group; root alone may make one, and empty the system's cache of files); then a GGUF
file, which finemoe and llama.cpp open, one after the other, and decode in turn. Ten gigabytes of disk are needed, twice
that of memory for the file. Figures go to benchmarks/results/large-mixture.json where all of it was measured;
--scale 0.1 is a tenth of the layers, to see that it works, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.process import Peer
from torch import Tensor

from finemoe.checkpoint.gguf.exporting import write_gguf
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.safetensors import Index, TensorFolder, TensorInfo, span
from finemoe.checkpoint.weights.exportable import Exportable
from finemoe.checkpoint.weights.imported import ImportedWriter
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import formats_for, small_shape
from finemoe.core.environment import environment
from finemoe.core.logs import progress
from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import find_preset, resolve
from finemoe.model.quantised.blocks import Format
from finemoe.model.size import measure

RESULTS = Path(__file__).parent / "results" / "large-mixture.json"
PRESET, STD = "deepseek-moe-16b", 0.006
APART = 100
"""How much larger the words' own numbers are: tokens stay apart, so that they need other experts, as learnt ones do."""
PROMPT, TOKENS, REPEATS = 32, 32, 5
GROUP = Path("/sys/fs/cgroup/memory")
"""Where groups with a bound on memory are made, as the first version of control groups has them."""


class Drawn(TensorFolder):
    """Tensors that are nowhere: each is drawn when it is read, and always the same."""

    def __init__(self, config: ModelConfig) -> None:
        wanted = model_shapes(config)
        self.small = formats_for("int4", wanted)
        nowhere = Path("drawn")
        infos = {}
        for name, shape in wanted.items():
            kind = self.small.get(name)
            stored = shape if kind is None else small_shape(name, shape, kind)
            dtype = torch.float32 if kind is None else torch.uint8
            infos[name] = TensorInfo(name, dtype, stored, nowhere, 0, math.prod(stored) * dtype.itemsize)
        super().__init__(infos)
        self._last: tuple[Any, Tensor] = ((), torch.empty(0))

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def read(self, name: str, index: Index = ()) -> Tensor:
        shape, at = self.info(name).shape, tuple(index)
        span(shape, index)
        first = at[0] if at and isinstance(at[0], int) and len(shape) > 3 else None  # an expert by itself
        key = (name, first)
        if self._last[0] != key:
            self._last = (
                key,
                self._draw(f"{name} {first}", shape if first is None else shape[1:], self.small.get(name)),
            )
        found = self._last[1]
        for place in at if first is None else at[1:]:
            found = found[place]
        return found.clone()

    def _draw(self, key: str, shape: tuple[int, ...], kind: Format | None) -> Tensor:
        random = np.random.Generator(np.random.SFC64(zlib.crc32(key.encode())))
        if kind is None:
            drawn = random.standard_normal(math.prod(shape), dtype=np.float32)
            one = torch.from_numpy(drawn).view(shape)
            return one * STD if len(shape) > 1 else torch.ones(shape)
        std = STD * (APART if key.startswith("embedding") else 1)
        blocks = torch.frombuffer(bytearray(random.bytes(math.prod(shape))), dtype=torch.uint8).view(shape)
        steps = 256 if kind.name == "Q8_0" else 16  # as often each: their deviation is this over the root of 12
        scale = torch.tensor([std * 12**0.5 / steps], dtype=torch.float16)
        blocks[..., :2] = scale.view(torch.uint8)
        return blocks


def write_folder(config: ModelConfig, drawn: Drawn, folder: Path) -> None:
    """As `finemoe quantize` would."""
    folder.mkdir()
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in drawn.tensors.values()]
    with ImportedWriter(folder, specs, []) as writer, progress("drawing", drawn.nbytes, "bytes") as advance:
        for info in drawn.tensors.values():
            places: Sequence[Index] = [(e,) for e in range(info.shape[0])] if len(info.shape) > 3 else [()]
            for index in places:
                tensor = drawn.read(info.name, index)
                writer.weights.write(info.name, tensor, index)
                advance(tensor.nbytes)
        about = {"family": "quantised", "format": "int4"}
        writer.finish(config, about, {"config": {}, "tensors": {}}, {}, quiet=False)


@contextmanager
def bounded(nbytes: int | None) -> Iterator[Path | None]:
    """This process, and those that it starts, in a group that holds no more, files' pages included."""
    if nbytes is None:
        yield None
        return
    group, me = GROUP / "finemoe-benchmark", str(os.getpid())
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        (group / "tasks").write_text(me)
        yield group
    finally:
        (GROUP / "tasks").write_text(me)
        time.sleep(0.5)
        group.rmdir()


def forget_files() -> None:
    """What is in the cache of files belongs to nobody's group: read it again."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def decode(peers: dict[str, Peer], prompt: list[int], drawn: bool) -> dict[str, dict[str, float]]:
    """Tokens a second of each, in turn: median and range.

    `drawn`: other tokens each time, which other experts serve; the best ones of weights that say nothing soon repeat.
    """
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for repeat in range(REPEATS + 1):
        how = {"temperature": 1.0, "seed": repeat} if drawn else {}
        for name, peer in list(peers.items())[:: 1 if repeat % 2 else -1]:
            seconds = peer.ask("generate", prompt=prompt, count=TOKENS, **how)["seconds"]
            if repeat:  # the first reads what was never read
                rates[name].append(1 / seconds)
    return {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in rates.items()
    }


def of_folder(context: Context, folder: Path, prompt: list[int], limit: int | None) -> dict[str, Any]:
    """Start to first token, and decoding, of the folder where it lies."""
    forget_files()
    with bounded(limit) as group, context.own() as own:
        started = time.perf_counter()
        own.ask("open", path=str(folder), small="stored")
        opened = time.perf_counter() - started
        own.ask("generate", prompt=prompt[:1], count=0)
        first = time.perf_counter() - started
        found: dict[str, Any] = {"open": opened, "first_token": first, **decode({"finemoe": own}, prompt, True)}
        if group is not None:
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            found["file_bytes_in_memory"] = next(int(size) for name, size in lines if name == "cache")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room; default: the system's temporary folder")
    parser.add_argument("--peer", default=sys.executable, metavar="PYTHON", help="interpreter that has llama_cpp")
    parser.add_argument("--memory", type=float, nargs="*", default=[], metavar="GIB", help="bounds to decode under")
    parser.add_argument("--scale", type=float, default=1.0, metavar="SHARE", help="of the layers")
    options = parser.parse_args()
    layers = max(2, round(options.scale * find_preset(PRESET).model["num_layers"]))
    config = expand(resolve({"preset": PRESET, "num_layers": layers}, "the benchmark"))
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        parser.error("the system's cache of files must be emptied between measurements, which only root may do")
    size, drawn = measure(config, PROMPT + TOKENS), Drawn(config)
    prompt = shapes.token_ids(config, 1, PROMPT)[0]
    context = Context(REPEATS, False, torch.get_num_threads(), options.peer)
    share = size.active_parameters_without_embedding / size.total_parameters
    sizes = f"{size.total_parameters / 1e9:.2f} billion weights, {drawn.nbytes / 1e9:.2f} GB"
    print(f"{sizes}, {share:.2f} of them used at a time")
    context.peaks.measure()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, file = Path(temporary) / "folder", Path(temporary) / "model.gguf"
        write_folder(config, drawn, folder)
        for limit in (None, *(int(gib * 2**30) for gib in options.memory)):
            key = "folder" if limit is None else f"folder in {limit / 2**30:g} GiB"
            found[key] = of_folder(context, folder, prompt, limit)
            print(key, json.dumps(found[key]), flush=True)
        context.peaks.measure()
        shutil.rmtree(folder)
        opened = Exportable(Path("drawn"), config, drawn, {}, (), small=drawn.small, max_positions=1024)
        write_gguf(opened, file, "Q4_0", tokenizer=False, quiet=False)
        with context.own() as own, context.peer("llama.cpp", "llama_cpp") as peer:
            peers = {"finemoe": own} | ({} if peer is None else {"llama.cpp": peer})
            own.ask("open", path=str(file), small="stored")
            if peer is not None:
                peer.ask("open", path=str(file))
            found["file"] = decode(peers, prompt, False)
            print("file", json.dumps(found["file"]), flush=True)
    context.peaks.measure()
    bandwidth = context.peaks.spreads()["bandwidth"].median
    active = drawn.nbytes - _unused(config, drawn)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "versions": context.versions,
        "parameters": size.total_parameters,
        "bytes": drawn.nbytes,
        "bytes_of_a_token": active,
        "bandwidth": bandwidth,
        "most_that_memory_allows": bandwidth / active,
        "found": found,
    }
    print(json.dumps({key: value for key, value in record.items() if key not in ("environment", "found")}, indent=1))
    if options.scale == 1 and options.memory and "llama.cpp" in found["file"]:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _unused(config: ModelConfig, drawn: Drawn) -> int:
    """Bytes that a token does not read: experts that it does not choose, and the embedding but for a row."""
    total = drawn.info("embedding.weight").nbytes
    for info in drawn.tensors.values():
        if len(info.shape) > 3:
            total += info.nbytes * (info.shape[0] - 6) // info.shape[0]
    return total


if __name__ == "__main__":
    main()
