"""Large tensors in pages that go from one to the next, each time in a process of its own, since it is for good."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from multiprocessing.connection import Connection

import pytest

from runs.forking import CONTEXT, settle

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="moves pages as Linux does")

BEGIN = """
import os, torch
from pathlib import Path
from finemoe.model import native
torch.set_num_threads(1)
PAGE = 1 << 21

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmRSS" in line).split()[1]) << 10

def tensor(pages, value):
    return torch.full((pages * PAGE // 4,), value)
"""


def run(program: str) -> str:
    """What it says."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(theirs, BEGIN + program), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(120), "it hangs"
        well, said = ours.recv()
    except EOFError:
        well, said = False, "it ended without a word"
    finally:
        process.kill()
        process.join()
    assert well, said
    return str(said)


def _run(connection: Connection, program: str) -> None:
    settle()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(program, {})
        connection.send((True, said.getvalue()))
    except BaseException:
        connection.send((False, traceback.format_exc()))


GAPS = """
from finemoe.core.memory import keep_freed_pages
keep_freed_pages()  # as training has it, or the gaps would be given back to the system, and faulted in again
on = {on} and native.pass_pages_on()
held = [tensor(4, float(n)) for n in range(32)]
before = resident()
held = [one if n % 2 else None for n, one in enumerate(held)]  # 16 gaps of 4 pages each
long = tensor(64, -1.0)
grown = (resident() - before) // PAGE
assert all(one is None or bool((one == n).all()) for n, one in enumerate(held)) and bool((long == -1.0).all())
print(on, grown)
"""


def test_what_is_free_anywhere_is_room_for_what_is_long() -> None:
    """64 pages in 16 gaps: a heap has to grow by as much."""
    on, pages = run(GAPS.format(on=True)).split()
    assert on == "True"
    assert int(pages) <= 1
    assert int(run(GAPS.format(on=False)).split()[1]) >= 60


def test_numbers_stay_whatever_is_made_and_freed_around_them() -> None:
    """Sizes from below a page to 40 MiB, whole pages or not, in an order that was drawn; none lies in another."""
    run("""
import random
assert native.pass_pages_on()
draw, held, most, before = random.Random(0), {}, 0, resident()
for step in range(1000):
    if held and (len(held) > 30 or draw.random() < 0.45):
        name, (one, value) = held.popitem() if draw.random() < 0.3 else (key := draw.choice(list(held)), held.pop(key))
        assert bool((one == value).all()), (step, name)
    else:
        count = draw.choice([1000, PAGE // 4, PAGE // 4 + 1, PAGE // 2, draw.randrange(1, 10 * PAGE)])
        held[step] = torch.full((count,), float(step)), float(step)
        most = max(most, sum(one.nbytes + PAGE for one, _ in held.values()))
assert all(bool((one == value).all()) for one, value in held.values())
assert resident() - before < 1.1 * most + (64 << 20), (resident(), before, most)
""")


def test_a_process_that_is_forked_has_its_own() -> None:
    assert "parent True" in run("""
assert native.pass_pages_on()
held, gap = tensor(8, 1.0), tensor(8, 2.0)
gap = None
child = os.fork()
if child == 0:
    held.fill_(5.0)
    other = tensor(20, 6.0)
    os._exit(0 if bool((other == 6.0).all()) and bool((held == 5.0).all()) else 1)
print("parent", os.waitpid(child, 0)[1] == 0 and bool((held == 1.0).all()))
""")


def test_who_asks_what_is_left_gets_what_is_free() -> None:
    """The next run of the same process would be refused for memory that the last one holds and uses not."""
    run("""
from finemoe.core import memory
assert native.pass_pages_on() and native.pass_pages_on()
held = [tensor(8, float(n)) for n in range(16)]
height = resident()
held = [one for n, one in enumerate(held) if n % 4 == 0]
assert resident() > height - (8 << 20), "what is free stays"
memory.available_bytes()
assert resident() < height - 90 * PAGE, (resident(), height)
more = [tensor(12, 7.0) for _ in range(6)]
assert all(bool((one == 4.0 * n).all()) for n, one in enumerate(held)) and all(bool((one == 7.0).all()) for one in more)
""")


def test_a_tensor_that_grows_keeps_its_numbers() -> None:
    run("""
assert native.pass_pages_on() and native.pass_pages_on()
one = tensor(2, 3.0)
one.untyped_storage().resize_(9 * PAGE)
assert bool((one == 3.0).all())
one.untyped_storage().resize_(0)
copies = [tensor(3, float(n)).clone() for n in range(20)]
assert all(bool((copy == n).all()) for n, copy in enumerate(copies))
""")


def test_training_is_the_same_to_the_bit() -> None:
    """A step of layers whose weights and states are several pages each."""
    program = """
from finemoe.model.native.experts import swiglu
assert native.available()
{on}
torch.manual_seed(0)
weights = [torch.randn(shape, requires_grad=True) for shape in ((1536, 1024), (1536, 1024), (1024, 1536))]
optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
states = torch.randn(700, 1024)
for _ in range(3):
    loss = swiglu(states, *(one * 0.03 for one in weights), None).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(loss.item().hex(), [one.double().sum().item().hex() for one in weights])
"""
    assert run(program.format(on="assert native.pass_pages_on()")) == run(program.format(on=""))


def test_no_more_memory_than_there_is_is_torchs_own_error() -> None:
    assert "memory" in run("""
import resource
assert native.pass_pages_on()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
held = [tensor(4, 1.0) for _ in range(4)]
try:
    torch.empty(1 << 40, dtype=torch.uint8)
except RuntimeError as error:
    print(str(error)[:200])
assert all(bool((one == 1.0).all()) for one in held) and bool((tensor(4, 2.0) == 2.0).all())
""")
