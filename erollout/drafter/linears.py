"""The drafter's linear layers: one interface over every matmul, packed in place.

Buffers are allocated once, at a layer's construction, and keep their addresses, so captured graphs and pointers stay valid over
all policy updates.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from erollout.drafter.formats import Format
from erollout.engine.model.linear import Linear, TorchLinear
from erollout.errors import UserError
from erollout.kernels.native import GROUP_SIZES, LinearStruct, NativeLinear, why_unavailable
from erollout.kernels.weights import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from erollout.kernels import cuda

logger = logging.getLogger(__name__)

_INT4PACK_GROUPS = (32, 64, 128, 256)
"""Group sizes of torch's int4 matmul on the CPU."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A layer's shard, as needed by its matmul."""

    layer: str
    out_features: int
    in_features: int
    bias: Tensor | None
    """The target's own bias, shared."""
    group_size: int
    dtype: torch.dtype
    """Dtype of activations."""
    device: torch.device


class QuantizedLinear(Protocol):
    """An engine's Linear with quantised weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in x's dtype."""

    def pack_(self, weight: QuantizedWeight) -> None:
        """Set new weights, in place."""

    def prepare(self) -> None:
        """Does nothing: only `pack_` changes the weights."""

    def release(self) -> None:
        """Does nothing: the buffers persist."""

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that belong to this layer alone."""

    @property
    def addresses(self) -> tuple[int | None, ...]:
        """Addresses of the buffers."""


class _Kept:
    """A layer that ignores a decode model's `prepare` and `release`."""

    def prepare(self) -> None:
        pass

    def release(self) -> None:
        pass


class TargetLinear(_Kept):
    """A layer shared with the target, which manages it by its own `prepare` and `release`."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x)

    @property
    def struct(self) -> LinearStruct:
        """Structure for the native model. Raises AttributeError if the layer has none."""
        return self._linear.struct  # type: ignore[attr-defined]


class KernelLinear(_Kept):
    """A layer of kernels/native.py."""

    def __init__(self, format: Format, shard: Shard) -> None:
        assert format.native is not None
        self._linear = NativeLinear(
            shard.out_features,
            shard.in_features,
            format.native,
            shard.group_size if format.grouped else 0,
            format.asymmetric,
            shard.bias,
            has_pre_scale=format.search == "awq",
            num_threads=torch.get_num_threads(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x)

    def pack_(self, weight: QuantizedWeight) -> None:
        self._linear.pack_(weight)

    @property
    def struct(self) -> LinearStruct:
        """Structure for the native model."""
        return self._linear.struct

    @property
    def nbytes(self) -> int:
        scales = 4 * self._linear.out_features if self._linear.format == "int8" else 0
        return self._linear.packed_bytes + scales + (2 * self._linear.in_features if self._linear.has_pre_scale else 0)

    @property
    def addresses(self) -> tuple[int | None, ...]:
        return self.struct.weight, self.struct.scale, self.struct.pre_scale


class CudaLinear(_Kept):
    """A layer of kernels/cuda.py."""

    def __init__(self, format: Format, shard: Shard) -> None:
        self._linear = _make_cuda(format, shard)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x)

    def pack_(self, weight: QuantizedWeight) -> None:
        self._linear.pack_(weight)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors_of(self._linear))

    @property
    def addresses(self) -> tuple[int | None, ...]:
        return tuple(tensor.data_ptr() for tensor in _tensors_of(self._linear))


class _Buffered(_Kept):
    """Base of the layers that use torch's operators."""

    _buffers: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def addresses(self) -> tuple[int | None, ...]:
        return tuple(buffer.data_ptr() for buffer in self._buffers)


class DequantizedLinear(_Buffered):
    """The weight dequantised to 16 bits (or float32): for every format and device, no faster than the target.

    Activations are rounded to int8 if the format says so, but not to fp8, which brings drafts closer to the target.
    """

    def __init__(self, format: Format, shard: Shard) -> None:
        self._group = {"int8_group": shard.group_size, "int8_token": shard.in_features}.get(format.activations)
        self._weight = torch.zeros(shard.out_features, shard.in_features, dtype=shard.dtype, device=shard.device)
        self._linear = TorchLinear(self._weight, shard.bias)
        awq = format.search == "awq"
        self._pre_scale = torch.zeros(shard.in_features, dtype=shard.dtype, device=shard.device) if awq else None
        self._buffers = [self._weight, *([self._pre_scale] if self._pre_scale is not None else [])]

    def __call__(self, x: Tensor) -> Tensor:
        if self._pre_scale is not None:
            x = x * self._pre_scale
        if self._group is not None:
            values, scales = quantize_activations(x, self._group)
            x = (values.view(*scales.shape, -1) * scales[..., None]).view(x.shape).to(x.dtype)
        return self._linear(x)

    def pack_(self, weight: QuantizedWeight) -> None:
        self._weight.copy_(dequantize(weight))
        if self._pre_scale is not None:
            assert weight.pre_scale is not None
            self._pre_scale.copy_(weight.pre_scale)


