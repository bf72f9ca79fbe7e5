"""Where processes of tests are forked from: one server for each process of pytest, which has imported what takes long.

A module that sets its own list of imports would take the others' away, as there is one server.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "finemoe.studies.worker",
        "finemoe.runs.run",
        "finemoe.cli.main",
        "finemoe.checkpoint.conversion",
        "torch._dynamo",  # by any optimizer
        "torch.distributed.elastic.agent.server.local_elastic_agent",
        "torch.distributed.fsdp",
        "torch.distributed.launcher.api",
        "torch.distributed.pipelining",
        "pytest",
    ]
)
