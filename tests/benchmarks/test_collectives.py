"""Which collective a backend's event is of."""

from __future__ import annotations

from types import SimpleNamespace

from benchmarks.collectives import by_name


def event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_a_reduce_scatter_is_told_apart_from_an_all_reduce_though_gloo_runs_one_for_it() -> None:
    """As torch's profiler saw both kinds of reduce-scatter and then an all-reduce, microseconds."""
    events = [
        event("c10d::_reduce_scatter_base_", 0, 900),
        event("gloo:all_reduce", 1000, 2000),
        event("c10d::reduce_scatter_", 3000, 3500),
        event("gloo:all_reduce", 3400, 7000),
        event("gloo:all_reduce", 3600, 4000),
        event("gloo:send", 4500, 5000),
        event("c10d::allreduce_", 8000, 8100),
        event("gloo:all_reduce", 8100, 8600),
        event("aten::add", 8700, 9000),
    ]
    assert by_name(reversed(events), 2) == {
        "reduce_scatter": {"calls": 1.0, "milliseconds": 2.3},
        "send": {"calls": 0.5, "milliseconds": 0.25},
        "all_reduce": {"calls": 0.5, "milliseconds": 0.25},
    }
