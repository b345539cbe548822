"""Real process groups for tests: warm worker processes, a fresh gloo world for every call.

Importing torch and megatron-core takes seconds, so the workers live for the whole test session. A worker that dies or
hangs fails the call that it served; the next call starts new workers.
"""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


def _serve(connection: Connection, rank: int) -> None:
    import datetime
    import os

    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := _receive(connection)) is not None:
        function, world_size, store_path, timeout, args = job
        try:
            _tear_down()  # not before: all have answered, so none still connects to this rank's last world
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store_path, world_size),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout),
            )
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
    _tear_down()


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:  # the test session is over
        return None


def _tear_down() -> None:
    import sys

    import torch.distributed as dist

    if (state := sys.modules.get("megatron.core.parallel_state")) is not None:
        state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class RankPool:
    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="erollout-ranks-")
        self._calls = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call `function(*args)` on every rank of a new gloo world; the results in rank order.

        The function must be importable (module level) and may use torch.distributed's default group.
        """
        self._start(world_size)
        self._calls += 1
        store = str(Path(self._folder.name) / f"store-{self._calls}")
        workers = self._workers[:world_size]
        for _, connection in workers:
            connection.send((function, world_size, store, timeout, args))
        deadline = time.monotonic() + timeout
        answers: list[Any] = []
        for rank, (process, connection) in enumerate(workers):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise RankFailure(f"rank {rank} gave no answer within {timeout} s (exit code {process.exitcode})")
            try:
                answers.append(connection.recv())
            except EOFError:
                self.close()
                raise RankFailure(f"rank {rank} died") from None
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return [value for _, value in answers]

    def _start(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        while len(self._workers) < world_size:
            ours, theirs = context.Pipe()
            rank = len(self._workers)
            process = context.Process(target=_serve, args=(theirs, rank), daemon=False)  # a daemon may not start children
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
        self._workers = []
