"""The agent on a node of a Ray cluster: an actor that starts the node's launcher as a child process and monitors it.

No rank is orphaned: a rank ends with its launcher (launch/local.py), the launcher with its actor's process (`main` below), and
the actor with its node or with the driver, by Ray. Light at import: Ray loads it on every node.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from erollout.environment import SECRET, set_variable
from erollout.resilience.signals import stops_wait

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CHECK_SECONDS = 300
_END_SECONDS = 20
_PORTS = range(20000, 30000)
"""Ports below those of outgoing connections on Linux."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Facts about a node that the driver needs before ranks start there."""

    id: str
    """Ray's node id."""
    host: str
    address: str
    port: int
    """Free port for the rendezvous if this is the head."""
    fingerprint: str
    """Fingerprint of code, versions and configuration."""
    problem: str | None
    """Reason why no ranks can start here; None: they can."""


class Agent:
    """The agent's actor. Ray runs calls in the main thread, with which the launcher dies, so none may wait for the ranks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._heard: set[int] = set()

    def look(self, folder: str, check: Sequence[str]) -> NodeFacts:
        """Run `erollout <check>`, the quick node checks, in `folder`; empty: no checks."""
        import ray

        fingerprint, problem = _check(folder, check)
        context, address = ray.get_runtime_context(), ray.util.get_node_ip_address()
        return NodeFacts(context.get_node_id(), socket.gethostname(), address, _free_port(), fingerprint, problem)

    def start(self, folder: str, arguments: Sequence[str], log: str, secret: str) -> None:
        """Start `erollout <arguments>`, a launcher of ranks. Idempotent, because the answer of a first call may be lost.

        `secret`: secret by which the nodes authenticate each other.
        """
        if self._process is not None:
            return
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "erollout.launch.ray_agent", str(os.getpid()), *arguments]
        set_variable(SECRET, secret)
        with open(log, "wb") as file, stops_wait():  # until the launcher handles them
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def status(self) -> int | None:
        """Exit status of the launcher; None while it runs."""
        return None if self._process is None else self._process.poll()

    def signal(self, number: int, serial: int) -> None:
        """Send a signal to the ranks. A repeated `serial` is ignored: the answer of the first call was lost."""
        if self._process is not None and serial not in self._heard:
            self._process.send_signal(number)
        self._heard.add(serial)

    def end(self) -> None:
        """Kill the launcher with all its descendants, and wait for their end, because the run may restart at once."""
        if self._process is None or self._process.poll() is not None:
            return
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            processes = [launcher, *launcher.children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=_END_SECONDS)
        self._process.wait()


def _check(folder: str, arguments: Sequence[str]) -> tuple[str, str | None]:
    """Fingerprint of this node, and a problem, if any."""
    if not Path(folder).is_dir():
        return "", f"{folder} does not exist: code, configuration and data must be at the same path on all nodes"
    if not arguments:
        return "", None
    command = [sys.executable, "-m", "erollout.cli", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "", f"its checks took more than {_CHECK_SECONDS} s"
    lines = done.stdout.splitlines()
    fingerprint = next((line for line in lines if "fingerprint" in line), "")
    if done.returncode == 0:
        return fingerprint, None
    said = lines or done.stderr.splitlines() or [f"its checks ended with status {done.returncode}"]
    return fingerprint, said[-1].partition("bad: ")[2] or said[-1]


def _free_port() -> int:
    for port in range(_PORTS.start + os.getpid() % len(_PORTS), _PORTS.stop):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    return 0


def main() -> None:
    """Become `erollout <arguments>`, killed when the parent's starting thread ends."""
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "erollout.cli", *arguments])


if __name__ == "__main__":
    main()
