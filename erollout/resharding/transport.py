"""Transport of messages between ranks."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Message:
    """A contiguous tensor of any dtype, to or from a global rank. Only its bytes matter."""

    tensor: Tensor
    peer: int


class Pending(Protocol):
    """Messages in flight."""

    def wait(self) -> None:
        """Wait until both are complete; on CUDA, until the current stream is ordered after them."""


class Transport(Protocol):
    """Transfers at most one message each way per call; several calls may be pending."""

    def start(self, send: Message | None, receive: Message | None) -> Pending:
        """Start a transfer; the tensors must stay untouched until `wait` returns.

        Between two ranks messages arrive in the order in which they were started.
        """
        ...


class ProcessGroupTransport:
    """Point-to-point messages of a torch.distributed process group: gloo for CPU tensors, NCCL for CUDA tensors."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Collective over the group.

        Args:
            group: None: the default group.
            device: device of the messages.
        """
        self._group = group if group is not None else dist.group.WORLD
        if device.type == "cuda":
            # NCCL needs all ranks of a communicator in its first operation, but a message has only two.
            dist.barrier(self._group, device_ids=[device.index or 0])

    def start(self, send: Message | None, receive: Message | None) -> Pending:
        operations = []
        if send is not None:
            operations.append(dist.P2POp(dist.isend, _as_bytes(send.tensor), send.peer, self._group))
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, _as_bytes(receive.tensor), receive.peer, self._group))
        # One group call: on NCCL, a send and a receive issued one by one are serialised and can deadlock.
        return _Works(dist.batch_isend_irecv(operations) if operations else [])


@dataclass(frozen=True, slots=True)
class _Works:
    works: list[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
