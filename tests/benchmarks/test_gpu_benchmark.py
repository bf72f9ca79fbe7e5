"""`make gpu` without a GPU: what it says, what it writes and leaves alone, and its parts at tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.needs import NEEDS, missing, sentence
from benchmarks.speed.device import device_memory, forget_peak, seconds_on, settle
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import ratios

ROW = {
    "key": "layer",
    "what": "MoE / torch dense",
    "ours": {"name": "grouped_mm", "samples": [2.0, 3.0], "unit": "s"},
    "peer": {"name": "torch dense", "samples": [1.0, 1.0], "unit": "s"},
    "values": [2.0, 3.0],
}
FOUND = {
    "rows": [ROW],
    "peaks": {"gemm": [7e14], "bandwidth": [3e12]},
    "notes": ["a note"],
    "memory": {"finemoe": 2**31},
}


def setting() -> parts.Setting:
    return parts.Setting("cpu", quick=True, repeats=1)


# what it says and writes


def test_without_a_gpu_one_sentence_and_no_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.json"
    results.write_text("of another day")
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("measured"))
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("There is no CUDA device that torch")
    assert results.read_text() == "of another day"


def test_without_torch_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "importable", lambda name: name != "torch")
    assert gpu.main([]) == 2
    assert "has no torch, so nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--device", "cpu"], ["--repeats", "0"], ["--only", "nothing"]])
def test_arguments_that_make_no_sense_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu.arguments(given)
    assert left.value.code == 2
    assert "error" in capsys.readouterr().err


def test_time_for_all_parts_is_under_nine_minutes() -> None:
    assert set(gpu.SECONDS) == set(NEEDS) == {"tests", *parts.PARTS}
    assert sum(gpu.SECONDS.values()) < 9 * 60 - 20


def test_what_is_missing_is_said_in_one_line() -> None:
    lacking = missing("step", lambda name: name not in ("pydantic", "zstandard"))
    assert lacking == ["pydantic", "zstandard"]
    said = sentence("step", lacking)
    assert "this Python has no pydantic, zstandard" in said
    assert "PYTHONPATH" in said
    assert "\n" not in said


def measured(monkeypatch: pytest.MonkeyPatch, run: gpu.Run, given: Sequence[str], cuda: bool = True) -> int:
    """`main` on a machine that seems to have a GPU, with processes that are not started."""
    for name in ("run_part", "run_tests"):
        function = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *args, function=function: function(*args, run=run))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    properties = type("Properties", (), {"name": "a card", "total_memory": 1, "multi_processor_count": 2})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return gpu.main(list(given))


def writing(failing: str | None = None, stopped: str | None = None, half: bool = False) -> gpu.Run:
    """A run of every part that writes `FOUND`; a stopped one before, or after, it had something to write."""

    def run(command: Sequence[str], seconds: float) -> gpu.Finished:
        name = command[3]
        if name == stopped:
            if half:
                Path(command[command.index("--out") + 1]).write_text(json.dumps(FOUND))
            return None, "", ""
        if "pytest" in command:
            return 0, "....\n4 passed in 1.00s\n", ""
        if name == failing:
            return 1, "", "Traceback\nRuntimeError: loop is off by 3.0e-01 of the norm\n"
        Path(command[command.index("--out") + 1]).write_text(json.dumps(FOUND))
        return 0, "", ""

    return run


def test_a_whole_run_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    assert measured(monkeypatch, writing(), []) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"]["layer"] == FOUND
    assert written["tests"] == {"passed": True, "said": "4 passed in 1.00s"}
    assert written["device"]["name"] == "a card"
    assert written["versions"]["torch"] == torch.__version__
    assert not written["failed"]
    printed = capsys.readouterr().out
    for text in ("4 passed", "MoE / torch dense", "2.50", "700000 GF/s", "a note", "finemoe: 2.00 GiB at most"):
        assert text in printed


@pytest.mark.parametrize("half", [False, True])
def test_a_part_that_fails_or_never_ends_costs_its_own_rows(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    assert measured(monkeypatch, writing(failing="layer", stopped="compile", half=half), []) == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert set(written["parts"]) == ({"step", "compile"} if half else {"step"})
    assert written["failed"] == {
        "layer": "RuntimeError: loop is off by 3.0e-01 of the norm",
        "compile": f"stopped after {gpu.SECONDS['compile']:.0f} s",
    }


@pytest.mark.parametrize("given", [["--quick"], ["--only", "layer"], ["--device", "cpu", "--quick"]])
def test_what_is_no_whole_run_is_written_on_request_alone(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    assert measured(monkeypatch, writing(), given) == 0
    assert not (tmp_path / "gpu.json").exists()
    assert gpu.main([*given, "--out", str(tmp_path / "other.json")]) == 0
    other = json.loads((tmp_path / "other.json").read_text())
    assert other["quick"] is ("--quick" in given)
    assert (other["tests"] is not None) == (given == ["--quick"])


def test_a_machine_without_our_packages_loses_parts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "missing", lambda name: ["pydantic"])
    assert measured(monkeypatch, writing(), []) == 1
    assert capsys.readouterr().err.count("this Python has no pydantic") == len(NEEDS)
    assert not (tmp_path / "gpu.json").exists()


def test_only_files_with_gpu_tests_are_collected() -> None:
    assert {"tests/model/test_gpu_kernels.py", "tests/model/test_gpu_model.py"} <= set(gpu.gpu_tests())
    assert "tests/model/attention/test_attention.py" not in gpu.gpu_tests()


def test_whatever_a_stopped_part_had_started_is_stopped_too(tmp_path: Path) -> None:
    write = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    child = f"import os, pathlib, time; {write}; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.perf_counter()
    assert gpu.limited([sys.executable, "-c", code], 3.0)[0] is None
    assert time.perf_counter() - started < 20
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"{os.getpid()}: process {pid} is still there")


def test_what_a_command_says_comes_back() -> None:
    code = "import sys; print('out'); print('said', file=sys.stderr); sys.exit(3)"
    assert gpu.limited([sys.executable, "-c", code], 60.0) == (3, "out\n", "said\n")


# parts, on the CPU


def test_parts_import_no_more_than_they_say() -> None:
    allowed = sorted({name for names in NEEDS.values() for name in names} - {"pytest", "hypothesis"})
    code = f"""
