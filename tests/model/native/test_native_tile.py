"""Which tile the products get: the fastest where that is clear, and the same bits by any of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from finemoe.core import extension
from finemoe.model import native
from finemoe.model.native.tile import PRODUCTS

pytestmark = pytest.mark.skipif(extension.find_compiler() is None, reason="no C++ compiler")
HERE = Path(native.__file__).parent
STEP = """
import hashlib, sys
from finemoe.core import extension

extension.FLAGS = (*extension.FLAGS, *sys.argv[1:])
import torch
from finemoe.model import native
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from model.native.test_native_team import LATENT, WIDE

assert native.available()
torch.set_num_threads(2)
digest = hashlib.sha256()
for table in (WIDE, {**WIDE, "attention": LATENT}):
    model = Transformer(expand(resolve(table, "the test")))
    initialize(model, seed=3)
    tokens = torch.arange(2 * 700).view(2, 700) * 13 % 50
    hidden = model(tokens).hidden.flatten(0, 1)
    model.backend.cross_entropy_sum(hidden, model.head_weight, tokens.flatten(), torch.ones(len(hidden))).backward()
    digest.update(hidden.detach().numpy().tobytes())
    for parameter in model.parameters():
        digest.update(parameter.grad.numpy().tobytes())
print(digest.hexdigest())
"""

ATTENTION = """
import hashlib, sys
from pathlib import Path
import torch
from finemoe.core import extension

assert extension.load("attention", Path(sys.argv[1]), (*extension.FLAGS, *sys.argv[2:])) is None
from finemoe.model.native.attention import attention

digest = hashlib.sha256()
for queries in (1, 3, 8, 12, 13, 20, 28, 29, 90):
    torch.manual_seed(queries)
    query, key, value = torch.randn(1, 4, queries, 32), torch.randn(1, 2, 600, 32), torch.randn(1, 2, 600, 32)
    last = torch.arange(601 - queries, 601).view(1, queries)
    digest.update(attention(query, key, value, None, last, 0.2).contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def compiled(flags: Sequence[str], folder: Path) -> Path:
    compiler = extension.find_compiler()
    assert compiler is not None
    source, program = Path(__file__).with_name("products.cpp"), folder / "products"
    flags = [*extension._flags(extension.FLAGS, compiler), *flags, f"-I{HERE}"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    return program


def test_every_tile_makes_the_same_bits(tmp_path: Path) -> None:
    """Two that share neither tile nor columns; odd shapes, both ways to pack."""
    made = []
    for flags in ((), ("-DFINEMOE_TILE=1", "-DFINEMOE_BLOCK=256")):
        made.append(subprocess.run([compiled(flags, tmp_path)], stdout=subprocess.PIPE, check=True).stdout)
    assert len(made[0]) > 5_000_000
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_training_step_is_the_same_by_the_other_tile() -> None:
    """Attention and its backward pass too, whose blocks hold whole tiles."""
    digests = set()
    for flags in ((), ("-DFINEMOE_TILE=1", "-DFINEMOE_BLOCK=256")):
        command = [sys.executable, "-c", STEP, *flags]
        tests = str(Path(__file__).parents[2])
        path = {**os.environ, "PYTHONPATH": f"{tests}:{tests}/../src"}
        digests.add(subprocess.run(command, env=path, stdout=subprocess.PIPE, check=True, timeout=900).stdout)
    assert len(digests) == 1


@pytest.mark.slow
def test_a_few_queries_over_many_keys_meet_them_in_the_same_parts(tmp_path: Path) -> None:
    """As where a text is gone on with: how many queries are few must not hang on the tile."""
    sources, digests = tmp_path / "sources", set()
    sources.mkdir()
    for source in (*HERE.glob("*.h"), *HERE.glob("attention*.cpp")):
        shutil.copyfile(source, sources / source.name)
    path = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), "FINEMOE_CACHE": str(tmp_path / "cache")}
    for tile in (0, 1):
        command = [sys.executable, "-c", ATTENTION, str(sources), f"-DFINEMOE_TILE={tile}"]
        digests.add(subprocess.run(command, env=path, stdout=subprocess.PIPE, check=True, timeout=900).stdout)
    assert len(digests) == 1


