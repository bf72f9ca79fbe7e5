"""Random streams: equal on every machine, and independent of each other."""

from __future__ import annotations

import torch

from finemoe.core.seeds import derive, generator


def test_seeds_are_the_same_in_every_process_and_release() -> None:
    # Written down from another process: a run must repeat after an upgrade, on another machine.
    assert derive(0, "init", "embedding.weight") == 576157509227590753
    assert derive(17, "data", 3) == 2547883042464552202


def test_seeds_fit_torch_and_differ_by_run_and_by_name() -> None:
    seeds = {derive(run, purpose, i) for run in range(20) for purpose in ("data", "init") for i in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_repeats_and_no_other_stream_moves_it() -> None:
    first = torch.rand(5, generator=generator(1, "data"))
    other = generator(1, "init")
    torch.rand(100, generator=other)
    assert torch.equal(torch.rand(5, generator=generator(1, "data")), first)
    assert not torch.equal(torch.rand(5, generator=generator(1, "init")), first)
