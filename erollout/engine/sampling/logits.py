"""A rank's logits and their processing by sampling parameters. Under tensor parallelism no rank sees the others' columns."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.engine.sampling.random import TILE
from erollout.kernels.native_sampling import NoiseGrid
from erollout.types import SamplingParams

_FIRST_CANDIDATES = 256
"""Initial number of a shard's largest logits that top-p examines; four times as many each time they don't cover its mass."""
_MASS_SCALE = 2.0**40
"""Scale at which top-p sums probabilities as integers, whose sum is the same in any order and so under any sharding."""


@dataclass(frozen=True, slots=True)
class ShardLogits:
    """Columns of the logits in float32, cut at multiples of TILE ids, with -inf for other ranks' tokens."""

    values: Tensor
    """[n, W], W a multiple of TILE, contiguous."""
    first_id: int
    """Token id of column 0, a multiple of TILE."""
    group: dist.ProcessGroup | None
    """Group of the ranks with the other columns; None: there are none."""
    vocab_size: int
    """Vocabulary size of all ranks together, without padding."""

    def local_normalizer(self) -> Tensor:
        """Log of the sum of exponentials over this rank's columns, float64 [n]: -inf without any, NaN if a logit is NaN."""
        largest = self.values.amax(-1, keepdim=True)
        exponentials = (self.values - largest).exp_().unflatten(-1, (-1, TILE))
        # float32 sums lose 5e-6 at 49k tokens; by tiles, since torch splits the sum of one long row by its number of threads
        total = exponentials.sum(-1, dtype=torch.float64).sum(-1)
        largest = largest.squeeze(-1).double()
        return torch.where(largest == -math.inf, largest, largest + total.log())

    def logprobs(self) -> Tensor:
        """Log-probabilities of this rank's columns under the softmax over all ranks, float32 [n, W]. Collective."""
        normalizer = gather(self.local_normalizer(), self.group).logsumexp(0)
        return self.values - normalizer.float().unsqueeze(-1)


def shard_logits(
    logits: Tensor, vocab_size: int, vocab_start: int = 0, group: dist.ProcessGroup | None = None, buffer: Tensor | None = None
) -> ShardLogits:
    """Logits [n, V_local] (any floating dtype) of ids vocab_start ... as a shard; columns from vocab_size on are padding.

    With a `buffer` (float32 [at least n, W]) the shard's values are its first rows: page faults of new memory cost more than
    the copy itself.
    """
    grid = shard_grid(logits.shape[1], vocab_size, vocab_start)
    if buffer is None:
        buffer = torch.empty(logits.shape[0], grid.width, dtype=torch.float32, device=logits.device)
    values = buffer[: logits.shape[0]]
    assert values.shape == (logits.shape[0], grid.width)
    end = grid.margin + grid.size
    values[:, : grid.margin] = -math.inf
    values[:, grid.margin : end] = logits[:, : grid.size]
    values[:, end:] = -math.inf
    return ShardLogits(values, grid.first_id, group, vocab_size)


def shard_grid(columns: int, vocab_size: int, vocab_start: int) -> NoiseGrid:
    """Position of the columns of ids vocab_start ... when cut at multiples of TILE ids, without those from vocab_size on."""
    size = max(0, min(columns, vocab_size - vocab_start))
    margin = vocab_start % TILE
    return NoiseGrid(vocab_start - margin, margin, size, max(1, math.ceil((margin + size) / TILE)) * TILE)


