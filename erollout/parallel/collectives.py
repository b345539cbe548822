"""Small exchanges of Python values over the whole world. Every rank must call each of them, in the same order."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise sum over ranks."""
    return _reduce(values, device, dist.ReduceOp.SUM)


def all_max(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise maximum over ranks."""
    return _reduce(values, device, dist.ReduceOp.MAX)


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order: for lists of rollouts, not for weights.

    Values are pickled, and read by erollout.security.unpickling: of plain classes and our own dataclasses.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value; what the other ranks pass is ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _reduce(values: Sequence[float], device: torch.device, op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()
