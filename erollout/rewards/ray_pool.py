"""Scoring on the nodes of a Ray cluster. Loads ray, so it is imported only on demand.

An actor runs the scoring process of worker.py on any node with a free CPU, so limits and rewards are those of the process pool.
Killing only an actor would leave processes started by a scorer, so the actor kills its process first.
"""

import sys
import threading
import time
from contextlib import suppress
from os import pathsep
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from erollout.errors import UserError
from erollout.rewards.pool import RewardPool
from erollout.rewards.scorers import Scorer
from erollout.rewards.worker import START_TIMEOUT_SECONDS, NotCarried, ScoreResult, Worker, WorkerDied, WorkerLost, pack, unpack
from erollout.schedulers.ray_cluster import join_cluster, resources_free

_ANSWER_SECONDS = 60.0
"""Time added to the limit of a response, for a busy node and for Ray to detect a dead one."""
_IDLE_SECONDS = 1.0
"""Idle time after which an actor is pinged before it gets a response."""
_STOP_SECONDS = 5.0
_KEY = "rewards.pool = ray"


class RayRewardPool(RewardPool):
    """A RewardPool whose processes run on a Ray cluster. A response whose node dies is scored again on another."""

    def __init__(
        self, scorer: Scorer, num_workers: int, timeout_seconds: float, error_value: float, address: str = "auto"
    ) -> None:
        """Reserve a CPU of the cluster for each process, and start the first one.

        Raises UserError if the cluster can't be joined or has too few free CPUs, or if the first process fails.
        """
        super().__init__(scorer, num_workers, timeout_seconds, error_value)
        self._leaves = not ray.is_initialized()
        cluster = join_cluster(address, _KEY)
        self._places = placement_group([{"CPU": 1}] * num_workers, strategy="SPREAD")
        try:
            self._require_places(cluster)
            self._ready_worker(0)
        except WorkerDied as error:
            self.close()
            raise UserError(f"{_KEY}: {error}") from error

    def close(self) -> None:
        super().close()
        if ray.is_initialized():
            with suppress(RayError):
                remove_placement_group(self._places)
            if self._leaves:
                ray.shutdown()

    def _start_worker(self) -> "RayWorker":
        return RayWorker(self._scorer, self._places)

    def _require_places(self, cluster: str) -> None:
        """Reserve a CPU for each process; Ray moves the reservations of a dead node. Raises WorkerDied."""
        if not self._places.wait(START_TIMEOUT_SECONDS):
            raise WorkerDied(
                f"rewards.num_workers = {self._num_workers} for each decode replica needs as many CPUs of the cluster at "
                f"{cluster}, but free are {resources_free()}; lower it, or add nodes"
            )


class RayWorker:
    """A scoring process on some node, seen from the rank."""

    def __init__(self, scorer: Scorer, places: PlacementGroup) -> None:
        """Returns before the process is ready: see `wait_until_ready`."""
        self.pid = 0
        """Process id on its node, once it is ready."""
        options: dict[str, Any] = {
            "num_cpus": 1,
            "max_restarts": 0,
            "concurrency_groups": {"control": 1},  # so that a scorer can be killed while it scores
            "scheduling_strategy": PlacementGroupSchedulingStrategy(places),
            "runtime_env": {"env_vars": {"PYTHONPATH": pathsep.join(filter(None, sys.path))}},
        }
        self._actor: Any = ray.remote(**options)(_Host).remote(scorer)
        self._answered = time.monotonic()
        self._kill_lock = threading.Lock()
        self._killed = False

    def wait_until_ready(self) -> None:
        """Wait until it has loaded the scorer. Raises WorkerDied if that fails."""
        try:
            answer: int | str = ray.get(self._actor.ready.remote(), timeout=2 * START_TIMEOUT_SECONDS)
        except GetTimeoutError as error:
            raise WorkerDied(f"no node takes a scoring process: asked CPU 1, free {resources_free()}") from error
        except RayError as error:
            raise WorkerDied(f"the actor of a scoring process does not start: {_last_line(error)}") from error
        if isinstance(answer, str):
            raise WorkerDied(answer)
        self.pid = answer

    def score(self, prompt: object, response: str, timeout_seconds: float) -> ScoreResult:
        """Score as Worker.score. Also raises WorkerLost if the node or the actor is gone or silent."""
        try:
            item = pack(prompt, response)
        except NotCarried as error:
            return ScoreResult(error=str(error))
        scoring = False
        try:
            if time.monotonic() - self._answered > _IDLE_SECONDS:
                ray.get(self._actor.ready.remote(), timeout=_ANSWER_SECONDS)
            scoring = True
            reference = self._actor.score.remote(item, timeout_seconds)
            answer: ScoreResult | str = ray.get(reference, timeout=timeout_seconds + _ANSWER_SECONDS)
        except RayError as error:
            raise WorkerLost(_last_line(error), scoring=scoring) from error
        self._answered = time.monotonic()
        if isinstance(answer, str):
            raise WorkerDied(answer)
        return answer

    def kill(self) -> None:
        """End the process, all processes that it started, and the actor. Idempotent."""
        with self._kill_lock, suppress(RayError):
            if self._killed or not ray.is_initialized():
                return
            self._killed = True
            if self.pid:
                with suppress(RayError):
                    ray.get(self._actor.stop.options(concurrency_group="control").remote(), timeout=_STOP_SECONDS)
            ray.kill(self._actor)

    def close(self) -> None:
        self.kill()


class _Host:
    """The actor. Failures are returned as one line of text, because Ray turns an exception into a page."""

    def __init__(self, scorer: Scorer) -> None:
        """Called by Ray in the main thread, so the process may end with it: see Worker."""
        self._worker = Worker(scorer)
        self._failure: str | None = None
        try:
            self._worker.wait_until_ready()
        except WorkerDied as error:
            self._failure = str(error)

    def ready(self) -> int | str:
        """The process's id, or the reason why there is none."""
        return self._failure or self._worker.pid

    def score(self, item: bytes, timeout_seconds: float) -> ScoreResult | str:
        try:
            prompt, response = unpack(item)
        except NotCarried as error:
            return ScoreResult(error=str(error))
        try:
            return self._worker.score(prompt, response, timeout_seconds)
        except WorkerDied as error:
            return str(error)

    def stop(self) -> None:
        self._worker.kill()


def _last_line(error: RayError) -> str:
    """The last line of one of Ray's long messages, which states the cause."""
    return str(error).strip().splitlines()[-1].strip()
