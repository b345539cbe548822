"""Vectorised quantisation on the CPU, bit-equal to the ModelOpt path of erollout/drafter/quantizer.py and much faster."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erollout.kernels.native import library, threads
from erollout.kernels.weights import QuantizedWeight


def quantize_int4(
    weight: Tensor,
    group_size: int,
    ratios: Sequence[float],
    importance: Tensor | None = None,
    asymmetric: bool = False,
    values: Tensor | None = None,
    num_threads: int = 1,
) -> QuantizedWeight | None:
    """Args:
        weight: bfloat16 or float32 [N, K], contiguous, on the CPU.
        group_size: a multiple of 16 that divides K.
        ratios: ranges to try, in parts of each group's largest weight; the least error wins.
        importance: [K], the weight of each input's squared error; None: all the same.
        asymmetric: with zero points instead of ratios.
        values: int8 [N, K] to write into.

    Returns: None when a weight, or a range, is not finite.
    """
    rows, columns = weight.shape
    assert group_size % 16 == 0 and columns % group_size == 0, (weight.shape, group_size)
    numbers = values if values is not None else torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group_size, dtype=torch.bfloat16)
    zero_points = torch.empty(scales.shape, dtype=torch.int8) if asymmetric else None
    candidates = torch.tensor(ratios, dtype=torch.float32)
    wide = importance.double().contiguous() if importance is not None else None
    finite = library().erollout_quantize_int4(
        *_source(weight),
        group_size,
        _address(wide),
        candidates.data_ptr(),
        len(ratios),
        numbers.data_ptr(),
        scales.data_ptr(),
        _address(zero_points),
        threads(num_threads),
    )
    return QuantizedWeight("int4", numbers, scales, group_size, zero_points) if finite else None


def quantize_int8(weight: Tensor, values: Tensor | None = None, num_threads: int = 1) -> QuantizedWeight | None:
    """One scale per row of a bfloat16 or float32 [N, K]; arguments and None as for quantize_int4."""
    rows, columns = weight.shape
    numbers = values if values is not None else torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, 1)
    finite = library().erollout_quantize_int8(*_source(weight), numbers.data_ptr(), scales.data_ptr(), threads(num_threads))
    return QuantizedWeight("int8", numbers, scales, columns) if finite else None


def _source(weight: Tensor) -> tuple[int, bool, int, int]:
    assert weight.device.type == "cpu" and weight.is_contiguous() and weight.dtype in (torch.bfloat16, torch.float32), weight
    return weight.data_ptr(), weight.dtype == torch.bfloat16, *weight.shape


def _address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None
