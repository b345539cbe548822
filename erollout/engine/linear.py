"""Linear layers of the decode model: one interface, several kernels, chosen by name.

A kernel reads weights that the reshard overwrites in place; whatever it derives from them is made again by `prepare`.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from erollout.errors import UserError

logger = logging.getLogger(__name__)


class Linear(Protocol):
    """x [tokens, in_features] -> [tokens, out_features]. A row's result does not depend on the other rows' values."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def prepare(self) -> None:
        """Derive what the kernel needs from the current weights."""

    def release(self) -> None:
        """Drop what was derived: `prepare` must run before the next call."""


LinearFactory = Callable[[str, Tensor, Tensor | None], Linear]
"""(local name without its ".weight", weight [out, in], bias) -> the layer."""


class TorchLinear:
    """F.linear on the weights themselves: any device, any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def prepare(self) -> None:
        pass

    def release(self) -> None:
        pass


class PrepackedLinear:
    """oneDNN on a copy of the weights in its own blocked layout: on the CPU.

    Faster than F.linear, and in float32 the only one whose rows have the same bits for any number of rows and threads
    (from attention.MIN_ROWS rows on).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self._packed, self.bias, "none", [], "")

    def prepare(self) -> None:
        self._packed = None  # before the new copy is made: never two of them
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def release(self) -> None:
        self._packed = None


LINEAR_KERNELS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {"torch": TorchLinear, "prepacked": PrepackedLinear}


def resolve_linear_kernel(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel behind rollout.kernels; `auto` is the fastest that dtype and device allow. Raises UserError."""
    prepacked = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if name == "prepacked" and not prepacked:
        raise UserError(
            f"rollout.kernels = prepacked needs a CPU and torch with oneDNN, but the device is {device.type}; use auto"
        )
    resolved = ("prepacked" if prepacked else "torch") if name == "auto" else name
    if resolved not in LINEAR_KERNELS:
        raise UserError(f"rollout.kernels = {name} is unknown; known are auto, {', '.join(LINEAR_KERNELS)}")
    logger.info("decode linear kernel: %s (rollout.kernels = %s, %s on %s)", resolved, name, dtype, device.type)
    return resolved
