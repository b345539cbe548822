"""Linear layers of the decode model: one interface, several kernels, chosen by name.

A kernel reads weights that the reshard overwrites in place; `prepare` derives its own copies again.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from erollout.engine.model.row_tiles import Product, linear_tiles
from erollout.errors import UserError
from erollout.kernels import native

logger = logging.getLogger(__name__)


class Linear(Protocol):
    """x [tokens, in_features] -> [tokens, out_features]. A row's result does not depend on the other rows' values."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def prepare(self) -> None:
        """Derive the kernel's own form of the current weights."""

    def release(self) -> None:
        """Free the derived form: `prepare` must run before the next call."""


LinearFactory = Callable[[str, Tensor, Tensor | None], Linear]
"""(local name without its ".weight", weight [out, in], bias) -> the layer."""


class TorchLinear:
    """F.linear on the weights themselves: any device, any dtype. On the CPU rows have the same bits for any number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._tiles = linear_tiles(_torch_product, weight, bias) if weight.device.type == "cpu" else None

    def __call__(self, x: Tensor) -> Tensor:
        product = _torch_product(self.weight, self.bias)
        return product(x) if self._tiles is None else self._tiles.run(product, x)

    def prepare(self) -> None:
        pass

    def release(self) -> None:
        pass


class PrepackedLinear:
    """oneDNN on a copy of the weights in its own blocked layout: on the CPU, faster than F.linear in float32.

    Rows have the same bits for any number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._product: Product | None = None
        self._tiles = linear_tiles(_prepacked_product, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        assert self._product is not None, "prepare must run before the first call, and after release"
        return self._tiles.run(self._product, x)

    def prepare(self) -> None:
        self._product = None  # before the new copy is made: never two of them
        self._product = _prepacked_product(self.weight, self.bias)

    def release(self) -> None:
        self._product = None


class PackedLinear:
    """The native kernel on a copy of the weights in its own layout: bfloat16 on the CPU.

    Rows have the same bits for any number of rows and threads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        outputs, inputs = weight.shape
        self._native = native.NativeLinear(outputs, inputs, "bf16", bias=bias, num_threads=torch.get_num_threads())

    @property
    def struct(self) -> native.LinearStruct:
        """Structure for the native model; its address is stable."""
        return self._native.struct

    def __call__(self, x: Tensor) -> Tensor:
        return self._native(x)

    def prepare(self) -> None:
        self._native.pack_(self.weight)

    def release(self) -> None:
        self._native.release()


LINEAR_KERNELS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "torch": TorchLinear,
    "prepacked": PrepackedLinear,
    "native": PackedLinear,
}


def resolve_linear_kernel(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel for rollout.kernels; `auto`: the fastest one that dtype, device and processor allow. Raises UserError."""
    lacks = {"native": _lacks_native(dtype, device), "prepacked": _lacks_prepacked(dtype, device), "torch": None}
    if name == "auto":
        resolved = next(kernel for kernel, reason in lacks.items() if reason is None)
    elif name in lacks:
        resolved = name
    else:
        raise UserError(f"rollout.kernels = {name} is unknown; known are auto, {', '.join(lacks)}")
    if reason := lacks[resolved]:
        raise UserError(f"rollout.kernels = {name} can't run: {reason}; use auto")
    logger.info("decode kernels: %s (rollout.kernels = %s, %s on %s)", resolved, name, dtype, device.type)
    if name == "auto" and resolved != "native":
        logger.info("the faster native kernels can't run: %s", lacks["native"])
    return resolved


def _lacks_native(dtype: torch.dtype, device: torch.device) -> str | None:
    """Reason why the native kernels can't run; None: they can."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"native kernels are for bfloat16 on a CPU (rollout.dtype), and this is {dtype} on {device.type}"
    return native.why_unavailable()


def _lacks_prepacked(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return f"prepacked weights need a CPU and torch with oneDNN, and the device is {device.type}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "prepacked bfloat16 weights need avx512bw, avx512vl and avx512dq, which this processor lacks"
    return None


def _torch_product(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


def _prepacked_product(weight: Tensor, bias: Tensor | None) -> Product:
    packed, run = torch.ops.mkldnn._reorder_linear_weight(weight, None), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: run(x, packed, bias, "none", [], "")
