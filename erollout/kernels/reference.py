"""Reference implementations of the kernels in plain torch and float32, for every kernel's table test."""

import torch
from torch import Tensor

from erollout.kernels.weights import QuantizedWeight, dequantize


def quantize_activations(x: Tensor, group_size: int) -> Tensor:
    """float32 [rows, K]: x after quantisation to int8 per row and group. A group with an infinite or NaN value becomes NaN."""
    groups = x.float().unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127.0) / largest  # a true division: 127 / tensor multiplies by the reciprocal
    codes = torch.where(largest < 1e-36, 0.0, (groups * inverse).round())
    return (codes * (largest / 127)).where(largest.isfinite(), torch.nan).flatten(-2)


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, quantize_x: bool = False) -> Tensor:
    """float32 [rows, N] of bfloat16 x [rows, K]; quantize_x: on int8 activations per group of the weight's group size."""
    if isinstance(weight, Tensor):
        result = x.float() @ weight.float().T
    else:
        scaled = x if weight.pre_scale is None else x * weight.pre_scale
        inputs = quantize_activations(scaled, weight.group_size) if quantize_x else scaled.float()
        result = inputs @ dequantize(weight).T
    return result if bias is None else result + bias.float()
