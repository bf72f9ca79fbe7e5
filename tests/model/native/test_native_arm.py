"""The products on ARM: compiled by a cross compiler, run by an emulator, where both are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from finemoe.core import extension
from finemoe.model import native

CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SOURCES, HERE = Path(native.__file__).parent, Path(__file__).parent
FLAGS = extension._flags([flag for flag in extension.FLAGS if flag != "-march=native"], "c++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CROSS and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user"),
]


def compiled(compiler: str, out: Path, *sources: Path, more: tuple[str, ...] = ()) -> Path:
    names = [str(one) for one in sources]
    subprocess.run([compiler, *FLAGS, *more, f"-I{SOURCES}", *names, "-o", str(out)], check=True, timeout=300)
    return out


def test_products_by_blocks_of_every_format(tmp_path: Path) -> None:
    program = compiled(
        str(CROSS), tmp_path / "arm", HERE / "blocks_of_weights.cpp", SOURCES / "matrix.cpp", more=("-static",)
    )
    done = subprocess.run([str(EMULATOR), program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_large_products_are_those_of_this_machine_to_the_last_bit(tmp_path: Path) -> None:
    theirs = compiled(str(CROSS), tmp_path / "arm", HERE / "products.cpp", more=("-static",))
    own = compiled(str(extension.find_compiler()), tmp_path / "own", HERE / "products.cpp", more=("-march=native",))
    found = [subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout for words in ([EMULATOR, theirs], [own])]
    assert found[0] == found[1]


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cpp")), ids=lambda path: path.stem)
def test_every_kernel_compiles(source: Path, tmp_path: Path) -> None:
    headers = [f"-isystem{path}" for path in include_paths()]
    words = [str(CROSS), *FLAGS, "-fsyntax-only", "-fPIC", *headers, str(source)]
    subprocess.run(words, check=True, timeout=300, cwd=tmp_path)
