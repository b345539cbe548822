"""Quantised linears on CUDA: INT4 weight-only and INT8 by Triton kernels, FP8 by torch._scaled_mm.

Each owns packed buffers that `pack_` overwrites in place, so that captured graphs stay valid; no call waits for the device.
Triton is imported when a layer is built, so that without it this module can still state the reason.
"""

import importlib.util

import torch
from torch import Tensor

from erollout.kernels.weights import QuantizedWeight, WeightFormat

_CAPABILITY: dict[WeightFormat, tuple[int, int]] = {"int4": (8, 0), "int8": (8, 0), "fp8": (8, 9)}
"""Lowest compute capability: bfloat16 tensor cores, FP8 tensor cores."""

_SCALED_MM_MULTIPLE = 16
"""torch._scaled_mm needs K and N in multiples of this; rows are padded too, so that its heuristics see few sizes."""


def why_unavailable(format: WeightFormat, device: torch.device) -> str | None:
    """Reason why linears of the format can't run on the device; None: they can."""
    if device.type != "cuda":
        return f"the {format} CUDA kernels need a CUDA device, but the device is {device.type}"
    if not torch.cuda.is_available():
        return f"the {format} CUDA kernels need a CUDA device, but torch finds none"
    if importlib.util.find_spec("triton") is None:
        return f"the {format} CUDA kernels need triton, which is not installed"
    return _why_incapable(format, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def _why_incapable(format: WeightFormat, capability: tuple[int, int], name: str) -> str | None:
    needed = _CAPABILITY[format]
    if capability >= needed:
        return None
    (major, minor), (has_major, has_minor) = needed, capability
    return f"the {format} CUDA kernels need compute capability {major}.{minor}, but {name} has {has_major}.{has_minor}"


class _CudaLinear:
    """Common part of the formats: the bias, the activations' scale, and the state between `pack_` and `release`."""

    format: WeightFormat

    def __init__(
        self, out_features: int, in_features: int, bias: Tensor | None, has_pre_scale: bool, device: torch.device
    ) -> None:
        """bias bfloat16 [out_features] is read at each call; pre_scale is a buffer of this layer."""
        self.out_features, self.in_features, self.bias = out_features, in_features, bias
        self._pre_scale = torch.empty(in_features, dtype=torch.bfloat16, device=device) if has_pre_scale else None
        self._is_packed = False

    def pack_(self, weight: QuantizedWeight) -> None:
        """Overwrite the packed buffers: same addresses. The weight must have the format and shapes of construction."""
        assert weight.format == self.format, f"{weight.format} weight for a {self.format} layer"
        assert weight.values.shape == (self.out_features, self.in_features), f"weight {tuple(weight.values.shape)}"
        assert (weight.pre_scale is None) == (self._pre_scale is None)
        if self._pre_scale is not None and weight.pre_scale is not None:
            self._pre_scale.copy_(weight.pre_scale)
        self._pack(weight)
        self._is_packed = True

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 [rows, in_features], rows dense -> [rows, out_features]. Waits for nothing on the device."""
        assert self._is_packed, "a released layer is called: pack_ it first"
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        return self._run(x if self._pre_scale is None else x * self._pre_scale)

    def release(self) -> None:
        """Mark the weights as out of date: `pack_` must run before the next call. The buffers stay."""
        self._is_packed = False

    def _pack(self, weight: QuantizedWeight) -> None:
        raise NotImplementedError

    def _run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class CudaInt4Linear(_CudaLinear):
    """INT4 weights in groups of 32, 64 or 128, bfloat16 activations. A row's bits depend on that row of x alone."""

    format: WeightFormat = "int4"

    def __init__(
        self,
        out_features: int,
        in_features: int,
        group_size: int,
        asymmetric: bool = False,
        bias: Tensor | None = None,
        has_pre_scale: bool = False,
        device: torch.device | str = "cuda",
    ) -> None:
        """Raises ValueError for a group size that has no kernel or does not divide in_features."""
        from erollout.kernels.triton_int4 import PackedInt4

        device = torch.device(device)
        super().__init__(out_features, in_features, bias, has_pre_scale, device)
        self._packed = PackedInt4(out_features, in_features, group_size, asymmetric, device)

    def _pack(self, weight: QuantizedWeight) -> None:
        assert weight.group_size == self._packed.group_size
        self._packed.pack_(weight.values, weight.scales, weight.zero_points)

    def _run(self, x: Tensor) -> Tensor:
        return self._packed.matmul(x, self.bias)


class CudaInt8Linear(_CudaLinear):
    """INT8 weights per output row, INT8 activations per token. A row's bits depend on that row of x alone: sums are exact."""

    format: WeightFormat = "int8"

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: Tensor | None = None,
        has_pre_scale: bool = False,
        device: torch.device | str = "cuda",
    ) -> None:
        from erollout.kernels.triton_int8 import int8_matmul
        from erollout.kernels.triton_rows import quantize_rows

        device = torch.device(device)
        super().__init__(out_features, in_features, bias, has_pre_scale, device)
        self._quantize_rows, self._matmul = quantize_rows, int8_matmul
        self._weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self._scales = torch.empty(out_features, dtype=torch.float32, device=device)

    def _pack(self, weight: QuantizedWeight) -> None:
        self._weight.copy_(weight.values)
        self._scales.copy_(weight.scales.flatten())

    def _run(self, x: Tensor) -> Tensor:
        values, scales = self._quantize_rows(x, torch.int8)
        return self._matmul(values, scales, self._weight, self._scales, self.bias)


