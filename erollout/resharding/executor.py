"""Runs a rank's reshard plan: copies, packs, sends, receives, unpacks, in place."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.errors import UserError
from erollout.parallel.placement import Shape, box_slices
from erollout.resharding.planner import Box, Bucket, LocalCopy, ReshardPlan
from erollout.resharding.transport import Message, Pending, Transport

_IN_FLIGHT = 2
"""Steps between start and finish: one is packed or unpacked while the other is on the wire."""


@dataclass(frozen=True, slots=True)
class ReshardStats:
    """What one run of one rank did."""

    seconds: float
    bytes_local: int
    """Written by copies within the rank, in the destination's dtype."""
    bytes_sent: int
    bytes_received: int
    """On the wire."""
    peak_extra_bytes: int
    """Staging memory beside source and destination."""

    @property
    def gigabytes_per_second(self) -> float:
        """Destination bytes that were filled per second, whether from this rank or from others."""
        return (self.bytes_local + self.bytes_received) / max(self.seconds, 1e-12) / 1e9


@dataclass(frozen=True, slots=True)
class _Started:
    pending: Pending
    received: Tensor | None
    """Staged message to unpack; None when it lands where it belongs, or when there is none."""


def wire_dtype(source: torch.dtype, destination: torch.dtype) -> torch.dtype:
    """The smaller of the two: converting before sending or after receiving is the same, the traffic is not."""
    return source if source.itemsize < destination.itemsize else destination


