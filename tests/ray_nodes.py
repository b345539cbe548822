"""Nodes of a real Ray cluster, each `ray start --block` as a child process on this machine, ended by process id."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from commands import ENVIRONMENT

START = """
import ctypes, sys
ctypes.CDLL(None).prctl(1, 9)  # the node ends with the tests
from ray.scripts.scripts import main
sys.exit(main())
"""
LIGHT = [
    "--num-gpus",
    "0",
    "--object-store-memory",
    str(100 * 2**20),
    "--include-log-monitor",
    "false",
    "--disable-usage-stats",
]
HEAD = ["--head", "--port", "0", "--include-dashboard", "false", "--no-monitor"]
PATIENT = {
    "RAY_raylet_start_wait_time_s": "150",
    "RAY_agent_register_timeout_ms": "150000",
    "RAY_worker_register_timeout_seconds": "150",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "20000",
}
"""A node that is gone refuses connections and is found in five checks; one on a busy machine answers late."""
STARTS = 3
"""Ray itself gives parts of a node half a minute to start, which is short where many share few cores."""


class Node:
    """One node; without an address it is the head of a new cluster."""

    def __init__(self, address: str | None = None, num_cpus: int = 2, num_gpus: int = 0) -> None:
        where = HEAD if address is None else ["--address", address]
        options = [*where, *LIGHT, "--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus)]
        for _ in range(STARTS):
            self._start(options)
            if (said := self._wait_for(r"Ray runtime started[\s\S]*?(?:--address='([\d.:]+)'|ray stop)")) is not None:
                self.address = address or str(said[1])
                return
            failure = self.log.read_text()
            self.close()
        raise AssertionError(f"no Ray node comes up on this machine:\n{failure}")

    def _start(self, options: list[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie deep below it: the path must be short
        self.log = self.folder / "start.log"
        command = [sys.executable, "-c", START, "start", "--block", *options, "--temp-dir", str(self.folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=ENVIRONMENT | PATIENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _wait_for(self, pattern: str) -> re.Match[str] | None:
        end = time.monotonic() + 180
        while (found := re.search(pattern, self.log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > end:
                return None
            time.sleep(0.05)
        return found

    def processes(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        node = psutil.Process(self.process.pid)
        return [node, *node.children(recursive=True)]

    def kill(self) -> None:
        """At once and all that runs on it, as when the power fails."""
        processes = self.processes()
        for process in processes:
            try:
                os.kill(process.pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait()
        psutil.wait_procs(processes, 10)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
