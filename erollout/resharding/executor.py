"""Execution of a rank's reshard plan: copies, packs, sends, receives and unpacks, in place."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.errors import UserError
from erollout.parallel.placement import Shape, box_slices
from erollout.resharding.planner import Box, Bucket, LocalCopy, ReshardPlan, Step
from erollout.resharding.transport import Message, Pending, Transport

_IN_FLIGHT = 8
"""Largest number of steps in flight."""
_BUFFERS = 2
"""Staging buffers per direction: one is packed or unpacked while the other is on the wire."""


@dataclass(frozen=True, slots=True)
class ReshardStats:
    """Statistics of one run on one rank."""

    seconds: float
    bytes_local: int
    """Bytes written by copies within the rank, in the destination's dtype."""
    bytes_received: int
    """Bytes received on the wire."""
    peak_extra_bytes: int
    """Largest staging memory, besides source and destination."""

    @property
    def gigabytes_per_second(self) -> float:
        """Destination bytes filled per second, from this rank or from others."""
        return (self.bytes_local + self.bytes_received) / max(self.seconds, 1e-12) / 1e9


class _Staging:
    """Staging buffers for messages in one direction."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []
        self.release()

    def release(self) -> None:
        self._free = [torch.empty(0, dtype=self._dtype, device=self._device) for _ in range(_BUFFERS)]

    @property
    def available(self) -> bool:
        return bool(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are not taken."""
        return sum(buffer.nbytes for buffer in self._free)

    def reserve(self, numel: int) -> None:
        """Give every buffer room for `numel` elements; buffers that a failed run did not return are replaced."""
        if len(self._free) < _BUFFERS or self._free[0].numel() < numel:
            self.release()
            self._free = [torch.empty(numel, dtype=self._dtype, device=self._device) for _ in range(_BUFFERS)]

    def take(self) -> Tensor:
        """Take a buffer, to be returned by `give_back`."""
        return self._free.pop()

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)


@dataclass(frozen=True, slots=True)
class _Started:
    """A step in flight, with its staging buffers."""

    step: Step
    pending: Pending
    packed: Tensor | None
    received: Tensor | None


def wire_dtype(source: torch.dtype, destination: torch.dtype) -> torch.dtype:
    """The smaller of the two: converting before sending or after receiving gives the same values with different traffic."""
    return source if source.itemsize < destination.itemsize else destination