class Resharder:
    """Carries one rank's plan out again and again, with staging buffers that it keeps."""

    def __init__(
        self,
        plan: ReshardPlan,
        transport: Transport,
        dtype: torch.dtype,
        device: torch.device,
        on_tensor_complete: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            plan: of this rank; the plans of its peers must come from the same layouts.
            dtype: of elements on the wire (see wire_dtype), the same on all ranks.
            device: where messages are staged: the destination's.
            on_tensor_complete: called once per run with the name of each destination tensor, when all of it has landed (on
                CUDA: in the order of the current stream).
        """
        if dtype.itemsize != plan.itemsize:
            raise ValueError(f"the plan is made for {plan.itemsize} bytes per element, but {dtype} has {dtype.itemsize}")
        self._plan = plan
        self._transport = transport
        self._dtype = dtype
        self._device = device
        self._on_tensor_complete = on_tensor_complete
        self._staging: dict[tuple[str, int], Tensor] = {}
        self._missing: Counter[str] = Counter()

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> ReshardStats:
        """Fill `destination` in place. Collective over the training model replica.

        Args:
            source: the rank's tensors in the training layout, by their names in its placement.
            destination: those in the decode layout; elements in no logical tensor (padding) are left as they are.

        Raises UserError, before anything is sent, when a tensor's presence, shape or dtype is not what was planned.
        """
        self._check(source, destination)
        begin = time.perf_counter()
        self._expect_all()
        steps = self._plan.steps
        copied = 0
        started: dict[int, _Started] = {}
        for index in range(len(steps) + _IN_FLIGHT):
            if index >= _IN_FLIGHT:
                self._finish(index - _IN_FLIGHT, started.pop(index - _IN_FLIGHT), destination)
            if index < len(steps):
                started[index] = self._start(index, source, destination)
            until = len(self._plan.local) * (index + 1) // (len(steps) + _IN_FLIGHT)  # spread: they run beside the messages
            for copy in self._plan.local[copied:until]:
                self._copy(copy, source, destination)
            copied = until
        self._synchronize()
        return self._stats(time.perf_counter() - begin, destination)

    def release(self) -> None:
        """Give the staging buffers back; the next run allocates them again."""
        self._staging.clear()

    def _start(self, index: int, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> _Started:
        step = self._plan.steps[index]
        outgoing = incoming = staged = None
        if step.send is not None:
            outgoing = Message(self._outgoing(step.send, index, source), step.send.peer)
        if step.receive is not None:
            into = self._direct(step.receive, destination)
            if into is None:
                into = staged = self._buffer("receive", index, step.receive)
            incoming = Message(into, step.receive.peer)
        return _Started(self._transport.start(outgoing, incoming), staged)

    def _finish(self, index: int, started: _Started, destination: Mapping[str, Tensor]) -> None:
        started.pending.wait()
        bucket = self._plan.steps[index].receive
        if bucket is None:
            return
        if started.received is not None:
            parts = started.received.split([box.numel for box in bucket.boxes])
            for box, part in zip(bucket.boxes, parts, strict=True):
                _view(destination, box).copy_(part.view(box.shape))
        for box in bucket.boxes:
            self._landed(box.tensor)

    def _outgoing(self, bucket: Bucket, index: int, source: Mapping[str, Tensor]) -> Tensor:
        """The bucket's bytes: the source itself where it is as the wire wants it, else packed and converted."""
        if (direct := self._direct(bucket, source)) is not None:
            return direct
        buffer = self._buffer("send", index, bucket)
        parts = buffer.split([box.numel for box in bucket.boxes])
        for box, part in zip(bucket.boxes, parts, strict=True):
            part.view(box.shape).copy_(_view(source, box))
        return buffer

    def _direct(self, bucket: Bucket, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The memory of a bucket's only box when a message can lie there unconverted, else None."""
        if len(bucket.boxes) != 1:
            return None
        view = _view(tensors, bucket.boxes[0])
        usable = view.is_contiguous() and view.dtype == self._dtype and view.device.type == self._device.type
        return view if usable else None

    def _buffer(self, direction: str, index: int, bucket: Bucket) -> Tensor:
        """The staging memory of a step, grown to the largest bucket that needs one; the step _IN_FLIGHT later uses it again."""
        key = (direction, index % _IN_FLIGHT)
        if key not in self._staging or self._staging[key].numel() < bucket.numel:
            self._staging[key] = torch.empty(bucket.numel, dtype=self._dtype, device=self._device)
        return self._staging[key][: bucket.numel]

    def _copy(self, copy: LocalCopy, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
        _view(destination, copy.destination).copy_(_view(source, copy.source))
        self._landed(copy.destination.tensor)

    def _expect_all(self) -> None:
        """Count what each destination tensor waits for; one that is all padding waits for nothing."""
        self._missing = Counter(copy.destination.tensor for copy in self._plan.local)
        self._missing.update(box.tensor for bucket in self._plan.receives for box in bucket.boxes)
        for name in self._plan.destinations:
            if self._missing[name] == 0:
                self._complete(name)

    def _landed(self, name: str) -> None:
        self._missing[name] -= 1
        if self._missing[name] == 0:
            self._complete(name)

    def _complete(self, name: str) -> None:
        if self._on_tensor_complete is not None:
            self._on_tensor_complete(name)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _check(self, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
        """Sizes and dtypes, so that no message can differ from what its receiver expects."""
        dtypes = {
            _checked_dtype("training", self._plan.sources, source),
            _checked_dtype("decode", self._plan.destinations, destination),
        }
        if self._dtype not in dtypes:
            raise UserError(f"resharding sends {self._dtype}, which is neither end's dtype ({dtypes}): it would lose precision")

    def _stats(self, seconds: float, destination: Mapping[str, Tensor]) -> ReshardStats:
        itemsize = next(iter(destination.values())).dtype.itemsize
        return ReshardStats(
            seconds=seconds,
            bytes_local=sum(copy.destination.numel for copy in self._plan.local) * itemsize,
            bytes_sent=sum(bucket.numel for bucket in self._plan.sends) * self._plan.itemsize,
            bytes_received=sum(bucket.numel for bucket in self._plan.receives) * self._plan.itemsize,
            peak_extra_bytes=sum(buffer.nbytes for buffer in self._staging.values()),
        )


def _view(tensors: Mapping[str, Tensor], box: Box) -> Tensor:
    return tensors[box.tensor][box_slices(box.start, box.shape)]


def _checked_dtype(side: str, planned: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one dtype of the planned tensors. Raises UserError naming the tensor that is not as planned."""
    dtype = None
    for name, shape in planned.items():
        if name not in tensors:
            raise UserError(f"resharding needs the {side} tensor {name}, which this rank does not have")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{side} tensor {name} has shape {list(tensor.shape)} where the layout says {list(shape)}")
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype:
            raise UserError(
                f"{side} tensor {name} is {tensor.dtype} and others are {dtype}: resharding takes one dtype per side"
            )
    assert dtype is not None, "a rank without tensors"
    return dtype
