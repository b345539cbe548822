"""Starts the ranks of a run on this machine, as `torchrun --standalone` does, and reports how they ended."""

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from erollout.environment import set_default


def launch_local(arguments: Sequence[str], world_size: int) -> int:
    """Run `erollout <arguments>` on `world_size` ranks and wait for them.

    The rendezvous takes a free port by itself. When a rank fails, the others are ended.

    Returns:
        Exit status: 0, or that of the first rank that failed.
    """
    set_default("OMP_NUM_THREADS", "1")
    set_default("PYTHONHASHSEED", "0")  # some tasks draw from sets: their items must be the same on every rank
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report their own errors
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="erollout",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "erollout.cli", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0