class RowSettings:
    """Sampling parameters of rows as tensors, made once for a draft loop, so that `process` does not copy from the host.

    Immutable: `first` and `with_context` return new instances that share the tensors.
    """

    __slots__ = ("context_ids", "divides", "min_p", "params", "penalizes", "penalty", "temperature", "top_k", "top_p")

    def __init__(
        self,
        params: Sequence[SamplingParams],
        contexts: Sequence[Sequence[int] | None],
        device: torch.device,
    ) -> None:
        """contexts: ids of prompt and response per row; may be None without a repetition penalty."""
        drawn = [SamplingParams() if p.temperature == 0 else p for p in params]
        self.params = tuple(params)
        self.penalizes = any(p.repetition_penalty != 1.0 for p in params)
        self.divides = any(p.temperature != 1.0 for p in drawn)
        self.context_ids = _padded_ids(params, contexts, device) if self.penalizes else None
        """int64 [n, longest context], padded with -1."""
        self.penalty = _column([p.repetition_penalty for p in params], device) if self.penalizes else None
        self.temperature = _column([p.temperature for p in drawn], device) if self.divides else None
        self.top_k = RowFilter.of([p.top_k or None for p in drawn], torch.int64, device)
        self.top_p = RowFilter.of([p.top_p if p.top_p < 1 else None for p in drawn], torch.float64, device)
        self.min_p = RowFilter.of([p.min_p if p.min_p > 0 else None for p in drawn], torch.float64, device)

    @property
    def changes_logits(self) -> bool:
        return self.penalizes or self.divides or self.filters

    @property
    def filters(self) -> bool:
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def first(self, count: int) -> "RowSettings":
        """The settings of the first `count` rows."""
        if count == len(self.params):
            return self
        out = self._copy()
        out.params = self.params[:count]
        for name in ("context_ids", "penalty", "temperature"):
            tensor = getattr(self, name)
            setattr(out, name, None if tensor is None else tensor[:count])
        for name in ("top_k", "top_p", "min_p"):
            rows: RowFilter | None = getattr(self, name)
            setattr(out, name, None if rows is None else rows.first(count))
        return out

    def with_context(self, token_ids: Tensor) -> "RowSettings":
        """The settings with one more context id per row, int64 [n] on the settings' device."""
        if self.context_ids is None:
            return self
        out = self._copy()
        out.context_ids = torch.cat([self.context_ids, token_ids.unsqueeze(-1)], dim=-1)
        return out

    def _copy(self) -> "RowSettings":
        out = RowSettings.__new__(RowSettings)
        for name in RowSettings.__slots__:
            setattr(out, name, getattr(self, name))
        return out


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Rows that a filter applies to, ascending, with its parameter in each."""

    indices: list[int]
    parameters: list[float]
    rows: Tensor
    """Indices of the rows, int64 [r]."""
    values: Tensor
    """Parameters, [r]."""

    @classmethod
    def of(cls, parameters: Sequence[float | None], dtype: torch.dtype, device: torch.device) -> "RowFilter | None":
        """The filter of `parameters`, in which None marks rows that it does not apply to; None if it applies to none."""
        indices = [i for i, p in enumerate(parameters) if p is not None]
        values = [p for p in parameters if p is not None]
        if not indices:
            return None
        return cls(indices, values, torch.tensor(indices, device=device), torch.tensor(values, dtype=dtype, device=device))

    def first(self, count: int) -> "RowFilter | None":
        """The filter restricted to the first `count` of all rows."""
        m = bisect_left(self.indices, count)
        return RowFilter(self.indices[:m], self.parameters[:m], self.rows[:m], self.values[:m]) if m else None


def process_logits(raw: ShardLogits, params: Sequence[SamplingParams], contexts: Sequence[Sequence[int] | None]) -> ShardLogits:
    """`process` for rows whose settings are used once.

    Args:
        contexts: ids per row to which the repetition penalty applies (prompt and response); may be None without a penalty.
    """
    if not any(changes_logits(p) for p in params):
        return raw
    return process(raw, RowSettings(params, contexts, raw.values.device))


def process(raw: ShardLogits, settings: RowSettings, synchronize: bool = True, out: Tensor | None = None) -> ShardLogits:
    """Apply repetition penalty, temperature, top-k, top-p and min-p, in this order; removed tokens become -inf.

    Each filter keeps all tokens that are at least as likely as the last one that it must keep: equal logits are kept or removed
    together. Temperature 0 neither scales nor filters. Returns `raw` itself if no row needs processing; otherwise a copy, in
    `out` (float32 [n, W]) if given. Collective if the logits are sharded.

    Args:
        synchronize: False forbids waiting for the device: top-p then sorts all logits instead of as many as needed.
    """
    if not settings.changes_logits:
        return raw
    processed = replace(raw, values=raw.values.clone() if out is None else out.copy_(raw.values))
    x = processed.values
    if settings.context_ids is not None and settings.penalty is not None:
        _penalize(processed, settings.context_ids, settings.penalty)
    if settings.temperature is not None:
        x.div_(settings.temperature)
    if settings.filters:
        x.masked_fill_(x < _floors(processed, settings, synchronize).unsqueeze(-1), -math.inf)
    return processed


def changes_logits(params: SamplingParams) -> bool:
    """Whether the sampled distribution differs from the softmax of the raw logits (greedy counts as raw)."""
    p = params
    filtered = p.temperature != 1.0 or p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    return p.repetition_penalty != 1.0 or (p.temperature != 0 and filtered)


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [...] of every rank as [ranks, ...]."""
    if group is None or group.size() == 1:
        return tensor.unsqueeze(0)
    flat = tensor.reshape(-1)
    out = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_single(out, flat, group=group)
    return out.view(group.size(), *tensor.shape)


def _penalize(logits: ShardLogits, context_ids: Tensor, penalty: Tensor) -> None:
    """Divide positive logits of tokens in the context by the penalty, multiply negative ones (CTRL, arXiv 1909.05858)."""
    x = logits.values
    column = context_ids - logits.first_id
    column.masked_fill_((column < 0) | (column >= x.shape[1]) | (context_ids < 0), x.shape[1])
    seen = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device).scatter_(1, column, True)[:, :-1]
    x.copy_(torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x))


