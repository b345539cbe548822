"""Real process groups for tests: warm worker processes, a fresh gloo world for every call.

Importing torch and megatron-core takes seconds, on a busy machine a minute, so one process has imported them and workers are
forked from it, which live for the whole test session. A call's time begins when all have imported what else it needs. A worker
that dies or hangs fails the call that it served, with the stacks of all on stderr; the next call starts new workers.
"""

import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 200
"""For new workers and their imports."""
IMPORTED = (
    "erollout.training.session",
    "erollout.api.sampling",
    "erollout.command_line.commands",
    "transformers.models.llama.modeling_llama",
    "pytest",
    *(("modelopt.torch.quantization",) if "PYTEST_XDIST_WORKER" in os.environ else ()),  # 15 s: not for a single file
)
HAS_GPU = Path("/dev/nvidiactl").exists()
"""Then workers import everything anew: a process that was forked from one that has looked for GPUs can't use them."""


def worker_context() -> Any:
    """Starts processes that have imported what IMPORTED names: forked from one process, the same for all of a test session."""
    context = mp.get_context("spawn" if HAS_GPU else "forkserver")
    if not HAS_GPU:
        context.set_forkserver_preload(list(IMPORTED))
    return context


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


def _serve(connection: Connection, rank: int) -> None:
    import datetime

    faulthandler.register(signal.SIGUSR2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := _receive(connection)) is not None:
        function, world_size, store_path, timeout, args = job
        connection.send("ready")  # unpickling has imported the function's module
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
    # A group in a cycle of references keeps its connections, and ends, waiting for its peers, whenever the collector comes by:
    # on one rank in the middle of the next call, on another much later. Now all ranks do.
    gc.collect()
    gc.freeze()  # what is left stays: it need not be looked through each time


class RankPool:
    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="erollout-ranks-")
        self._calls = 0
        self._context = worker_context()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

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
        self._answers(workers, START_SECONDS)
        answers = self._answers(workers, timeout)
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return [value for _, value in answers]

    def _answers(self, workers: list[tuple[Any, Connection]], seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers = []
        for rank, (_, connection) in enumerate(workers):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self._show_stacks()
                self.close()
                raise RankFailure(f"rank {rank} gave no answer within {seconds} s")
            try:
                answers.append(connection.recv())
            except EOFError:
                self.close()
                raise RankFailure(f"rank {rank} died") from None
        return answers

    def _show_stacks(self) -> None:
        for process, _ in self._workers:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR2)
        time.sleep(1)

    def _start(self, world_size: int) -> None:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            rank = len(self._workers)
            process = self._context.Process(target=_serve, args=(theirs, rank), daemon=False)  # a daemon may not start children
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
