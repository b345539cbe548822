"""Start of a run's ranks on this machine, like `torchrun --standalone`, with a report of how they ended."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from erollout.environment import STORE, set_default, set_variable, stay_on_loopback
from erollout.errors import UserError
from erollout.launch.parent import name_launcher
from erollout.launch.rank_logs import RankLogs
from erollout.launch.rendezvous import BACKEND, LOOPBACK, FixedRendezvous, on_one_node
from erollout.resilience.signals import AGAIN_SECONDS, ENDED_AT_ONCE, STOPS, stops_wait

_POLL_SECONDS = 0.2
_AGENT_KILLS_SECONDS = 30
"""Time between SIGTERM and SIGKILL that torch's agent sends to the other ranks after a failure."""


def launch_local(arguments: Sequence[str], world_size: int, log_dir: Path | None = None, interface: str | None = None) -> int:
    """Run `erollout <arguments>` on `world_size` ranks and wait for them; see run_ranks.

    The ranks' rendezvous is an unlinked file, and nothing listens beyond this machine unless an `interface` for gloo and NCCL
    is given, whose variables the caller has set.
    """
    set_default("OMP_NUM_THREADS", "1")
    set_default("PYTHONHASHSEED", "0")  # some tasks draw from sets, whose order must be the same on every rank
    if interface is None:
        stay_on_loopback()
        _require_port()
    with _store_file() as path:
        set_variable(STORE, path)
        return run_ranks(arguments, FixedRendezvous("erollout", on_one_node), world_size, log_dir)


def run_ranks(
    arguments: Sequence[str], rendezvous: FixedRendezvous, ranks: int, log_dir: Path | None, address: str | None = None
) -> int:
    """Run `erollout <arguments>` on this node's ranks and wait for them.

    If a rank fails, the others are ended. SIGTERM, SIGINT and SIGUSR1 are forwarded to the ranks, which save and stop; a second
    SIGINT ends them at once.

    Args:
        ranks: number of ranks on this node.
        log_dir: directory for a copy of each rank's output.
        address: address of this node, as known to the others.

    Returns:
        Exit status: 0 (also after SIGUSR1), that of the first rank that failed, or 128 + the signal that ended it or this
        process.

    Raises DistError if the nodes have lost each other, UserError if `log_dir` is not writable.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend=BACKEND,
        rdzv_configs={"handler": rendezvous},
        run_id=rendezvous.get_run_id(),
        local_addr=address,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP,SIGQUIT" if sys.platform == "linux" else "SIGINT,SIGHUP,SIGQUIT",
        logs_specs=RankLogs() if log_dir is None else _rank_logs(log_dir),
        log_line_prefix_template="rank ${rank}: ",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report their own errors
    try:
        with _passing_on() as passed:
            elastic_launch(config, sys.executable)("-m", "erollout.cli", *arguments)
    except ChildFailedError as error:
        if signal.SIGKILL in passed:
            print(f"erollout: {ENDED_AT_ONCE}", file=sys.stderr, flush=True)
            return 128 + signal.SIGINT
        rank, first = first_failure(error.failures)
        if first.exitcode > 0:  # it has reported the reason
            return first.exitcode
        print(_killed(rank, first.pid, -first.exitcode), file=sys.stderr, flush=True)
        return 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return next((128 + number for number in (signal.SIGTERM, signal.SIGINT) if number in passed), 0)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose failure ended the others, and how it failed.

    Args:
        failures: failures by rank, in the order in which torch's agent found them, with those that it ended itself last. Times
            are in whole seconds.
    """
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    for other, failure in failures.items():  # ranks that lose a killed one may be found at the same time
        is_agents = failure.exitcode == -signal.SIGTERM or failure.timestamp >= first.timestamp + _AGENT_KILLS_SECONDS
        if failure.exitcode < 0 and not is_agents:
            return other, failure
    return rank, first


def _killed(rank: int, pid: int, number: int) -> str:
    """One line on a killed rank: the survivors only report a lost connection."""
    cause = "; possibly out of memory (see `dmesg`)" if number == signal.SIGKILL else ""
    return (
        f"erollout: error: rank {rank} (pid {pid}, host {socket.gethostname()}) was ended by "
        f"{signal.Signals(number).name}{cause}"
    )


def _rank_logs(log_dir: Path) -> RankLogs:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # torch copies the lines to it without flushing
    set_default("PYTHONUNBUFFERED", "1")
    try:
        return RankLogs(log_dir)
    except OSError as error:
        raise UserError(f"--log-dir = {log_dir} can't be made: {error.strerror}; choose another place") from error


@contextmanager
def _passing_on() -> Iterator[set[int]]:
    """Context that forwards STOPS to the ranks. Yields those received, and SIGKILL if a second SIGINT has ended the ranks.

    Torch's agent would die of SIGUSR1, and kill the ranks some time after SIGTERM. The ranks inherit blocked signals from this
    process, so one that arrives before a rank is ready stays pending. Linux only; elsewhere the agent handles signals.
    """
    passed: set[int] = set()
    name_launcher()
    if sys.platform != "linux":  # no /proc to find the ranks
        yield passed
        return
    waiting: list[tuple[int, float]] = []
    ended = threading.Event()
    handlers = {number: signal.signal(number, lambda number, _: waiting.append((number, time.monotonic()))) for number in STOPS}
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


def _pass_on(waiting: list[tuple[int, float]], passed: set[int], ended: threading.Event) -> None:
    """Receive and forward signals. Only this thread has them unblocked; Python runs their handlers in the main thread anyway.

    Args:
        waiting: signals to forward, each with its time of arrival.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    interrupted: float | None = None
    while not ended.wait(_POLL_SECONDS):
        passed.update(number for number, _ in waiting)
        ranks = _children() if waiting else []
        while ranks and waiting:
            number, at = waiting.pop(0)
            if number == signal.SIGINT and interrupted is not None:
                if at - interrupted <= AGAIN_SECONDS:
                    continue  # not forwarded either: it may reach a rank later than AGAIN_SECONDS after the first
                number = signal.SIGKILL
                passed.add(number)
            elif number == signal.SIGINT:
                interrupted = at
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, number)


def _children() -> list[int]:
    """Process ids of the running ranks; none while they are being started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended in the meantime
            parent = file.read_text().rpartition(")")[2].split()[1]
            found += [int(file.parent.name)] if int(parent) == os.getpid() else []
    return found


def _require_port() -> None:
    """Raise UserError if there is no free loopback port for the ranks, which gloo would report by a traceback."""
    try:
        socket.create_server((LOOPBACK, 0)).close()
    except OSError as error:
        raise UserError(
            f"no free port on localhost for the ranks to meet ({error.strerror}); end processes that hold ports, "
            "or widen net.ipv4.ip_local_port_range"
        ) from error


@contextmanager
def _store_file() -> Iterator[str]:
    """Path of an empty file that only this user can open and that vanishes with this process."""
    if sys.platform == "linux":
        file = os.memfd_create("erollout-store")
        try:
            yield f"/proc/{os.getpid()}/fd/{file}"
        finally:
            os.close(file)
    else:
        with tempfile.TemporaryDirectory(prefix="erollout-") as folder:
            yield f"{folder}/store"
