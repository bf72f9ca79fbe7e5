"""The kernels built for narrower vectors than this machine has: the same tests pass."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finemoe.core.extension import FLAGS

SETS = {
    "AVX2": "-mavx2 -mfma",
    "tuned for Zen 3": "-mavx2 -mfma -mf16c -mtune=znver3",
    "SSE2": "-mno-avx",
    "sizes of ARM": "-mno-avx -DFINEMOE_SIZES_OF_ARM",
    "the other tile": "-march=native -DFINEMOE_TILE=1 -DFINEMOE_BLOCK=256",
}
TESTS = Path(__file__).parents[2]
CODE = """
import sys
from finemoe.core import extension

extension.FLAGS = tuple(sys.argv[1].split())
import pytest

sys.exit(pytest.main([*sys.argv[2:], "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu and not network"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("c++") is None, reason="needs x86-64 and a C++ compiler"
)
@pytest.mark.parametrize("instructions", list(SETS.values()), ids=list(SETS))
def test_native_tests_pass(instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path))
    flags = " ".join(flag for flag in FLAGS if flag != "-march=native")
    files = [*TESTS.glob("model/native/test_native_*.py"), TESTS / "model/test_cross_entropy.py"]
    files = [str(path) for path in files if path.name != Path(__file__).name]
    command = [sys.executable, "-c", CODE, f"{flags} {instructions}", *files]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "skipped" not in result.stdout.splitlines()[-1]