def chosen(seconds: Sequence[float], flags: Sequence[str] = ()) -> tuple[str, ...]:
    """What is chosen where the tiles take so long; nothing is compiled."""
    return extension.fastest("true", flags, PRODUCTS, HERE, lambda programs: seconds[: len(programs)])


@pytest.mark.parametrize(
    ("seconds", "number"),
    [([1.0, 0.8, 0.9, 0.7, 1.1, 0.9], 3), ([1.0, 0.8, 0.9, 1.2, 1.1, 0.9], 1), ([1.0] * 5 + [0.5], 5)],
)
def test_the_fastest_is_taken(seconds: list[float], number: int) -> None:
    assert chosen(seconds) == PRODUCTS.variants[number]


@pytest.mark.parametrize("seconds", [[1.0] * 6, [1.0, 0.93, 0.95, 1, 1, 0.94], [0.5] + [1.0] * 5, [float("nan")] * 6])
def test_the_usual_one_stays_where_none_is_clearly_faster(seconds: list[float]) -> None:
    assert chosen(seconds) == ()


def test_flags_that_name_a_tile_are_left_alone() -> None:
    assert chosen([1.0, 0.1, 1, 1, 1, 1], ["-O3", "-DFINEMOE_TILE=0"]) == ()


def test_what_cannot_be_compiled_or_run_costs_the_choice_alone(tmp_path: Path) -> None:
    assert extension.fastest(str(tmp_path / "no-compiler"), (), PRODUCTS, HERE) == ()
    assert extension.fastest("false", (), PRODUCTS, HERE, lambda programs: [1.0, 0.1, 1, 1, 1, 1]) == ()

    def fails(programs: Sequence[Path]) -> list[float]:
        raise subprocess.CalledProcessError(1, str(programs[0]))

    assert extension.fastest("true", (), PRODUCTS, HERE, fails) == ()
    says_no_number = Path("/bin/echo")
    assert extension.fastest("true", (), PRODUCTS, HERE, lambda programs: extension.in_turns([says_no_number])) == ()


def test_programs_say_how_long_they_took(tmp_path: Path) -> None:
    program, count = tmp_path / "says", tmp_path / "count"
    program.write_text(f"#!/bin/sh\nread n < {count}; echo $((n - 1)) > {count}; echo 0.$n\n")
    program.chmod(0o755)
    count.write_text("9\n")
    assert extension.in_turns([program]) == [0.3]  # the least of seven


def test_what_was_chosen_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library that is not torch's, so that it compiles in no time."""
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(extension, "_compile", lambda compiler, sources, flags, library: library.write_text(str(flags)))
    monkeypatch.setattr(extension.torch.ops, "load_library", lambda library: None)
    monkeypatch.setattr(extension, "in_turns", lambda programs: [1.0, 0.5, 1, 1, 1, 1])
    monkeypatch.setattr(extension, "FLAGS", ("-O1", "-std=c++20"))
    assert extension.load_from("finemoe.model.native", "sample", PRODUCTS) is None
    (library,) = tmp_path.glob("extensions/sample-*/sample.so")
    assert all(flag in library.read_text() for flag in PRODUCTS.variants[1])
    assert extension.state_of("finemoe.model.native", "sample").endswith(" ".join(PRODUCTS.variants[1]))
    monkeypatch.setattr(extension, "in_turns", lambda programs: 1 / 0)  # measured once
    assert extension.load_from("finemoe.model.native", "sample", PRODUCTS) is None
    library.unlink()
    monkeypatch.setattr(extension, "in_turns", lambda programs: [1.0] * 6)
    assert extension.load_from("finemoe.model.native", "sample", PRODUCTS) is None
    assert not any(flag in library.read_text() for flag in PRODUCTS.variants[1])
    assert extension.state_of("finemoe.model.native", "sample") == "built"
