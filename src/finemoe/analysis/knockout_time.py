"""How long knock-outs take: counted before anything is run, timed on one pass, said at the start."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from finemoe.analysis.passages import Passages, batches, run_batch
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.logs import logger
from finemoe.model.moe.layer import MoEConfig

_WORTH_SAYING = 5.0  # seconds


def passes(
    names: Collection[str], configs: Mapping[int, MoEConfig], *, layers: int, experts: int | None, pairs: int
) -> dict[str, int]:
    """Passes over the text of each experiment, at most: the intact one, and one for each thing left out.

    Args:
        names: of the experiments.
        configs: the MoE layers that single experts and whole layers are left out of.
        layers: how many layers have pairs.
        experts: how many experts were picked of each layer; all when None.
        pairs: how many experts of a layer are paired.
    """
    trained = max(config.experts_per_token for config in configs.values())
    every = [config.num_routed_experts if experts is None else experts for config in configs.values()]
    paired = pairs if experts is None else experts
    counts = {
        "masked": 4,
        "shared": 2,
        "active": trained - max(1, trained // 2) + 3,
        "experts": sum(every),
        "pairs": 1 + layers * paired * (paired + 1) // 2,
        "layers": sum(3 if config.num_shared_experts else 1 for config in configs.values()),
    }
    return {name: 1 + counts[name] for name in names}


def announce(opened: LanguageModel, passages: Sequence[Passages], planned: Mapping[str, int], rows: int) -> None:
    """Say how long `planned` takes, where that is long; one batch of the text is read to find out."""
    _, batch = next(batches(opened, passages, rows))
    run_batch(opened, batch)  # the first pass of a process also loads what the others find
    started = time.perf_counter()
    run_batch(opened, batch)
    windows = sum(len(passage.windows) for passage in passages)
    seconds = (time.perf_counter() - started) / batch.num_sequences * windows * sum(planned.values())
    if seconds < _WORTH_SAYING:
        return
    much = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    longest = max(planned, key=lambda name: planned[name])
    logger.info(
        "knock-outs: %d windows, read up to %d times: about %s at the speed of just now, most of it for "
        "`%s`; --experiment picks some, --tokens reads less",
        windows, sum(planned.values()), much, longest,
    )  # fmt: skip
