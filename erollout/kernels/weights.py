"""A quantised weight as numbers from ModelOpt, in one form for all kernels, before any kernel's packing."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

WeightFormat = Literal["int4", "int8", "fp8"]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """weight [N, K] ~ (values - zero_points) * scales, each scale over `group_size` neighbours in a row.

    This is the drafter's one definition: every kernel computes with these numbers and differs in rounding of the sums only.
    """

    format: WeightFormat
    values: Tensor
    """[N, K]: int8 in [-8, 7] for int4, int8 in [-127, 127] for int8, float8_e4m3fn for fp8."""
    scales: Tensor
    """bfloat16 [N, K / group_size] for int4; float32 [N, 1] for int8; float32 [N, 1] or [1, 1] for fp8."""
    group_size: int
    """K itself where a scale covers a whole row (or the whole tensor)."""
    zero_points: Tensor | None = None
    """int8 [N, K / group_size] in [-8, 7], for asymmetric int4."""
    pre_scale: Tensor | None = None
    """bfloat16 [K]: the activations are multiplied by it first (AWQ)."""


def dequantize(weight: QuantizedWeight) -> Tensor:
    """(values - zero_points) * scales in float32, [N, K]; without the pre_scale."""
    values = weight.values.float()
    groups = values.view(values.shape[0], -1, weight.group_size)
    if weight.zero_points is not None:
        groups = groups - weight.zero_points.float()[..., None]
    return (groups * weight.scales.float()[..., None]).view(values.shape)