class CudaFp8Linear(_CudaLinear):
    """FP8 (e4m3) weights with a scale per output row or per tensor, FP8 activations with a scale per token.

    With one scale per tensor the product is left in float32 and scaled per token afterwards: a scale over all tokens would
    make a row depend on its neighbours. The order of a row's sums is cuBLAS's and may change with the number of rows.
    """

    format: WeightFormat = "fp8"

    def __init__(
        self,
        out_features: int,
        in_features: int,
        per_channel: bool = True,
        bias: Tensor | None = None,
        has_pre_scale: bool = False,
        device: torch.device | str = "cuda",
    ) -> None:
        from erollout.kernels.triton_output import finish
        from erollout.kernels.triton_rows import quantize_rows

        device = torch.device(device)
        super().__init__(out_features, in_features, bias, has_pre_scale, device)
        self._quantize_rows, self._finish = quantize_rows, finish
        columns, depth = (-(-size // _SCALED_MM_MULTIPLE) * _SCALED_MM_MULTIPLE for size in (out_features, in_features))
        self.per_channel = per_channel
        self._weight = torch.zeros(columns, depth, dtype=torch.float8_e4m3fn, device=device)
        self._scales = torch.ones(1, columns, dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)

    def _pack(self, weight: QuantizedWeight) -> None:
        assert weight.scales.numel() in ((self.out_features,) if self.per_channel else (1,))
        self._weight[: self.out_features, : self.in_features].copy_(weight.values)
        self._scales[:, : self.out_features].copy_(weight.scales.view(1, -1))

    def _run(self, x: Tensor) -> Tensor:
        values, scales = self._quantize_rows(x, torch.float8_e4m3fn, _SCALED_MM_MULTIPLE)
        y = self._rowwise(values, scales) if self.per_channel else self._tensorwise(values, scales)
        return y[: len(x), : self.out_features]

    def _rowwise(self, values: Tensor, scales: Tensor) -> Tensor:
        y = torch._scaled_mm(
            values, self._weight.t(), scale_a=scales.unsqueeze(1), scale_b=self._scales, out_dtype=torch.bfloat16
        )[:, : self.out_features]
        return y if self.bias is None else y + self.bias

    def _tensorwise(self, values: Tensor, scales: Tensor) -> Tensor:
        sums = torch._scaled_mm(values, self._weight.t(), scale_a=self._one, scale_b=self._one, out_dtype=torch.float32)
        return self._finish(sums[:, : self.out_features].contiguous().unsqueeze(0), self.bias, scales, self._scales[0])