import sys
from importlib.metadata import packages_distributions
# What the packages that are allowed need themselves.
inner = {{"annotated_types", "pydantic_core", "typing_extensions", "typing_inspection", "markdown_it", "pygments"}}
inner.add("markupsafe")
allowed = inner | set({allowed!r}) | {{"benchmarks", "finemoe"}}
torchs = {{"torchgen", "functorch", "sympy", "mpmath", "jinja2", "filelock", "networkx", "fsspec", "tqdm"}}
refused = set(packages_distributions()) - allowed - torchs
refused = {{name for name in refused if name not in sys.stdlib_module_names and not name.startswith("_")}}
assert {{"altair", "scipy", "typer", "pytest", "transformers"}} <= refused
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import benchmarks.gpu.parts, benchmarks.speed.own
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_layer_part_has_every_kernel_and_the_dense_peer() -> None:
    here = setting()
    rows = list(parts.layer(here))
    assert {row.ours.name for row in rows} == set(parts.KERNELS)
    assert {row.peer.name for row in rows if row.peer is not None} == {parts.DENSE}
    assert rows[-1].of == "gemm"
    assert set(here.checks) == {f"{name}, relative error" for name in parts.KERNELS}
    for row in rows[:-1]:
        assert row.peer is not None
        assert list(row.values) == ratios(row.ours.samples, row.peer.samples)


def test_a_kernel_that_is_off_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"sorted_slices is off by 1.0e\+00 of the norm"):
        parts.check("sorted_slices", torch.zeros(4, 8), exact, setting())
    with pytest.raises(RuntimeError, match="off by nan"):
        parts.check("sorted_slices", exact * torch.nan, exact, setting())


def test_another_kernel_has_the_same_weights_and_the_same_gradients() -> None:
    here = setting()
    drawn = parts.moe_layer(parts.TINY, here)
    other = parts.with_kernel(drawn, "loop")
    mine, theirs = dict(drawn.named_parameters()), dict(other.named_parameters())
    assert set(mine) == set(theirs)
    assert all(theirs[name] is parameter for name, parameter in mine.items())


@pytest.mark.slow
def test_the_step_part_runs_both_programs() -> None:
    here = setting()
    rows = list(parts.step(here))
    assert [row.what for row in rows][:2] == [
        f"training step / transformers, {name}" for name in ("grouped_mm", "eager")
    ]
    assert here.notes == []
    assert set(here.memory) == {"finemoe", "transformers, grouped_mm", "transformers, eager"}
    assert here.versions["transformers"]


@pytest.mark.slow
def test_the_whole_thing_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--quick",
        "--only",
        "compile",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["parts"]["compile"]["rows"]
    assert [row["what"] for row in rows] == [
        f"{name}, compiled / eager" for name in ("MoE layer", "torch dense", "training step")
    ]


# timing on a device


class FakeEvent:
    """Events of a stream whose work takes a quarter of a second between any two of them."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: int | None = None

    def record(self) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        CALLS.append("wait for the last")

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.at is not None
        assert other.at is not None
        return 250.0 * (other.at - self.at)


CALLS: list[str] = []


def test_seconds_on_cuda_are_between_events_of_a_stream_that_was_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: CALLS.append("idle"))
    assert seconds_on("cuda", lambda: CALLS.append("work"), calls=5) == pytest.approx(0.25 / 5)
    expected = ["idle", *["work"] * 5, "wait for the last"]
    assert expected == CALLS


def test_a_cpu_needs_no_waiting_and_counts_no_memory() -> None:
    settle("cpu")
    forget_peak("cpu")
    assert device_memory("cpu") == {}
    assert seconds_on("cpu", lambda: time.sleep(0.01), calls=2) >= 0.01


def test_made_up_rows_survive_the_way_through_json() -> None:
    row: dict[str, Any] = json.loads(json.dumps(ROW))
    again = Row(**{**row, "ours": Measured(**row["ours"]), "peer": Measured(**row["peer"])})
    assert again.figure({}).median == 2.5
