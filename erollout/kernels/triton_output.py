"""Epilogue of a matrix product: partial sums over parts of K are added in order, scaled, biased and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erollout.kernels.triton_numbers import stored

TILE_ROWS = 16
"""Rows of a tile of every matrix product: the tensor core's smallest, the same whatever the number of rows is."""

TILE_COLUMNS = 64
_TARGET_PROGRAMS = 256
"""About two for each multiprocessor of a large GPU; a constant, so that sums have the same order on every device."""
_MIN_DEPTH = 512
_MAX_PARTS = 16


def parts_of(out_features: int, in_features: int) -> int:
    """Number of parts that K is split into, so that layers with few columns fill the device too. Depends on the shape alone."""
    tiles = triton.cdiv(out_features, TILE_COLUMNS)
    return max(1, min(_TARGET_PROGRAMS // tiles, in_features // _MIN_DEPTH, _MAX_PARTS))


@triton.jit
def _scaled(sums, row_scales, column_scales, bias, m, n, inside_m, inside_n, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """float32 [M, N]: sums * row_scales * column_scales + bias; the scales are read where SCALED, the bias where BIASED."""
    y = sums.to(tl.float32)
    if SCALED:
        y = y * tl.load(row_scales + m, mask=inside_m, other=0.0)[:, None]
        y = y * tl.load(column_scales + n, mask=inside_n, other=0.0)[None, :]
    if BIASED:
        y = y + tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def store_tile(
    sums, row_scales, column_scales, bias, y, part, m, n, rows, columns,
    PARTS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Store a product's tile: finished where K has one part, else as it is, to be finished by `finish`."""
    inside_m, inside_n = m < rows, n < columns
    to = y + (part.to(tl.int64) * rows + m[:, None]) * columns + n[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if PARTS > 1:
        tl.store(to, sums, mask=inside)
    else:
        tl.store(to, _scaled(sums, row_scales, column_scales, bias, m, n, inside_m, inside_n, SCALED, BIASED), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _finish_kernel(
    sums, row_scales, column_scales, bias, y, rows, columns,
    PARTS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    inside_m, inside_n = m < rows, n < columns
    inside = inside_m[:, None] & inside_n[None, :]
    at = m[:, None].to(tl.int64) * columns + n[None, :]
    total = tl.load(sums + at, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sums + at + part * (rows.to(tl.int64) * columns), mask=inside, other=0)
    tl.store(y + at, _scaled(total, row_scales, column_scales, bias, m, n, inside_m, inside_n, SCALED, BIASED), mask=inside)


def finish(sums: Tensor, bias: Tensor | None, row_scales: Tensor | None = None, column_scales: Tensor | None = None) -> Tensor:
    """bfloat16 [M, N] of float32 or int32 sums [parts, M, N]: (sums[0] + sums[1] + ...) * row_scales * column_scales + bias.

    row_scales float32 [M] and column_scales float32 [N]: both or neither.
    """
    parts, rows, columns = sums.shape
    y = torch.empty(rows, columns, dtype=stored(torch.bfloat16), device=sums.device)
    tile_rows, tile_columns = 4, 256
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))
    _finish_kernel[grid](
        sums, row_scales, column_scales, bias, y, rows, columns,
        PARTS=parts, SCALED=row_scales is not None, BIASED=bias is not None, TILE_M=tile_rows, TILE_N=tile_columns,
    )  # fmt: skip
    return y.to(torch.bfloat16)


def product_buffer(parts: int, rows: int, columns: int, sums: torch.dtype, device: torch.device) -> Tensor:
    """[parts, M, N]: room for the partial sums, or for the finished product where there is one part."""
    return torch.empty(parts, rows, columns, dtype=sums if parts > 1 else stored(torch.bfloat16), device=device)
