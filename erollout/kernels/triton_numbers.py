"""Number types of Triton kernels: the device's own, or float32 under Triton's interpreter.

The interpreter multiplies bfloat16 as if it were integers and cuts float32 off instead of rounding it. There float32 holds
the same operands (both are exact in it) and torch rounds what the kernel has left in float32.
"""

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter was enabled at import, when Triton's functions are wrapped for good."""

OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
"""Operand type of a matrix product of bfloat16 activations and small integers."""


def stored(dtype: torch.dtype) -> torch.dtype:
    """Type in which a kernel stores values of `dtype`, which is narrower than float32; `.to(dtype)` then completes it."""
    return torch.float32 if INTERPRETED else dtype
