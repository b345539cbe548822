"""Scoring during the rollout: responses are submitted as they finish, and rewards collected once all are done."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from erollout.rewards.scorers import Scorer
from erollout.rewards.worker import ScoreResult, ScoringWorker, Worker, WorkerDied, WorkerLost
from erollout.types import Prompt, Reward, Rollout

Key = tuple[int, int]
"""(prompt_index, sample_index)"""

MAX_FAILED_STARTS = 3
"""Number of failed starts in a row after which responses fail at once, until the next `collect`."""
_LOOK_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause between two attempts to start a process elsewhere."""
MAX_LOSSES = 3
"""Number of lost machines after which a response fails: it may be the cause."""


@dataclass(slots=True)
class ScoringCounts:
    """Counts over the responses of one `collect`."""

    scored: int = 0
    errors: int = 0
    """Number of responses whose scorer raised, ended its process, or could not be started."""
    timeouts: int = 0
    first_error: str | None = None
    """Text of the first error or time-out."""


@dataclass(frozen=True, slots=True)
class _Task:
    key: Key
    prompt: Prompt
    response: str
    losses: int = 0
    """Number of machines, or their scoring actors, lost while scoring it."""


def never() -> bool:
    return False


class RewardPool:
    """Scoring processes with a hard time limit per response.

    One thread per process sends it work and waits for the answer, so a stuck process is killed and replaced without affecting
    the others. If a scorer fails, its sample's reward becomes `error_value`; nothing is raised here. Processes start with the
    first response. Use as a context manager, which kills them at its end.
    """

    def __init__(self, scorer: Scorer, num_workers: int, timeout_seconds: float, error_value: float) -> None:
        self._scorer = scorer
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._error_value = error_value
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._state = threading.Condition()  # guards all below
        self._workers: dict[int, ScoringWorker] = {}
        self._pending: set[Key] = set()
        self._rewards: dict[Key, Reward] = {}
        self._collecting = ScoringCounts()
        self._failed_starts = 0
        self._replacing = 0
        self._start_failure = "the pool is closed"
        self._closed = False
        self.counts = ScoringCounts()
        """Counts of the latest `collect`."""

    def submit(self, prompt: Prompt, rollout: Rollout, response: str) -> None:
        """Score a response in the background; returns at once."""
        key = (rollout.prompt_index, rollout.sample_index)
        with self._state:
            assert not self._closed, "the pool is closed"
            assert key not in self._pending and key not in self._rewards, f"{key} was submitted twice"
            self._pending.add(key)
        self._tasks.put(_Task(key, prompt, response))
        if not self._threads:
            self._start_threads()

    def collect(self, cut: Callable[[], bool] = never) -> dict[Key, Reward]:
        """Wait for all responses submitted since the last call, at most for the sum of their time limits.

        `cut`: polled; once it returns True, waiting ends, and the pool can't be used any more.
        """
        with self._state:
            while self._pending and not self._closed and not cut():
                self._state.wait(_LOOK_SECONDS)
            rewards, self._rewards = self._rewards, {}
            self.counts, self._collecting = self._collecting, ScoringCounts()
            self._failed_starts = 0
        return rewards

    def close(self) -> None:
        """Kill the processes; responses that are not collected are lost. Idempotent."""
        with self._state:
            self._closed = True
            for worker in self._workers.values():
                worker.kill()
            self._state.notify_all()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        with self._state:
            return [worker.pid for worker in self._workers.values()]

    def _start_threads(self) -> None:
        for slot in range(self._num_workers):
            thread = threading.Thread(target=self._serve, args=(slot,), name=f"scoring-{slot}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, slot: int) -> None:
        """Loop of a thread with one process, replaced when it is lost.

        The broad except keeps the thread alive after unforeseen errors, without which `collect` would wait for ever.
        """
        while (task := self._tasks.get()) is not None and not self._closed:
            try:
                outcome = self._score(slot, task)
            except Exception as error:
                outcome = ScoreResult(error=f"scoring failed: {type(error).__name__}: {error}", worker_lost=True)
            if outcome is None:
                continue
            if outcome.worker_lost:
                self._drop(slot)
            self._finish(task, outcome)
        self._drop(slot)

    def _score(self, slot: int, task: _Task) -> ScoreResult | None:
        """Score a response. If the process is killed while starting or idle, another one takes the response.

        Returns None if the response is returned to the queue for slots that still have a machine.
        """
        gone = ""
        found_gone = 0
        while not self._closed and self._failed_starts < MAX_FAILED_STARTS and found_gone < MAX_FAILED_STARTS:
            try:
                worker = self._ready_worker(slot)
            except WorkerDied as error:
                self._drop(slot)
                with self._state:
                    self._failed_starts += 1
                    self._start_failure = str(error)
                continue
            self._failed_starts = 0
            try:
                return worker.score(task.prompt, task.response, self._timeout_seconds)
            except WorkerDied as error:
                self._drop(slot)
                found_gone, gone = found_gone + 1, str(error)
            except WorkerLost as error:
                self._drop(slot)
                losses = task.losses + error.scoring
                if losses == MAX_LOSSES:
                    return ScoreResult(error=f"{MAX_LOSSES} machines were lost while they scored it; the last: {error}")
                self._tasks.put(replace(task, losses=losses))
                self._replace(slot)
                return None
        return ScoreResult(error=gone or self._start_failure)

    def _replace(self, slot: int) -> None:
        """Start a process elsewhere, without holding a response meanwhile, unless no slot is left to take them."""
        with self._state:
            self._replacing += 1
        pause = 1.0
        try:
            while not self._closed and self._replacing < self._num_workers:
                with suppress(Exception):  # the cluster may be unreachable; the response is already with another slot
                    self._ready_worker(slot)
                    return
                self._drop(slot)
                with self._state:
                    self._state.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        finally:
            with self._state:
                self._replacing -= 1

    def _start_worker(self) -> ScoringWorker:
        """A process that may not be ready yet. Raises WorkerDied if it can't be started."""
        return Worker(self._scorer)

    def _ready_worker(self, slot: int) -> ScoringWorker:
        """The slot's process, started if needed. Raises WorkerDied if it does not start."""
        with self._state:
            if slot in self._workers:
                return self._workers[slot]
            if self._closed:
                raise WorkerDied("the pool is closed")
            worker = self._workers[slot] = self._start_worker()
        worker.wait_until_ready()
        return worker

    def _drop(self, slot: int) -> None:
        """Close the slot's process. Broad except as in `_serve`: a process that can't be ended is left behind."""
        with self._state:
            worker = self._workers.pop(slot, None)
        if worker is not None:
            with suppress(Exception):
                worker.close()

    def _finish(self, task: _Task, outcome: ScoreResult) -> None:
        value = self._error_value if outcome.value is None else outcome.value
        with self._state:
            if task.key not in self._pending:  # another slot was faster
                return
            self._rewards[task.key] = Reward(*task.key, value=value, error=outcome.error)
            counts = self._collecting
            counts.scored += outcome.error is None
            counts.timeouts += outcome.timed_out
            counts.errors += outcome.error is not None and not outcome.timed_out
            counts.first_error = counts.first_error or outcome.error
            self._pending.discard(task.key)
            self._state.notify_all()
