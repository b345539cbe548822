"""A rank's logits and how sampling parameters change them. Under tensor parallelism no rank sees the others' columns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.engine.random import TILE
from erollout.types import SamplingParams

_FIRST_CANDIDATES = 256
"""Largest logits of a shard that top-p looks at first; four times as many each time they don't cover its mass."""
_MASS_SCALE = 2.0**40
"""Top-p adds probabilities as integers of this scale: integer sums are the same in any order, so under any sharding."""


@dataclass(frozen=True, slots=True)
class ShardLogits:
    """Columns of the logits in float32, cut at multiples of TILE ids; whatever is not this rank's token is -inf."""

    values: Tensor
    """[n, W], W a multiple of TILE, contiguous."""
    first_id: int
    """Token id of column 0, a multiple of TILE."""
    group: dist.ProcessGroup | None
    """Ranks that hold the other columns; None when there are none."""
    vocab_size: int
    """Of all ranks together, without padding."""

    def local_normalizer(self) -> Tensor:
        """log of the sum of exponentials over this rank's columns, float64 [n]: -inf without any, NaN if a logit is NaN."""
        largest = self.values.amax(-1).double()
        # log_softmax is torch's fastest pass over a row; at the largest logit it is minus the logarithm sought, less that logit
        below = self.values.log_softmax(-1).amax(-1).double()
        return torch.where(largest == -math.inf, largest, largest - below)

    def logprobs(self) -> Tensor:
        """Log-probabilities of this rank's columns under the softmax over all ranks, float32 [n, W]. Collective."""
        normalizer = gather(self.local_normalizer(), self.group).logsumexp(0)
        return self.values - normalizer.float().unsqueeze(-1)


def shard_logits(
    logits: Tensor, vocab_size: int, vocab_start: int = 0, group: dist.ProcessGroup | None = None, buffer: Tensor | None = None
) -> ShardLogits:
    """Logits [n, V_local] (any floating dtype) of ids vocab_start ... as a shard; columns from vocab_size on are padding.

    With a `buffer` (float32 [at least n, W]) the shard's values are its first rows: fresh megabytes cost more in page faults
    than the copy itself.
    """
    size = max(0, min(logits.shape[1], vocab_size - vocab_start))
    margin = vocab_start % TILE
    width = max(1, math.ceil((margin + size) / TILE)) * TILE
    if buffer is None:
        buffer = torch.empty(logits.shape[0], width, dtype=torch.float32, device=logits.device)
    values = buffer[: logits.shape[0]]
    assert values.shape == (logits.shape[0], width)
    values[:, :margin] = -math.inf
    values[:, margin : margin + size] = logits[:, :size]
    values[:, margin + size :] = -math.inf
    return ShardLogits(values, vocab_start - margin, group, vocab_size)


def process_logits(raw: ShardLogits, params: Sequence[SamplingParams], contexts: Sequence[Sequence[int] | None]) -> ShardLogits:
    """What is sampled from: repetition penalty, temperature, top-k, top-p, min-p, in this order; removed tokens are -inf.

    Each filter keeps whatever is at least as likely as the last token that it must keep: equal logits stay or go together.
    Temperature 0 divides by nothing and filters nothing. Returns `raw` itself when no row asks for anything; otherwise a copy.
    Collective when the logits are sharded.

    Args:
        contexts: per row the ids that the repetition penalty applies to (prompt and response); may be None without a penalty.
    """
    if not any(changes_logits(p) for p in params):
        return raw
    out = replace(raw, values=raw.values.clone())
    for row, (p, context) in enumerate(zip(params, contexts, strict=True)):
        if p.repetition_penalty != 1.0:
            assert context is not None, "a row with a repetition penalty needs its context ids"
            _penalize(out, row, context, p.repetition_penalty)
    drawn = [SamplingParams() if p.temperature == 0 else p for p in params]
    if any(p.temperature != 1.0 for p in drawn):
        out.values.div_(_column([p.temperature for p in drawn], out.values))
    if any(p.top_k or p.top_p < 1 or p.min_p > 0 for p in drawn):
        floor = _floors(out, drawn)
        out.values.masked_fill_(out.values < floor.unsqueeze(-1), -math.inf)
    return out


