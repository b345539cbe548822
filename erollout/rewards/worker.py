"""Both ends of a scoring process.

The process is a fresh interpreter, started by exec: nothing is forked from a rank with its threads and sockets, and the rank's
main module is not imported again, as multiprocessing would do. It leads its own session, so that killing it ends all processes
that a scorer has started, and Ctrl-C in the terminal reaches only the ranks.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pickle import UnpicklingError
from typing import Any, Protocol

import psutil

from erollout.errors import UserError, foreign_code
from erollout.resilience.signals import STOPS, stops_wait
from erollout.rewards.function import NotANumber
from erollout.rewards.scorers import Scorer
from erollout.security.unpickling import load_message
from erollout.types import Prompt

START_TIMEOUT_SECONDS = 120.0
"""Time limit for the interpreter and the scorer's imports, which take a few seconds on a loaded machine."""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Result of scoring one response: a value, or the reason why there is none."""

    value: float | None = None
    error: str | None = None
    raised: bool = False
    """The function raised; it may still score other responses."""
    timed_out: bool = False
    worker_lost: bool = False
    """The process is dead or stuck and must be closed."""


class WorkerDied(Exception):
    """Raised if the process is gone before anything was scored; the message says when it ended."""


class WorkerLost(Exception):
    """Raised if the process's machine is gone or silent; another one may score the response."""

    def __init__(self, reason: str, *, scoring: bool) -> None:
        """`scoring`: whether it had the response, which may have ended it."""
        super().__init__(reason)
        self.scoring = scoring


class NotCarried(Exception):
    """An item can't be pickled for a scoring process, or can't be read there; the message says why."""


def pack(prompt: object, response: str) -> bytes:
    """Pickle an item, which may run code of the item's own. Raises NotCarried."""
    with foreign_code(lambda error: _not_carried("sent to", error)):
        return pickle.dumps((prompt, response))


def unpack(item: bytes) -> tuple[Prompt, str]:
    """The prompt and response of `pack`. Raises NotCarried."""
    with foreign_code(lambda error: _not_carried("read by", error)):
        prompt, response = pickle.loads(item)
    return prompt, response


def _not_carried(how: str, error: Exception) -> NotCarried:
    return NotCarried(f"the item can't be {how} a scoring process: {type(error).__name__}: {error}")


