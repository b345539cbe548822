"""Asynchronous writing of one rank's checkpoint files by a thread, while training continues.

Megatron writes asynchronously in forked processes. Forking a process in which gloo, NCCL and CUDA run may hang, and a thread
serves as well: writing and checksums release the GIL.
"""

from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket

from erollout.checkpoint.manifest import checksum


class Writing:
    """The write of one collective save, started at once."""

    def __init__(self, request: AsyncRequest, copies: bool) -> None:
        """`copies`: whether the tensors may change before the files are written."""
        self.checksums: dict[str, str] = {}
        """Checksums of this rank's files by name, once it is done."""
        self._request = request
        buckets = [] if request.async_fn is None else [_staged(bucket, copies) for bucket in request.async_fn_args[1]]
        self._thread = Thread(target=self._write, args=(buckets,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank's files have been written, or have failed."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for this rank's files, then complete the checkpoint. Collective. Raises errors of torch's checkpoints."""
        self._thread.join()
        for complete in self._request.finalize_fns:
            complete()

    def _write(self, buckets: Sequence[WriteBucket]) -> None:
        if not buckets:
            return
        (transforms, *_), results = self._request.async_fn.args, self._request.async_fn_args[2]
        written: dict[int, Any] = {}
        for number, bucket in enumerate(buckets):
            outcome = _write_bucket(transforms, number, bucket)
            if isinstance(outcome, Exception):
                results.put(outcome)
                return
            written[number] = outcome
            try:
                self.checksums[bucket[1]] = checksum(Path(bucket[0]))
            except OSError as error:
                results.put(error)
                return
        results.put(written)


def _staged(bucket: WriteBucket, copies: bool) -> WriteBucket:
    """A bucket with its tensors in host memory, copied if `copies`."""
    path, name, (values, tensors) = bucket
    return path, name, (values, [(item, tensor.to("cpu", copy=copies)) for item, tensor in tensors])


def _write_bucket(transforms: Any, number: int, bucket: WriteBucket) -> Any:
    """The library's list of results, or its Exception."""
    answers: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, _Counter(), use_fsync=True)
    return answers.get()[1]


class _Counter:
    """Replacement for the queue that counts the library's writer processes: here there is one thread."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...
