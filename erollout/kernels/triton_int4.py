"""INT4 weight-only linear for few rows: bfloat16 activations times exact integers, float32 sums, one scale per group.

Packed, a tile of 64 columns and one group is contiguous: bytes [group / 2, 64], whose low nibbles are the first half of the
group and whose high nibbles the second. A nibble holds value + 8, a zero point is stored as zero + 8, so that their
difference is value - zero. Only sums are rounded, never a dequantised weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erollout.kernels.triton_numbers import OPERAND
from erollout.kernels.triton_output import TILE_COLUMNS, TILE_ROWS, finish, parts_of, product_buffer, store_tile

GROUP_SIZES = (32, 64, 128)


@triton.jit
def _pack_kernel(
    values, scales, zeros, packed, packed_scales, packed_zeros, columns, depth, groups,
    GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k, j = tl.arange(0, GROUP // 2), tl.arange(0, TILE_N)
    n = tile * TILE_N + j
    inside = n < columns
    source = values + n[None, :] * depth + group * GROUP + k[:, None]
    low = tl.load(source, mask=inside[None, :], other=0).to(tl.int32) + 8
    high = tl.load(source + GROUP // 2, mask=inside[None, :], other=0).to(tl.int32) + 8
    block = tile * groups + group
    tl.store(packed + block * (GROUP // 2 * TILE_N) + k[:, None] * TILE_N + j[None, :], (low | (high << 4)).to(tl.uint8))
    tl.store(packed_scales + block * TILE_N + j, tl.load(scales + n * groups + group, mask=inside, other=0.0))
    if ASYMMETRIC:
        zero = tl.load(zeros + n * groups + group, mask=inside, other=0)
        tl.store(packed_zeros + block * TILE_N + j, zero.to(tl.int32) + 8)


@triton.jit
def _centred(nibbles, zero):
    """value - zero of nibbles 0..15 and a stored zero point plus 2^23, as an operand of a matrix product: every step is exact.

    In the last bits of 2^23 as float32 a nibble is added to it: one instruction where a conversion would take several.
    """
    return ((nibbles | 0x4B000000).to(tl.float32, bitcast=True) - zero).to(OPERAND)


@triton.jit(do_not_specialize=["rows"])
def _matmul_kernel(
    x, weight, scales, zeros, bias, y, rows, columns, groups, x_stride,
    GROUP: tl.constexpr, PARTS: tl.constexpr, ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = GROUP // 2
    part, tile = tl.program_id(2), tl.program_id(1)
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    j, k = tl.arange(0, TILE_N), tl.arange(0, HALF)
    from_x = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    from_weight = weight + tile.to(tl.int64) * groups * (HALF * TILE_N) + k[:, None] * TILE_N + j[None, :]
    inside = (m < rows)[:, None]
    depth = tl.cdiv(groups, PARTS)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for group in range(part * depth, tl.minimum((part + 1) * depth, groups)):
        first = tl.load(from_x + group * GROUP, mask=inside, other=0.0).to(OPERAND)
        second = tl.load(from_x + group * GROUP + HALF, mask=inside, other=0.0).to(OPERAND)
        pairs = tl.load(from_weight + group * (HALF * TILE_N)).to(tl.int32)
        at = (tile * groups + group) * TILE_N + j
        zero = 8388608.0 + 8.0
        if ASYMMETRIC:
            zero = 8388608.0 + tl.load(zeros + at).to(tl.float32)[None, :]
        sums = tl.dot(first, _centred(pairs & 15, zero))
        sums = tl.dot(second, _centred(pairs >> 4, zero), sums)
        total += sums * tl.load(scales + at).to(tl.float32)[None, :]
    store_tile(total, None, None, bias, y, part, m, tile * TILE_N + j, rows, columns, PARTS, False, BIASED)


class PackedInt4:
    """A weight [N, K] in the kernel's layout, in buffers that are made once and overwritten by `pack_`."""

    def __init__(self, out_features: int, in_features: int, group_size: int, asymmetric: bool, device: torch.device) -> None:
        """Raises ValueError for a group size that has no kernel or does not divide in_features."""
        if group_size not in GROUP_SIZES or in_features % group_size:
            raise ValueError(
                f"group size {group_size} with {in_features} in_features: the group size must be one of "
                f"{', '.join(map(str, GROUP_SIZES))} and divide them"
            )
        self.out_features, self.in_features, self.group_size = out_features, in_features, group_size
        self.groups = in_features // group_size
        tiles = triton.cdiv(out_features, TILE_COLUMNS)
        self.weight = torch.empty(tiles, self.groups, group_size // 2, TILE_COLUMNS, dtype=torch.uint8, device=device)
        self.scales = torch.empty(tiles, self.groups, TILE_COLUMNS, dtype=torch.bfloat16, device=device)
        self.zeros = torch.empty_like(self.scales, dtype=torch.uint8) if asymmetric else None
        self.parts = parts_of(out_features, in_features)

    def pack_(self, values: Tensor, scales: Tensor, zero_points: Tensor | None) -> None:
        """values int8 [N, K] and zero_points int8 [N, K / group] in [-8, 7], scales bfloat16 [N, K / group]."""
        assert values.shape == (self.out_features, self.in_features) and values.dtype is torch.int8
        assert scales.shape == (self.out_features, self.groups) and scales.dtype is torch.bfloat16
        assert (zero_points is None) == (self.zeros is None)
        _pack_kernel[(len(self.weight), self.groups)](
            values.contiguous(), scales.contiguous(), None if zero_points is None else zero_points.contiguous(),
            self.weight, self.scales, self.zeros, self.out_features, self.in_features, self.groups,
            GROUP=self.group_size, ASYMMETRIC=self.zeros is not None, TILE_N=TILE_COLUMNS,
        )  # fmt: skip

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bfloat16 [M, N] of bfloat16 x [M, K] whose rows are dense. A row's bits do not depend on M or on its place."""
        assert x.dtype is torch.bfloat16 and x.stride(-1) == 1
        rows = len(x)
        y = product_buffer(self.parts, rows, self.out_features, torch.float32, x.device)
        _matmul_kernel[(triton.cdiv(rows, TILE_ROWS), len(self.weight), self.parts)](
            x, self.weight, self.scales, self.zeros, bias, y, rows, self.out_features, self.groups, x.stride(0),
            GROUP=self.group_size, PARTS=self.parts, ASYMMETRIC=self.zeros is not None, BIASED=bias is not None,
            TILE_M=TILE_ROWS, TILE_N=TILE_COLUMNS, num_warps=4, num_stages=4,
        )  # fmt: skip
        return finish(y, bias) if self.parts > 1 else y[0].to(torch.bfloat16)
