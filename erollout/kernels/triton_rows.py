"""Dynamic quantisation of activations, one scale per row: int8 or fp8, in one pass over the device, no host in between."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erollout.kernels.triton_numbers import stored

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What a row's largest magnitude becomes."""


@triton.jit
def _quantize_kernel(
    x, values, scales, rows, depth, x_stride, stride, LARGEST: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, depth, BLOCK):
        value = tl.load(x + row * x_stride + start + k, mask=(start + k < depth) & (row < rows), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.where(tl.abs(value) < float("inf"), tl.abs(value), float("inf")))  # NaN is not < inf
    top = tl.max(largest, axis=0)
    broken = top == float("inf")
    scale = tl.where(broken | (top == 0.0), 1.0, top / LARGEST)
    for start in range(0, stride, BLOCK):
        inside = (start + k < depth) & (row < rows) & (not broken)
        value = tl.load(x + row * x_stride + start + k, mask=inside, other=0.0).to(tl.float32) / scale
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
        if INTEGER:
            value = (value + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
        tl.store(values + row * stride + start + k, value, mask=start + k < stride)
    tl.store(scales + row, tl.where(broken, float("nan"), scale))


def quantize_rows(x: Tensor, dtype: torch.dtype, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(values of `dtype` [M', K'], float32 scales [M']) of bfloat16 x [M, K] whose rows are dense: x ~ values * scales.

    M' and K' are M and K rounded up to the multiple, filled with zeros. A row with NaN or an infinity gets the scale NaN.
    """
    assert x.stride(-1) == 1
    (rows, depth) = x.shape
    padded, stride = (-(-size // multiple) * multiple for size in (rows, depth))
    values = torch.empty(padded, stride, dtype=torch.int8 if dtype is torch.int8 else stored(dtype), device=x.device)
    scales = torch.empty(padded, dtype=torch.float32, device=x.device)
    _quantize_kernel[(padded,)](
        x, values, scales, rows, depth, x.stride(0), stride,
        LARGEST=LARGEST[dtype], INTEGER=dtype is torch.int8, BLOCK=min(1024, triton.next_power_of_2(stride)),
    )  # fmt: skip
    return values.to(dtype), scales
