"""Scoring beside the rollout: responses go in as they finish, rewards come out once all are done."""

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
"""In a row; then responses are failed at once instead of waiting for one more start each, until the next `collect`."""
_LOOK_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""Between two tries to bring up a process elsewhere."""
MAX_LOSSES = 3
"""A response whose machine was lost so often is failed: it may be why."""


@dataclass(slots=True)
class ScoringCounts:
    """Of the responses of one `collect`."""

    scored: int = 0
    errors: int = 0
    """Scorer raised, ended its process, or could not be started."""
    timeouts: int = 0
    first_error: str | None = None
    """Of an error or time-out."""


@dataclass(frozen=True, slots=True)
class _Task:
    key: Key
    prompt: Prompt
    response: str
    losses: int = 0
    """Machines, or their parts in scoring, that ended while they scored it."""


def never() -> bool:
    return False


class RewardPool:
    """Scoring processes with a hard time limit for each response.

    One thread per process hands it work and waits for the answer, so a stuck process is killed and replaced without a word
    to the others. Whatever a scorer does costs its sample the reward, which becomes `error_value`; nothing is raised here.
    Processes start with the first response. Use as a context manager: leaving it kills them.
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
        """Of the latest `collect`."""

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
        """Wait for all that was submitted since the last call. Takes no longer than the time limits add up to.

        `cut`: looked at now and then; once true, there is no more waiting, and the pool is of no use after.
        """
        with self._state:
            while self._pending and not self._closed and not cut():
                self._state.wait(_LOOK_SECONDS)
            rewards, self._rewards = self._rewards, {}
            self.counts, self._collecting = self._collecting, ScoringCounts()
            self._failed_starts = 0
        return rewards

    def close(self) -> None:
        """Kill the processes; what is not collected is lost. Idempotent."""
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
        """A thread's life: one process, replaced when it is lost.

        The broad except keeps the thread alive through what nobody foresaw: without it, `collect` would wait forever.
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
        """A process that is killed from outside while it starts or idles is no fault of the response: another takes it.

        None: the response is handed back, for the slots that still have a machine.
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
        """Bring up a process elsewhere, without holding a response meanwhile, unless no slot is left to take them."""
        with self._state:
            self._replacing += 1
        pause = 1.0
        try:
            while not self._closed and self._replacing < self._num_workers:
                with suppress(Exception):  # the cluster itself may be out of reach; the response is another's already
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
        """A process that may not be ready yet. Raises WorkerDied when there can't be one."""
        return Worker(self._scorer)

    def _ready_worker(self, slot: int) -> ScoringWorker:
        """The slot's process, started if need be. Raises WorkerDied when it does not come up."""
        with self._state:
            if slot in self._workers:
                return self._workers[slot]
            if self._closed:
                raise WorkerDied("the pool is closed")
            worker = self._workers[slot] = self._start_worker()
        worker.wait_until_ready()
        return worker

    def _drop(self, slot: int) -> None:
        """Broad, as `_serve` is: what can't be ended is left behind, but no response waits for it."""
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