class ScoringWorker(Protocol):
    """Interface of a scoring process, local or remote, as documented in Worker."""

    @property
    def pid(self) -> int: ...

    def wait_until_ready(self) -> None: ...

    def score(self, prompt: Prompt, response: str, timeout_seconds: float) -> ScoreResult: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Worker:
    """A scoring process, seen from the rank. Used by a single thread, except for `kill`."""

    def __init__(self, scorer: Scorer) -> None:
        """Returns before the process is ready: see `wait_until_ready`. Raises WorkerDied if it can't be started.

        The calling thread must live as long as the process: see `_die_with`.
        """
        self._scorer = scorer
        self._kill_lock = threading.Lock()
        try:
            self._connection, theirs = Pipe()
            with theirs:
                self._process = _start(theirs.fileno())
        except OSError as error:
            raise WorkerDied(f"scoring process can't be started: {error}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until it has loaded the scorer. Raises WorkerDied, with a one-line reason, if that fails."""
        try:
            self._connection.send((self._scorer, os.getpid()))
            if not self._connection.poll(START_TIMEOUT_SECONDS):
                raise WorkerDied(f"scoring process did not start in {START_TIMEOUT_SECONDS:.0f} s")
            error: str | None = self._hear()
        except (EOFError, OSError, UnpicklingError) as died:
            raise WorkerDied(f"scoring process died while it started and loaded {self._scorer.function}") from died
        if error is not None:
            raise WorkerDied(error)

    def score(self, prompt: Prompt, response: str, timeout_seconds: float) -> ScoreResult:
        """Score a response. Raises WorkerDied if the process ended before it had received the response."""
        try:
            self._connection.send_bytes(pack(prompt, response))
        except NotCarried as error:
            return ScoreResult(error=str(error))
        except OSError as error:
            raise WorkerDied("scoring process died while it waited") from error
        taken, end = False, time.monotonic() + timeout_seconds
        try:
            while self._connection.poll(max(0.0, end - time.monotonic())):
                answer: ScoreResult | None = self._hear()
                if answer is not None:
                    return answer
                taken = True
        except (EOFError, OSError) as error:
            if not taken:
                raise WorkerDied("scoring process died while it waited") from error
            return ScoreResult(error="scorer ended its process", worker_lost=True)
        except UnpicklingError as error:
            return ScoreResult(error=f"scorer wrote to the pipe of its process: {error}", worker_lost=True)
        return ScoreResult(error=f"scorer took more than {timeout_seconds:g} s", timed_out=True, worker_lost=True)

    def _hear(self) -> Any:
        """Receive an answer. A scorer may execute model output, so the message is not trusted beyond its form."""
        return load_message(self._connection.recv_bytes())

    def kill(self) -> None:
        """End the process and all processes that it started. Idempotent."""
        with self._kill_lock:
            if self._process.returncode is None:  # not yet reaped, so the id is still its own, even if it is dead
                started: list[psutil.Process] = []
                with suppress(psutil.Error, OSError):
                    started = psutil.Process(self._process.pid).children(recursive=True)  # children may lead their own sessions
                os.killpg(self._process.pid, signal.SIGKILL)
                for process in started:
                    with suppress(psutil.Error, OSError):  # gone, or another user's, as sandboxes may be
                        process.kill()
                self._process.wait()

    def close(self) -> None:
        self.kill()
        self._connection.close()


def _start(descriptor: int) -> "subprocess.Popen[bytes]":
    """A fresh interpreter that finds the same modules and talks through the descriptor."""
    command = f"import sys; sys.path[:] = {sys.path!r}; from erollout.rewards.worker import main; main({descriptor})"
    with stops_wait():
        return subprocess.Popen(
            [sys.executable, "-c", command], pass_fds=[descriptor], stdin=subprocess.DEVNULL, start_new_session=True
        )


def main(descriptor: int) -> None:
    """Main function of the process: load the scorer, then score until the rank closes the connection."""
    _leave_stops_to_ranks()
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    scorer, parent = connection.recv()
    _die_with(parent)
    os.dup2(2, 1)  # what a scorer prints must not mix with the rank's output, nor be lost when the process is killed
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    connection.send(_load(scorer))
    process = os.getpid()
    while True:
        try:
            prompt, response = connection.recv()
            connection.send(None)  # received: if the process ends from here on, the response may be the cause
        except (EOFError, OSError):
            return
        outcome = _outcome(scorer, prompt, response)
        if (
            os.getpid() != process
        ):  # the scored code has forked, and this is the child: its answer would be taken for the next response's
            os._exit(0)
        connection.send(outcome)


def _load(scorer: Scorer) -> str | None:
    """Load the scorer. Broad except on purpose: importing runs foreign code, and its error is reported to the rank."""
    try:
        scorer.load()
    except UserError as error:
        return str(error)
    except SystemExit as error:
        return f"rewards.function = {scorer.function!r}: its module exits when it is imported (SystemExit: {error.code})"
    except BaseException as error:
        return f"rewards.function = {scorer.function!r} can't be imported ({type(error).__name__}: {_one_line(error)})"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _outcome(scorer: Scorer, prompt: Prompt, response: str) -> ScoreResult:
    """Score one response. Broad except on purpose: a scorer is foreign code, and an error costs only one sample its reward."""
    try:
        return ScoreResult(value=scorer(prompt, response))
    except NotANumber as error:
        return ScoreResult(error=f"ValueError: {_one_line(error)}")
    except Exception as error:
        return ScoreResult(error=f"{type(error).__name__}: {_one_line(error)}{_place(error)}", raised=True)


def _place(error: Exception) -> str:
    """File and line where the error was raised."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frame.filename)}:{frame.lineno})"


def _leave_stops_to_ranks() -> None:
    """Ignore stop signals, so that no score is lost. Uses handlers, not SIG_IGN, so that processes started by a scorer have the
    defaults again."""

    def restore() -> None:
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    for number in STOPS:
        signal.signal(number, lambda number, frame: None)
    unblock()
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOPS), after_in_parent=unblock, after_in_child=restore
    )


def _die_with(parent: int) -> None:
    """Let Linux end this process with its parent: a scorer stuck in a loop would outlive a killed rank."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()
