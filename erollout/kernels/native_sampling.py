"""Drawing tokens on the CPU: penalty, temperature, filters, Gumbel-max and normalizers in one call (cpp/sampling.cpp)."""

import ctypes
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.kernels.native import library, threads

_IS_BF16 = {torch.bfloat16: 1, torch.float32: 0}


_JOB = struct.Struct("@P qqqqqq ii PPP PPPq PPq PPq PPq P ii PP")
"""`SamplingJob` of cpp/sampling.h: packing it at once takes 1 us, setting ctypes fields one by one 10 us."""


@dataclass(frozen=True, slots=True)
class NoiseGrid:
    """A rank's columns on the grid of noise: `size` tokens from column `margin` on, of `width` columns from id first_id on."""

    first_id: int
    margin: int
    size: int
    width: int


Filter = tuple[Tensor, Tensor] | None
"""Rows that a filter applies to (int64, ascending), and its parameter in each: int64 for top-k, else float64."""


class NativeSampling:
    """Draws for rows of CPU logits. A row's results depend on that row alone, bit for bit; for one caller at a time."""

    def __init__(self, num_threads: int = 1) -> None:
        """Raises UserError if there are no native kernels."""
        self._job = ctypes.create_string_buffer(_JOB.size)
        self._address = ctypes.addressof(self._job)
        self._threads = threads(num_threads)
        self._sample = library().erollout_sample

    def __call__(
        self,
        logits: Tensor,
        grid: NoiseGrid,
        seeds: Tensor,
        positions: Tensor,
        noisy: Tensor,
        *,
        temperature: Tensor | None = None,
        penalty: Tensor | None = None,
        context_ids: Tensor | None = None,
        top_k: Filter = None,
        top_p: Filter = None,
        min_p: Filter = None,
        processed: Tensor | None = None,
        is_processed: bool = False,
        token_ids: Tensor | None = None,
        facts: Tensor | None = None,
        wants_facts: bool = True,
    ) -> None:
        """Draw one token a row.

        Args:
            logits: [n, at least grid.size], bfloat16 or float32, unit stride in a row.
            seeds, positions, noisy: int64 [n]; noisy is 0 where the draw is greedy, else 1.
            temperature, penalty: float32, n elements.
            context_ids: int64 [n, any], -1 where there is none; with a penalty.
            processed: float32 [n, grid.width] to be filled with what is drawn from (removed tokens are -inf).
            is_processed: `processed` is filled already; the parameters of processing must be None then.
            token_ids: int64 [n], filled with valid ids whatever the logits: 0 where none is above -inf.
            facts: float64 [n, 6], filled with the best logit + noise, its id, the id's raw logit, the log of the sum of the
                exponentials of the raw logits, and both of the processed ones; without wants_facts with the first alone.
        """
        n, columns = logits.shape
        assert logits.device.type == "cpu" and logits.dtype in _IS_BF16 and logits.stride(1) == 1 and columns >= grid.size
        assert len(seeds) == len(positions) == len(noisy) == n
        assert processed is None or (processed.shape == (n, grid.width) and processed.is_contiguous())
        _JOB.pack_into(
            self._job,
            0,
            logits.data_ptr(),
            logits.stride(0),
            n,
            grid.size,
            grid.margin,
            grid.width,
            grid.first_id,
            _IS_BF16[logits.dtype],
            wants_facts,
            seeds.data_ptr(),
            positions.data_ptr(),
            noisy.data_ptr(),
            _address(temperature),
            _address(penalty),
            _address(context_ids),
            0 if context_ids is None else context_ids.shape[1],
            *_filter(top_k),
            *_filter(top_p),
            *_filter(min_p),
            _address(processed),
            is_processed,
            0,
            _address(token_ids),
            _address(facts),
        )
        self._sample(self._address, self._threads)


def block_noise(key: int, block: int, count: int) -> Tensor:
    """The approximation used for bounds: the largest noise per block (a multiple of 16), float32 [count]. For tests."""
    assert count % 16 == 0
    noise = torch.empty(count)
    library().erollout_block_noise(key, block, count, noise.data_ptr())
    return noise


def job_bytes() -> tuple[int, int]:
    """Sizes of a job as packed here and as compiled. For tests."""
    return _JOB.size, library().erollout_sampling_job_bytes()


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()


def _filter(filter: Filter) -> tuple[int, int, int]:
    if filter is None:
        return (0, 0, 0)
    rows, values = filter
    return rows.data_ptr(), values.data_ptr(), len(rows)
