"""Small collectives on Python values over the whole world. All ranks must call them in the same order."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from erollout.errors import UserError

Value = TypeVar("Value")


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise sum over ranks."""
    return _reduce(values, device, dist.ReduceOp.SUM)


def all_max(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise maximum over ranks."""
    return _reduce(values, device, dist.ReduceOp.MAX)


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order: for lists of rollouts, not for weights.

    Values are pickled, and read by erollout.security.unpickling, which admits plain classes and our own dataclasses.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value; those of the other ranks are ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(action: Callable[[], Value]) -> Value:
    """Do it on rank 0 alone. Returns rank 0's value, or raises its UserError, on every rank: none is left in a collective."""
    value: Value | None = None
    failure = None
    if dist.get_rank() == 0:
        try:
            value = action()
        except UserError as error:
            failure = str(error)
    failure, value = from_rank_zero((failure, value))
    if failure:
        raise UserError(failure)
    return value  # type: ignore[return-value]


def _reduce(values: Sequence[float], device: torch.device, op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()
