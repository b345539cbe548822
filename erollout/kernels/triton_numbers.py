"""What Triton kernels compute in: the device's own types, or float32 under Triton's interpreter.

The interpreter multiplies bfloat16 as if it were integers and cuts float32 off instead of rounding it. There float32 holds
the same operands (both are exact in it) and torch rounds what the kernel has left in float32.
"""

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""As Triton found it when it was imported: its functions are then wrapped for the interpreter once and for all."""

OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
"""Of a matrix product of bfloat16 activations with small integers."""


def stored(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores that is to become `dtype`, one that is narrower than float32; `.to(dtype)` then ends it."""
    return torch.float32 if INTERPRETED else dtype
