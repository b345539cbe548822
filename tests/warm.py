"""Commands as real processes that need not import anything: each is forked from the process that has (see ranks.py).

They have a pid, signals, sessions and exit statuses like those of `python -m erollout.cli`. What a start from nothing does
(imports, Ctrl-C during them, the encoding of a terminal) is for tests with `subprocess`.
"""

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fcntl import F_GETFD, FD_CLOEXEC, fcntl
from pathlib import Path
from typing import Any, NoReturn

import psutil
from ranks import HAS_GPU, worker_context

_CLOCK_STEP = 3.0
"""Seconds by which the start of a process, as psutil derives it from the time of boot, may differ from one look to the next."""
FORKED = "EROLLOUT_TEST_FORKED"
"""Directory in the environment of a warm command: one file for each of its forked processes: pid, start, rank."""


def start(
    arguments: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path | None = None
) -> "subprocess.Popen[Any] | WarmProcess":
    """`erollout <arguments>` in a session of its own, appending to `stdout` and `stderr` (None: the same file)."""
    if HAS_GPU:  # a forked process can't use one
        with open(stdout, "a") as out, open(stderr or stdout, "a") as err:
            command = [sys.executable, "-m", "erollout.cli", *arguments]
            return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
    return WarmProcess(arguments, environment, stdout, stderr)


class WarmProcess:
    """What tests need of subprocess.Popen."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path | None = None
    ) -> None:
        args = (list(arguments), dict(environment), str(stdout), str(stderr or stdout))
        self._process = worker_context().Process(target=_command, args=args, daemon=False)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("erollout", timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(folder: Path) -> dict[psutil.Process, int | None]:
    """Those processes of a warm command that were forked and are alive, with their ranks."""
    found: dict[psutil.Process, int | None] = {}
    for file in folder.iterdir() if folder.exists() else ():
        with suppress(psutil.Error, ValueError):  # it has ended; the file is being written
            process, (began, rank) = psutil.Process(int(file.name)), file.read_text().split()
            same = abs(process.create_time() - float(began)) < _CLOCK_STEP
            if same and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = None if rank == "-" else int(rank)
    return found


def _command(arguments: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    """In a process that the fork server has forked."""
    os.setsid()
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, mode), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _run(arguments, environment)


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """The command in this process, which has just been forked, and its end as Python's own."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        _register()
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(":") if path and path not in sys.path]
        sys.argv = ["erollout", *arguments]
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        from erollout.cli import run

        subprocess_handler.Popen = _ForkedRank  # type: ignore[assignment, misc]
        run()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _register() -> None:
    if folder := os.environ.get(FORKED):
        Path(folder).mkdir(exist_ok=True)
        rank = os.environ.get("RANK", "-")
        (Path(folder) / str(os.getpid())).write_text(f"{psutil.Process().create_time()!r} {rank}")


class _ForkedRank:
    """In place of torch's Popen of `python -m erollout.cli ...` in a launcher: forked from it, in the state after an exec."""

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], stdout: Any, stderr: Any, start_new_session: bool = True
    ) -> None:
        assert tuple(args[1:3]) == ("-m", "erollout.cli") and start_new_session
        self.args = args
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), number)
            _forget()
            _run(args[3:], env)

    def poll(self) -> int | None:
        if self.returncode is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            time.sleep(0.01)
        return status


def _forget() -> None:
    """What an exec would: handlers of signals and of logging, and files that it closes."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.getLogger().handlers.clear()
    for file in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if file > 2 and fcntl(file, F_GETFD) & FD_CLOEXEC:
                os.close(file)