class Resharder:
    """Executes one rank's plan repeatedly, with persistent staging buffers."""

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
            plan: this rank's plan; its peers' plans must come from the same layouts.
            dtype: type of elements on the wire (see wire_dtype), the same on all ranks.
            device: device of the staging buffers: the destination's.
            on_tensor_complete: called once per run with the name of each destination tensor, when all of it has arrived (on
                CUDA: in the order of the current stream).
        """
        if dtype.itemsize != plan.itemsize:
            raise ValueError(f"the plan is made for {plan.itemsize} bytes per element, but {dtype} has {dtype.itemsize}")
        self._plan = plan
        self._transport = transport
        self._dtype = dtype
        self._device = device
        self._on_tensor_complete = on_tensor_complete
        self._sending = _Staging(dtype, device)
        self._receiving = _Staging(dtype, device)
        self._missing: Counter[str] = Counter()

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> ReshardStats:
        """Fill `destination` in place. Collective over the training model replica.

        Args:
            source: the rank's tensors in the training layout, by their names in its placement.
            destination: those in the decode layout; elements in no logical tensor (padding) are left as they are.

        Raises UserError, before anything is sent, if a tensor is missing or its shape or dtype is not as planned.
        """
        self._check(source, destination)
        begin = time.perf_counter()
        self._expect_all()
        self._sending.reserve(self._largest_staged(self._plan.sends, source))
        self._receiving.reserve(self._largest_staged(self._plan.receives, destination))
        in_flight: deque[_Started] = deque()
        copied = 0
        for number, step in enumerate(self._plan.steps, start=1):
            while not self._has_room(step, in_flight, source, destination):
                self._finish(in_flight.popleft(), destination)
            in_flight.append(self._start(step, source, destination))
            until = len(self._plan.local) * number // len(self._plan.steps)  # spread out, to run concurrently with the messages
            for copy in self._plan.local[copied:until]:
                self._copy(copy, source, destination)
            copied = until
        for copy in self._plan.local[copied:]:  # all of them if there is nothing to send
            self._copy(copy, source, destination)
        while in_flight:
            self._finish(in_flight.popleft(), destination)
        self._synchronize()
        return self._stats(time.perf_counter() - begin, destination)

    def release(self) -> None:
        """Free the staging buffers; the next run allocates them again."""
        self._sending.release()
        self._receiving.release()

    def _largest_staged(self, buckets: tuple[Bucket, ...], tensors: Mapping[str, Tensor]) -> int:
        return max((bucket.numel for bucket in buckets if self._direct(bucket, tensors) is None), default=0)

    def _has_room(
        self, step: Step, in_flight: deque[_Started], source: Mapping[str, Tensor], destination: Mapping[str, Tensor]
    ) -> bool:
        """Whether a step can start before the oldest one in flight is finished: one without staging needs no memory."""
        if not in_flight:
            return True
        stages_send = step.send is not None and self._direct(step.send, source) is None
        stages_receive = step.receive is not None and self._direct(step.receive, destination) is None
        buffers = (self._sending.available or not stages_send) and (self._receiving.available or not stages_receive)
        return buffers and len(in_flight) < _IN_FLIGHT

    def _start(self, step: Step, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> _Started:
        outgoing = incoming = packed = received = None
        if step.send is not None:
            if (content := self._direct(step.send, source)) is None:
                packed = self._sending.take()
                content = self._pack(step.send, packed, source)
            outgoing = Message(content, step.send.peer)
        if step.receive is not None:
            if (into := self._direct(step.receive, destination)) is None:
                received = self._receiving.take()
                into = received[: step.receive.numel]
            incoming = Message(into, step.receive.peer)
        return _Started(step, self._transport.start(outgoing, incoming), packed, received)

    def _finish(self, started: _Started, destination: Mapping[str, Tensor]) -> None:
        started.pending.wait()
        if started.packed is not None:
            self._sending.give_back(started.packed)
        if (bucket := started.step.receive) is None:
            return
        if started.received is not None:
            for box, part in _parts(bucket, started.received):
                _view(destination, box).copy_(part)
            self._receiving.give_back(started.received)
        for box in bucket.boxes:
            self._landed(box.tensor)

    def _pack(self, bucket: Bucket, buffer: Tensor, source: Mapping[str, Tensor]) -> Tensor:
        """Pack the bucket's elements, converted, at the start of the buffer."""
        for box, part in _parts(bucket, buffer):
            part.copy_(_view(source, box))
        return buffer[: bucket.numel]

    def _direct(self, bucket: Bucket, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The memory of a bucket's only box if it can serve as the message unconverted, else None."""
        if len(bucket.boxes) != 1:
            return None
        view = _view(tensors, bucket.boxes[0])
        usable = view.is_contiguous() and view.dtype == self._dtype and view.device.type == self._device.type
        return view if usable else None

    def _copy(self, copy: LocalCopy, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
        _view(destination, copy.destination).copy_(_view(source, copy.source))
        self._landed(copy.destination.tensor)

    def _expect_all(self) -> None:
        """Count the outstanding pieces of each destination tensor; one that is all padding has none."""
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
        """Check sizes and dtypes, so that no message differs from what its receiver expects."""
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
            bytes_received=sum(bucket.numel for bucket in self._plan.receives) * self._plan.itemsize,
            peak_extra_bytes=self._sending.nbytes + self._receiving.nbytes,
        )


def _parts(bucket: Bucket, buffer: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """Each box of a message with its view of the buffer, in the box's shape."""
    sizes = [box.numel for box in bucket.boxes]
    for box, part in zip(bucket.boxes, buffer[: sum(sizes)].split(sizes), strict=True):
        yield box, part.view(box.shape)


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
