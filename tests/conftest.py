"""Shared set-up: one thread, a fixed random state for each test, and reproducible hypothesis runs.

`HYPOTHESIS_PROFILE=explore pytest` draws new examples, and more of them.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

gc.disable()  # while modules are loaded, of which nothing is garbage: a third of the time to collect tests
pytest.register_assert_rewrite("runs.tiny_runs")  # it asserts, and many folders import it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that puts the tests in the background has their Ctrl-C ignored, and every process they start inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_finish() -> None:
    """From here on garbage is looked for again, among what tests make, and torch has one thread.

    Loaded above, it would make `pytest -n 2` wait for it once more: in the process that hands out tests.
    """
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where it is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2` gives the tests of a file to one process, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files of few tests would come last, and the longest tests lie in those
    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line and the package's verbs set up logging for the whole process, which here is many tests."""
    logger = logging.getLogger("finemoe")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
