"""INT8 linear: int8 activations with a scale per token, int8 weights with a scale per output row, exact int32 sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erollout.kernels.triton_output import TILE_COLUMNS, TILE_ROWS, finish, parts_of, product_buffer, store_tile

_TILE_DEPTH = 128


@triton.jit(do_not_specialize=["rows"])
def _matmul_kernel(
    x, weight, x_scales, scales, bias, y, rows, columns, depth,
    PARTS: tl.constexpr, BIASED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2)
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    from_x = x + m[:, None].to(tl.int64) * depth + k[None, :]
    from_weight = weight + n[None, :].to(tl.int64) * depth + k[:, None]
    steps = tl.cdiv(tl.cdiv(depth, TILE_K), PARTS)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
    for start in range(part * steps * TILE_K, tl.minimum((part + 1) * steps * TILE_K, depth), TILE_K):
        inside = k < depth - start
        values = tl.load(from_x + start, mask=(m < rows)[:, None] & inside[None, :], other=0)
        columns_of_weight = tl.load(from_weight + start, mask=(n < columns)[None, :] & inside[:, None], other=0)
        total = tl.dot(values, columns_of_weight, total, out_dtype=tl.int32)
    store_tile(total, x_scales, scales, bias, y, part, m, n, rows, columns, PARTS, True, BIASED)


def int8_matmul(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """bfloat16 [M, N] of int8 x [M, K] with float32 x_scales [M], int8 weight [N, K] with float32 scales [N]."""
    assert x.is_contiguous() and weight.is_contiguous()
    (rows, depth), columns = x.shape, len(weight)
    parts = parts_of(columns, depth)
    y = product_buffer(parts, rows, columns, torch.int32, x.device)
    _matmul_kernel[(triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS), parts)](
        x, weight, x_scales, scales, bias, y, rows, columns, depth,
        PARTS=parts, BIASED=bias is not None, TILE_M=TILE_ROWS, TILE_N=TILE_COLUMNS, TILE_K=_TILE_DEPTH,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return finish(y, bias, x_scales, scales) if parts > 1 else y[0].to(torch.bfloat16)
