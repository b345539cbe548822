"""Starts the ranks of a run on this machine, as `torchrun --standalone` does, and reports how they ended."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from erollout.environment import set_default
from erollout.errors import UserError
from erollout.launch.parent import name_launcher
from erollout.launch.rank_logs import RankLogs
from erollout.signals import STOPS, stops_wait

_POLL_SECONDS = 0.2
_AGENT_KILLS_SECONDS = 30
"""After a failure torch's agent sends the other ranks SIGTERM, and so much later SIGKILL."""


def launch_local(arguments: Sequence[str], world_size: int, log_dir: Path | None = None) -> int:
    """Run `erollout <arguments>` on `world_size` ranks and wait for them; see run_ranks.

    The rendezvous takes a free port by itself. Raises UserError when the ranks can't meet: no free port.
    """
    set_default("OMP_NUM_THREADS", "1")
    set_default("PYTHONHASHSEED", "0")  # some tasks draw from sets: their items must be the same on every rank
    _require_port()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="erollout",
    )
    try:
        return run_ranks(arguments, config, log_dir)
    except RendezvousError as error:
        raise UserError(f"the ranks can't meet on localhost: {error}; is another process using its ports?") from error


def run_ranks(arguments: Sequence[str], config: LaunchConfig, log_dir: Path | None) -> int:
    """Run `erollout <arguments>` on this node's ranks and wait for them.

    When a rank fails, the others are ended. SIGTERM and SIGUSR1 are passed on to the ranks, which save and stop.
    `log_dir`: for a copy of what each rank prints.

    Returns:
        Exit status: 0 (also after SIGUSR1), that of the first rank that failed, or 128 + the signal that ended it or this
        process.

    Raises RendezvousError or DistError when the ranks can't meet, UserError when nothing can be written to `log_dir`.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report their own errors
    config = replace(config, max_restarts=0, monitor_interval=0.1, signals_to_handle="SIGINT,SIGHUP,SIGQUIT")
    if log_dir is not None:
        config = replace(config, logs_specs=_rank_logs(log_dir), log_line_prefix_template="rank ${rank}: ")
    try:
        with _passing_on() as passed:
            elastic_launch(config, sys.executable)("-m", "erollout.cli", *arguments)
    except ChildFailedError as error:
        rank, first = first_failure(error.failures)
        if first.exitcode > 0:  # it has said why
            return first.exitcode
        print(_killed(rank, first.pid, -first.exitcode), file=sys.stderr, flush=True)
        return 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 128 + signal.SIGTERM if signal.SIGTERM in passed else 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that brought the others down, and how it ended.

    Args:
        failures: by rank, in the order in which torch's agent found them: those that it ended itself come last. Times are whole
            seconds.
    """
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    for other, failure in failures.items():  # those that lose a killed one may be found at the same time
        is_agents = failure.exitcode == -signal.SIGTERM or failure.timestamp >= first.timestamp + _AGENT_KILLS_SECONDS
        if failure.exitcode < 0 and not is_agents:
            return other, failure
    return rank, first


def _killed(rank: int, pid: int, number: int) -> str:
    """One line: survivors say only that a connection is gone."""
    cause = "; was there too little memory (`dmesg`)?" if number == signal.SIGKILL else ""
    return (
        f"erollout: error: rank {rank} (pid {pid}, host {socket.gethostname()}) was ended by "
        f"{signal.Signals(number).name}{cause}"
    )


def _rank_logs(log_dir: Path) -> RankLogs:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # torch copies the lines to it, and does not flush
    set_default("PYTHONUNBUFFERED", "1")
    try:
        return RankLogs(log_dir)
    except OSError as error:
        raise UserError(f"--log-dir = {log_dir} can't be made: {error.strerror}; choose another place") from error


@contextmanager
def _passing_on() -> Iterator[set[int]]:
    """In the block, SIGTERM and SIGUSR1 go to the ranks; yields those that came.

    Torch's agent would die of SIGUSR1, and kill the ranks some time after SIGTERM. The ranks start with both signals blocked,
    as this process has them: one that comes before a rank listens waits for it. Linux only; elsewhere the agent decides.
    """
    passed: set[int] = set()
    name_launcher()
    if sys.platform != "linux":  # no /proc to find the ranks by
        yield passed
        return
    waiting: list[int] = []
    ended = threading.Event()
    handlers = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in STOPS}
    thread = threading.Thread(target=_pass_on, args=(waiting, passed, ended), daemon=True)
    with stops_wait():
        thread.start()
        try:
            yield passed
        finally:
            ended.set()
            thread.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _pass_on(waiting: list[int], passed: set[int], ended: threading.Event) -> None:
    """This thread alone is sure to take the signals in; Python runs their handlers in the main thread all the same."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    while not ended.wait(_POLL_SECONDS):
        passed.update(waiting)
        ranks = _children() if waiting else []
        while ranks and waiting:
            number = waiting.pop(0)
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, number)


def _children() -> list[int]:
    """Process ids of the ranks that run; none while they are being started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = file.read_text().rpartition(")")[2].split()[1]
            found += [int(file.parent.name)] if int(parent) == os.getpid() else []
    return found


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