def _floors(logits: ShardLogits, settings: RowSettings, synchronize: bool) -> Tensor:
    """The smallest logit that each row keeps, float32 [n]."""
    x = logits.values
    floor = x.new_full((x.shape[0],), -math.inf)
    if (top_k := settings.top_k) is not None:
        floor[top_k.rows] = _top_k_floor(x[top_k.rows], top_k, logits)
    largest = gather(x.amax(-1), logits.group).amax(0)
    if (top_p := settings.top_p) is not None:
        rows = top_p.rows
        floor[rows] = _top_p_floor(x[rows], top_p.values, floor[rows], largest[rows], logits, synchronize)
    if (min_p := settings.min_p) is not None:
        rows = min_p.rows
        floor[rows] = torch.maximum(floor[rows], (largest[rows].double() + min_p.values.log()).float())
    return floor


def _top_k_floor(x: Tensor, top_k: RowFilter, logits: ShardLogits) -> Tensor:
    """The k-th largest logit of each row over all shards; the smallest one if k exceeds the vocabulary."""
    most = min(int(max(top_k.parameters)), logits.vocab_size)
    local = _padded(x.topk(min(most, x.shape[1])).values, most, -math.inf)
    largest = _side_by_side(gather(local, logits.group)).topk(most).values
    index = top_k.values.clamp(max=most).unsqueeze(-1) - 1
    return largest.gather(-1, index).squeeze(-1)


def _top_p_floor(x: Tensor, top_p: Tensor, floor: Tensor, largest: Tensor, logits: ShardLogits, synchronize: bool) -> Tensor:
    """The largest logit from which upwards a row has at least the share top_p of the mass above `floor`.

    Examines as few of each shard's largest logits as suffice, or all of them if it must not wait for the device. Exact up to
    float32 exponentials, and the same under any sharding: masses are integers, and a row is settled only by logits at least as
    large as any that were not examined.
    """
    kept = x.masked_fill(~(x >= floor.unsqueeze(-1)), -math.inf)
    mass = (kept - largest.unsqueeze(-1)).exp_().nan_to_num_(0.0).double().mul_(_MASS_SCALE).round_()  # a row with NaN has none
    wanted = gather(mass.long().sum(-1), logits.group).sum(0).double() * top_p
    if not synchronize:
        settled_at, _ = _reaching(kept, mass, wanted, logits.vocab_size, logits.group)
        return torch.maximum(settled_at, floor)
    result = torch.full_like(floor, -math.inf)
    pending = torch.arange(x.shape[0], device=x.device)
    candidates = _FIRST_CANDIDATES
    while pending.numel():
        settled_at, settled = _reaching(kept[pending], mass[pending], wanted[pending], candidates, logits.group)
        result[pending[settled]] = settled_at[settled]
        pending = pending[~settled]
        candidates = min(4 * candidates, logits.vocab_size)
    return torch.maximum(result, floor)


def _reaching(
    x: Tensor, mass: Tensor, wanted: Tensor, candidates: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The logit at which each row's mass, summed from the largest logit on, reaches `wanted`, and whether it is exact."""
    logit, reached, unseen = _cumulated(x, mass, candidates, group)
    first = (reached < wanted.unsqueeze(-1)).sum(-1, keepdim=True)
    settled_at = logit.gather(-1, first.clamp(max=logit.shape[1] - 1)).squeeze(-1)
    return settled_at.float(), (first.squeeze(-1) < logit.shape[1]) & (settled_at >= unseen)


def _cumulated(x: Tensor, mass: Tensor, candidates: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """The shards' largest logits in descending order [r, c], the mass down to each, and a bound on any other logit [r]."""
    top = x.topk(min(candidates, x.shape[1]))
    logit, weight = top.values.double(), mass.gather(-1, top.indices)
    unseen = logit[:, -1:] if candidates < x.shape[1] else torch.full_like(logit[:, -1:], -math.inf)
    both = torch.stack([_padded(logit, candidates, -math.inf), _padded(weight, candidates, 0.0)])
    shards = gather(torch.cat([both, torch.stack([unseen, unseen])], dim=-1), group)  # [ranks, 2, r, candidates + 1]
    merged = _side_by_side(shards[:, 0, :, :-1]).sort(dim=-1, descending=True)
    weights = _side_by_side(shards[:, 1, :, :-1]).gather(-1, merged.indices)
    return merged.values, weights.long().cumsum(-1), shards[:, 0, :, -1].amax(0)


def _side_by_side(shards: Tensor) -> Tensor:
    """[ranks, r, c] -> [r, ranks * c]."""
    return shards.transpose(0, 1).flatten(1)


def _padded(x: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)


def _padded_ids(params: Sequence[SamplingParams], contexts: Sequence[Sequence[int] | None], device: torch.device) -> Tensor:
    """Contexts of the rows with a repetition penalty, int64 [n, longest], padded with -1, as are other rows."""
    ids: list[Sequence[int]] = []
    for p, context in zip(params, contexts, strict=True):
        assert p.repetition_penalty == 1.0 or context is not None, "a row with a repetition penalty needs its context ids"
        ids.append(context if context is not None and p.repetition_penalty != 1.0 else ())
    longest = max(map(len, ids))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in ids], dtype=torch.int64, device=device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(-1)
