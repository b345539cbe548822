"""Drawing tokens on the CPU: penalty, temperature, filters, Gumbel-max and normalizers in one call (cpp/sampling.cpp)."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erollout.kernels.native import library, threads

_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _FilterStruct(ctypes.Structure):
    _fields_ = (("rows", _POINTER), ("values", _POINTER), ("count", _INT64))


class JobStruct(ctypes.Structure):
    """`SamplingJob` of cpp/sampling.h."""

    _fields_ = (
        ("logits", _POINTER),
        ("logits_stride", _INT64),
        ("rows", _INT64),
        ("size", _INT64),
        ("margin", _INT64),
        ("width", _INT64),
        ("first_id", _INT64),
        ("is_bf16", _INT32),
        ("wants_facts", _INT32),
        ("seeds", _POINTER),
        ("positions", _POINTER),
        ("noisy", _POINTER),
        ("temperature", _POINTER),
        ("penalty", _POINTER),
        ("context_ids", _POINTER),
        ("context_length", _INT64),
        ("top_k", _FilterStruct),
        ("top_p", _FilterStruct),
        ("min_p", _FilterStruct),
        ("processed", _POINTER),
        ("is_processed", _INT32),
        ("reserved", _INT32),
        ("token_ids", _POINTER),
        ("facts", _POINTER),
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """A rank's columns on the grid of noise: `size` tokens from column `margin` on, of `width` columns from id first_id on."""

    first_id: int
    margin: int
    size: int
    width: int


Filter = tuple[Tensor, Tensor] | None
"""The rows that it applies to (int64, ascending) and its parameter in each: int64 of top-k, else float64."""


class NativeSampling:
    """Draws for rows of CPU logits. A row's results depend on that row alone, bit for bit; for one caller at a time."""

    def __init__(self, num_threads: int = 1) -> None:
        """Raises UserError where there are no native kernels."""
        self._job = JobStruct()
        self._address = ctypes.addressof(self._job)
        self._threads = threads(num_threads)
        self._sample = _function("erollout_sample", None, _POINTER, _POINTER)

    def __call__(
        self,
        logits: Tensor,
        grid: Grid,
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
        wants_facts: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Draw one token a row.

        Args:
            logits: [n, at least grid.size], bfloat16 or float32, unit stride in a row.
            seeds, positions: int64 [n]; noisy: float64 [n], 0 where the draw is greedy.
            temperature, penalty: float32, n elements.
            context_ids: int64 [n, any], -1 where there is none; with a penalty.
            processed: float32 [n, grid.width] to be filled with what is drawn from (removed tokens are -inf).
            is_processed: `processed` is filled already; the parameters of processing must be None then.

        Returns: ids (int64 [n], 2^40 where no logit is above -inf), and float64 [n, 6]: best logit + noise, id, its raw logit,
        log of the sum of the exponentials of the raw logits, and both of the processed ones. Without wants_facts only the first
        of the six is set.
        """
        n = logits.shape[0]
        assert logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float32) and logits.stride(1) == 1
        assert len(seeds) == len(positions) == len(noisy) == n and logits.shape[1] >= grid.size
        assert all(t.is_contiguous() for t in (seeds, positions, noisy))
        assert processed is None or (processed.shape == (n, grid.width) and processed.is_contiguous())
        token_ids = torch.empty(n, dtype=torch.int64)
        facts = torch.empty(n, 6, dtype=torch.float64)
        job = self._job
        job.logits, job.logits_stride, job.rows = logits.data_ptr(), logits.stride(0), n
        job.size, job.margin, job.width, job.first_id = grid.size, grid.margin, grid.width, grid.first_id
        job.is_bf16, job.wants_facts = logits.dtype == torch.bfloat16, wants_facts
        job.seeds, job.positions, job.noisy = seeds.data_ptr(), positions.data_ptr(), noisy.data_ptr()
        job.temperature, job.penalty = _address(temperature), _address(penalty)
        job.context_ids = _address(context_ids)
        job.context_length = 0 if context_ids is None else context_ids.shape[1]
        _set(job.top_k, top_k)
        _set(job.top_p, top_p)
        _set(job.min_p, min_p)
        job.processed, job.is_processed = _address(processed), is_processed
        job.token_ids, job.facts = token_ids.data_ptr(), facts.data_ptr()
        self._sample(self._address, self._threads)
        return token_ids, facts


def block_noise(key: int, block: int, count: int) -> Tensor:
    """The approximation that bounds are made of: the largest noise of blocks (a multiple of 16), float32 [count]. For tests."""
    assert count % 16 == 0
    noise = torch.empty(count)
    _function("erollout_block_noise", None, _INT64, _INT64, _INT64, _POINTER)(key, block, count, noise.data_ptr())
    return noise


def job_bytes() -> int:
    """sizeof(SamplingJob) as compiled. For tests."""
    return _function("erollout_sampling_job_bytes", _INT64)()


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library(), name)
    function.restype, function.argtypes = result, arguments
    return function


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()


def _set(struct: _FilterStruct, filter: Filter) -> None:
    if filter is None:
        struct.count = 0
        return
    rows, values = filter
    struct.rows, struct.values, struct.count = rows.data_ptr(), values.data_ptr(), len(rows)
