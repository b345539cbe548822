"""Starts the ranks of a run on this machine, as `torchrun --standalone` does, and reports how they ended."""

import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from erollout.environment import set_default
from erollout.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch_local(arguments: Sequence[str], world_size: int) -> int:
    """Run `erollout <arguments>` on `world_size` ranks and wait for them.

    The rendezvous takes a free port by itself. When a rank fails or this process is told to end, the others are ended.

    Returns:
        Exit status: 0, that of the first rank that failed, or 128 + the signal that ended it or this process.

    Raises UserError when the ranks can't meet: no free port.
    """
    set_default("OMP_NUM_THREADS", "1")
    set_default("PYTHONHASHSEED", "0")  # some tasks draw from sets: their items must be the same on every rank
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report their own errors
    _require_port()
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
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        raise UserError(f"the ranks can't meet on localhost: {error}; is another process using its ports?") from error
    return 0


def end_with_parent() -> None:
    """Let the kernel end this rank when the launcher dies, however it dies: ranks that go on alone would write to the same
    checkpoints as the run that is started next. Linux only; elsewhere they end at the next collective that misses someone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _require_port() -> None:
    """torch says the same in fifty lines."""
    try:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
    except OSError as error:
        raise UserError(
            f"no free port on localhost for the ranks to meet ({error.strerror}); end processes that hold ports, "
            "or widen net.ipv4.ip_local_port_range"
        ) from error