class Int4PackLinear(_Buffered):
    """torch's weight-only int4 matmul on the CPU, for bfloat16 activations. It computes with bfloat16(value * scale)."""

    def __init__(self, format: Format, shard: Shard) -> None:
        rows, columns = shard.out_features, shard.in_features
        self._bias = shard.bias
        self._group_size = shard.group_size
        self._packed = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        self._scales = torch.zeros(columns // shard.group_size, rows, 2, dtype=torch.bfloat16)  # with offset zero
        self._pre_scale = torch.zeros(columns, dtype=torch.bfloat16) if format.search == "awq" else None
        self._buffers = [self._packed, self._scales, *([self._pre_scale] if self._pre_scale is not None else [])]

    def __call__(self, x: Tensor) -> Tensor:
        if self._pre_scale is not None:
            x = x * self._pre_scale
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, self._group_size, self._scales)
        return y if self._bias is None else y.add_(self._bias)

    def pack_(self, weight: QuantizedWeight) -> None:
        unsigned = weight.values.to(torch.int32).add_(8)
        self._packed.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1))
        self._scales[..., 0].copy_(weight.scales.t())
        if self._pre_scale is not None:
            assert weight.pre_scale is not None
            self._pre_scale.copy_(weight.pre_scale)

    @staticmethod
    def fits(format: Format, shard: Shard) -> bool:
        sizes = shard.group_size in _INT4PACK_GROUPS and shard.out_features % 16 == 0
        weight_only = format.weight == "int4" and format.activations == "bf16" and not format.asymmetric
        return sizes and weight_only and shard.device.type == "cpu" and shard.dtype == torch.bfloat16


class Int8Linear(_Buffered):
    """int8 weights per row times int8 activations per token, summed in int32 by torch, on the CPU."""

    def __init__(self, format: Format, shard: Shard) -> None:
        self._bias = shard.bias
        self._values = torch.zeros(shard.out_features, shard.in_features, dtype=torch.int8)
        self._scales = torch.zeros(shard.out_features)
        self._buffers = [self._values, self._scales]

    def __call__(self, x: Tensor) -> Tensor:
        values, scales = quantize_activations(x, x.shape[-1])
        y = torch._int_mm(values.to(torch.int8), self._values.t()).float().mul_(scales).mul_(self._scales).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)

    def pack_(self, weight: QuantizedWeight) -> None:
        self._values.copy_(weight.values)
        self._scales.copy_(weight.scales.view(-1))


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token and group: integers as float32 in [-127, 127], shaped like x, and float32 scales
    [tokens, groups]. A group of zeros has scale 1; non-finite values stay so."""
    groups = x.float().view(x.shape[0], -1, group_size)
    scales = groups.abs().amax(-1) / 127
    scales = torch.where(scales == 0, 1.0, scales)
    return (groups / scales[..., None]).round_().view(x.shape), scales


_MakeLinear = Callable[[Format, Shard], QuantizedLinear]


def resolve_matmul(kernel: str, format: Format, shard: Shard) -> str:
    """The matmul of a layer: native | int4pack | int_mm | cuda | dequantized.

    Args:
        kernel: auto | native | torch | prepacked; the last two mean torch's operators.

    Raises UserError, naming the layer and its format, if `native` is configured and not available.
    """
    if shard.device.type == "cuda":
        return "cuda" if _why_not_cuda(format, shard) is None else "dequantized"
    reason = _why_not_native(format, shard) if kernel in ("auto", "native") else "not configured"
    if reason is None:
        return "native"
    if kernel == "native":
        raise UserError(f"rollout.kernels = native has no matmul for drafter layer {shard.layer} as {format.name}: {reason}")
    if Int4PackLinear.fits(format, shard):
        return "int4pack"
    return "int_mm" if format.weight == "int8" else "dequantized"


def make_linear(matmul: str, format: Format, shard: Shard) -> QuantizedLinear:
    """A layer with zero weights until `pack_`."""
    return _MATMULS[matmul](format, shard)


def _why_not_native(format: Format, shard: Shard) -> str | None:
    """Reason why the native kernels can't serve the layer; None: they can."""
    if format.native is None:
        return f"on the CPU {format.name} is only dequantised; use auto or torch"
    if shard.dtype != torch.bfloat16:
        return f"they are for bfloat16 activations, and rollout.dtype is {shard.dtype}"
    if format.grouped and shard.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        return f"they have groups of {sizes}, and speculation.drafter.group_size is {shard.group_size}"
    return why_unavailable()


def _why_not_cuda(format: Format, shard: Shard) -> str | None:
    """Reason why kernels/cuda.py can't serve the layer; None: it can."""
    if format.cuda is None:
        return f"{format.name} has no CUDA kernel"
    if shard.dtype != torch.bfloat16:
        return f"the CUDA kernels are for bfloat16 activations, and rollout.dtype is {shard.dtype}"
    if format.grouped and shard.group_size not in GROUP_SIZES:
        return f"the CUDA kernels have no groups of {shard.group_size}"
    from erollout.kernels import cuda

    return cuda.why_unavailable(format.weight, shard.device)


def _make_cuda(format: Format, shard: Shard) -> "cuda.CudaInt4Linear | cuda.CudaInt8Linear | cuda.CudaFp8Linear":
    from erollout.kernels import cuda

    sizes, awq = (shard.out_features, shard.in_features), format.search == "awq"
    if format.weight == "int4":
        return cuda.CudaInt4Linear(*sizes, shard.group_size, format.asymmetric, shard.bias, awq, shard.device)
    if format.weight == "int8":
        return cuda.CudaInt8Linear(*sizes, shard.bias, awq, shard.device)
    return cuda.CudaFp8Linear(*sizes, format.activations == "fp8_token", shard.bias, awq, shard.device)


def _tensors_of(kernel: object) -> list[Tensor]:
    """Tensors owned by a kernel's layer or a part of it."""
    attributes = {name: value for name, value in vars(kernel).items() if name != "bias"}
    parts = [value for value in attributes.values() if type(value).__module__.startswith("erollout.kernels")]
    own = [value for value in attributes.values() if isinstance(value, Tensor)]
    return own + [tensor for part in parts for tensor in _tensors_of(part)]


_MATMULS: dict[str, _MakeLinear] = {
    "native": KernelLinear,
    "cuda": CudaLinear,
    "dequantized": DequantizedLinear,
    "int4pack": Int4PackLinear,
    "int_mm": Int8Linear,
}