def changes_logits(params: SamplingParams) -> bool:
    """Whether the distribution that is sampled differs from the softmax of the raw logits (greedy counts as raw)."""
    p = params
    filtered = p.temperature != 1.0 or p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    return p.repetition_penalty != 1.0 or (p.temperature != 0 and filtered)


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] of every rank as [ranks, ...]."""
    if group is None or group.size() == 1:
        return tensor.unsqueeze(0)
    flat = tensor.reshape(-1)
    out = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_single(out, flat, group=group)
    return out.view(group.size(), *tensor.shape)


def _penalize(logits: ShardLogits, row: int, context: Sequence[int], penalty: float) -> None:
    """Divide positive logits of tokens in the context by the penalty, multiply negative ones (CTRL, arXiv 1909.05858)."""
    width = logits.values.shape[1]
    columns = sorted({i - logits.first_id for i in context if 0 <= i - logits.first_id < width})
    index = torch.tensor(columns, dtype=torch.int64, device=logits.values.device)
    x = logits.values[row, index]
    logits.values[row, index] = torch.where(x > 0, x / penalty, x * penalty)


def _floors(logits: ShardLogits, params: Sequence[SamplingParams]) -> Tensor:
    """The smallest logit that each row keeps, float32 [n]."""
    x = logits.values
    floor = x.new_full((len(params),), -math.inf)
    if (rows := _rows(x, params, lambda p: 0 < p.top_k < logits.vocab_size)) is not None:
        floor[rows] = _top_k_floor(x[rows], [params[i].top_k for i in rows.tolist()], logits.group)
    largest = gather(x.amax(-1), logits.group).amax(0)
    if (rows := _rows(x, params, lambda p: p.top_p < 1)) is not None:
        top_p = _column([params[i].top_p for i in rows.tolist()], x, torch.float64)
        floor[rows] = _top_p_floor(x[rows], top_p, floor[rows], largest[rows], logits.vocab_size, logits.group)
    if (rows := _rows(x, params, lambda p: p.min_p > 0)) is not None:
        log_min_p = _column([params[i].min_p for i in rows.tolist()], x, torch.float64).log().squeeze(-1)
        floor[rows] = torch.maximum(floor[rows], (largest[rows].double() + log_min_p).float())
    return floor


def _top_k_floor(x: Tensor, top_k: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """The k-th largest logit of each row over all shards."""
    most = max(top_k)
    local = _padded(x.topk(min(most, x.shape[1])).values, most, -math.inf)
    largest = _side_by_side(gather(local, group)).topk(most).values
    index = torch.tensor(top_k, device=x.device).unsqueeze(-1) - 1
    return largest.gather(-1, index).squeeze(-1)


def _top_p_floor(
    x: Tensor, top_p: Tensor, floor: Tensor, largest: Tensor, vocab_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The largest logit whose row, from it upwards, has at least the share top_p of the mass above `floor`.

    Looks at as few of each shard's largest logits as suffice. Exact up to float32 exponentials, and the same under any
    sharding: masses are integers, and a row is settled only by logits at least as large as any that were not looked at.
    """
    kept = x.masked_fill(~(x >= floor.unsqueeze(-1)), -math.inf)
    mass = (kept - largest.unsqueeze(-1)).exp_().nan_to_num_(0.0).double().mul_(_MASS_SCALE).round_()  # a row with NaN has none
    wanted = gather(mass.long().sum(-1), group).sum(0).double() * top_p.squeeze(-1)
    result = torch.full_like(floor, -math.inf)
    pending = torch.arange(x.shape[0], device=x.device)
    candidates = _FIRST_CANDIDATES
    while pending.numel():
        logit, reached, unseen = _cumulated(kept[pending], mass[pending], candidates, group)
        first = (reached < wanted[pending].unsqueeze(-1)).sum(-1, keepdim=True)
        settled_at = logit.gather(-1, first.clamp(max=logit.shape[1] - 1)).squeeze(-1)
        settled = (first.squeeze(-1) < logit.shape[1]) & (settled_at >= unseen)
        result[pending[settled]] = settled_at[settled].float()
        pending = pending[~settled]
        candidates = min(4 * candidates, vocab_size)
    return torch.maximum(result, floor)


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


def _rows(like: Tensor, params: Sequence[SamplingParams], wants: Callable[[SamplingParams], bool]) -> Tensor | None:
    rows = [i for i, p in enumerate(params) if wants(p)]
    return torch.tensor(rows, device=like.device) if rows else None


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device).unsqueeze(-1)
