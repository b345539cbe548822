"""Matrix products on the CPU over fixed numbers of rows, so that a row's bits depend on that row alone.

A library's order of summation depends on the number of rows, on the processor and on the library's version: MKL's float32
product gives a row other bits alone, with one other row and with three. So a product is cut into pieces of a few sizes, the
last one padded with zeros, and only sizes are used that gave the same bits at every row in a self-test of a layer with as many
inputs and outputs. Of layers with more than 2^19 weights fewer outputs are tested, and the rest is assumed alike. One row at
a time is always a possible result.

The self-test's sums cancel: each product has its negative among the others, so that only rounding errors are left, which differ
for any other order. The result is a property of processor and libraries, the same in every process.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Candidate numbers of rows per product."""
_PADDED = 16
"""Number of rows up to which padding costs less than a second pass over the weights."""
_MAX_ELEMENTS = 1 << 19
"""Largest weight of the self-test, in elements: larger ones are tested with fewer outputs."""
_LINE = 64
"""Bytes: products read from the start of a cache line, since alignment too decides how a library adds up."""
GRAIN = 16384
"""Number of elements up to which torch uses one thread: it splits more of them by the number of threads, even mid-vector."""

Product = Callable[[Tensor], Tensor]
"""x [rows, in_features] -> [rows, out_features]."""


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The numbers of rows, ascending, that give a row the same bits."""

    sizes: tuple[int, ...]

    def pieces(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Consecutive (first row, end, rows of the product); a product with more rows is padded."""
        start = 0
        while start < rows:
            left = rows - start
            size = next((size for size in self.sizes if size >= left), self.sizes[-1])
            if size > max(_PADDED, left):
                size = max((smaller for smaller in self.sizes if smaller <= left), default=size)
            yield start, min(start + size, rows), size
            start += size

    def run(self, product: Product, x: Tensor) -> Tensor:
        """product(x), with x [rows, in_features] cut into pieces; rows > 0."""
        if x.shape[0] in self.sizes:
            return product(aligned(x))
        outputs = [product(_padded(x[start:end], size))[: end - start] for start, end, size in self.pieces(x.shape[0])]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def linear_tiles(kernel: Callable[[Tensor, Tensor | None], Product], weight: Tensor, bias: Tensor | None) -> RowTiles:
    """Tiles for `kernel(weight, bias)`, the product of a linear layer on the CPU, by a self-test of a layer of its shape."""
    return _linear_tiles(kernel, *weight.shape, weight.dtype, bias is not None, torch.get_num_threads())


@cache
def _linear_tiles(
    kernel: Callable[[Tensor, Tensor | None], Product],
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    has_bias: bool,
    threads: int,
) -> RowTiles:
    outputs_tested = max(1, min(outputs, _MAX_ELEMENTS // inputs))
    x, weight = cancelling(1, outputs_tested, inputs, dtype)
    bias = torch.zeros(outputs_tested, dtype=dtype) if has_bias else None
    with torch.inference_mode():
        product = kernel(weight, bias)
        found = RowTiles(largest_class({size: _bits_of_rows(product(x.repeat(size, 1))) for size in ROWS}))
    name = getattr(kernel, "__name__", str(kernel))
    logger.debug("row tiles of %s, %s x %s, %s, %d threads: %s", name, outputs, inputs, dtype, threads, found.sizes)
    return found


def largest_class(bits: "dict[int, Hashable | None]") -> tuple[int, ...]:
    """The largest set of sizes with equal bits; None marks a size whose rows differ among themselves."""
    classes: dict[Hashable, list[int]] = {}
    for size, of_row in bits.items():
        if of_row is not None:
            classes.setdefault(of_row, []).append(size)
    return tuple(max(classes.values(), key=lambda sizes: (len(list(sizes)), max(sizes))))


def cancelling(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, inputs] and weights [outputs, inputs] whose products are all zero, but for the errors of rounding their sums."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=generator)
    first, second = order[: inputs // 2], order[inputs // 2 : inputs // 2 * 2]
    x, weight = torch.zeros(rows, inputs), torch.zeros(outputs, inputs)
    x[:, first] = torch.randn(rows, len(first), generator=generator)
    weight[:, first] = torch.randn(outputs, len(first), generator=generator)
    x[:, second], weight[:, second] = x[:, first], -weight[:, first]
    return x.to(dtype), weight.to(dtype)


def bits_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def in_grains(function: Callable[[Tensor], object], x: Tensor) -> None:
    """An elementwise function of rows x [rows, n], row by row or in more rows that one thread computes at once.

    exp2, sigmoid and functions of them have other last bits in a partial vector, which must not depend on the threads.
    """
    if torch.get_num_threads() == 1:
        function(x)
        return
    rows = max(1, GRAIN // x.shape[-1])
    for start in range(0, x.shape[0], rows):
        function(x[start : start + rows])


def _bits_of_rows(y: Tensor) -> bytes | None:
    """Bits of every row; None: they are not all equal."""
    first = bits_of(y[0])
    return first if torch.equal(y.view(torch.uint8), y[:1].expand_as(y).contiguous().view(torch.uint8)) else None


def aligned(x: Tensor) -> Tensor:
    """A contiguous x that begins on a cache line; x itself if it does."""
    return x if x.is_contiguous() and x.data_ptr() % _LINE == 0 else x.clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor, rows: int) -> Tensor:
    """x padded with zeros to `rows` rows, on a cache line."""
    if x.shape[0] == rows:
        return aligned(x)
    padded = x.new_zeros(rows, x.shape[1])
    padded[: x.shape[0]] = x
    return padded
