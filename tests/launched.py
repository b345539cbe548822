"""A whole run through the local launcher, with all of its processes: forked ones (warm.py), and others by their environment."""

import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from commands import ENVIRONMENT
from warm import FORKED, forked, start

_MARK = "EROLLOUT_TEST_MARK"


class Launched:
    """One start of a command. In a `with` block: nothing of it survives the block."""

    def __init__(self, *arguments: str, output: Path, program: str | None = None) -> None:
        """`program`: Python that takes the arguments instead of the `erollout` command, in a fresh interpreter."""
        self.mark = uuid.uuid4().hex
        self.output = output
        self._forked = output.with_name(f"{output.name}-forked-{self.mark}")
        environment = ENVIRONMENT | {_MARK: self.mark, FORKED: str(self._forked)}
        self.process: Any
        if program is None:
            self.process = start(arguments, environment, output)
        else:
            with open(output, "a") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", program, *arguments],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()  # whatever was found
        self.process.wait(30)

    def alive(self) -> list[psutil.Process]:
        """The processes of the run, whoever their parent is now."""
        found = list(forked(self._forked))
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):  # it has ended, or is not ours
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """In rank order, as far as they are started."""
        ranks = forked(self._forked)
        found = {}
        for process in self.alive():
            with suppress(psutil.Error):  # it has ended
                rank = ranks[process] if process in ranks else process.environ().get("RANK")
                if process.ppid() == self.process.pid and rank is not None:
                    found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def wait_until(self, condition: Callable[[], Any], seconds: float = 200, pause: float = 0.05) -> None:
        """Fails when the run ends before, or the time passes. `pause`: seconds between two looks."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                assert condition(), self.text()
                return
            assert time.monotonic() < deadline, f"did not happen in {seconds} s: {self.text()}"
            time.sleep(pause)

    def wait_until_gone(self, seconds: float) -> None:
        """Fails when a process of the run is left after so long."""
        deadline = time.monotonic() + seconds
        while left := self.alive():
            self.process.poll()  # or it stays a zombie
            assert time.monotonic() < deadline, f"still there after {seconds} s: {left}\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        return self.output.read_text()
