"""Log-probabilities and entropy of vocabulary-parallel logits, without gathering them.

Each tensor-parallel rank holds columns [vocab_start, vocab_start + V_local) of the logits. Two small all-reduces per call
(a maximum, then three sums of one float per token) are all that crosses ranks. Rows are processed in chunks, so that the
float32 copies stay small beside the logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
"""Number of logits per chunk: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The columns of the logits that this rank holds."""

    group: dist.ProcessGroup | None
    """Tensor-parallel group; None: this rank holds the whole vocabulary."""
    start: int
    size: int
    """Number of real columns; the padding after them is excluded from the softmax."""


def vocab_shard(group: dist.ProcessGroup, vocab_size: int, local_columns: int) -> VocabShard:
    """The shard of a rank whose logits have `local_columns` columns, padding included."""
    start = group.rank() * local_columns
    return VocabShard(group if group.size() > 1 else None, start, max(0, min(local_columns, vocab_size - start)))


def logprobs_and_entropy(logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[labels] and the entropy of that softmax, in nats.

    Args:
        logits: [..., V_local], any floating dtype.
        labels: [...], int64 ids in the whole vocabulary.

    Returns:
        Two float32 tensors [...], the same on every tensor-parallel rank. Both are differentiable.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    logprobs, entropy = _LogProbs.apply(flat, labels.reshape(-1), shard, temperature)
    return logprobs.view(labels.shape), entropy.view(labels.shape)


def reference_logprobs_and_entropy(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same from whole logits [..., V] by torch's own operators, as the reference in tests."""
    log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
    logprobs = log_softmax.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float) -> tuple[Tensor, Tensor]:
        tokens = logits.shape[0]
        maximum = logits.new_full((tokens,), float("-inf"), dtype=torch.float32)
        if shard.size:
            maximum = logits[:, : shard.size].amax(-1).float() / temperature
        _all_reduce(maximum, shard.group, dist.ReduceOp.MAX)
        sums = maximum.new_zeros(3, tokens)  # sums of exp(x - max), of that times (x - max), and the label's x - max
        for rows in _chunks(logits):
            _chunk_sums(_shifted(logits, rows, shard, temperature, maximum), labels[rows], shard.start, sums[:, rows])
        _all_reduce(sums, shard.group, dist.ReduceOp.SUM)
        log_sum = sums[0].log()
        entropy = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(logits, labels, maximum + log_sum, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return sums[2] - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        logits, labels, log_z, entropy = ctx.saved_tensors
        shard = ctx.shard
        grad = torch.zeros_like(logits)
        for rows in _chunks(logits):
            log_p = _shifted(logits, rows, shard, ctx.temperature, log_z)
            p = log_p.exp()
            # d logprob/dx = onehot - p;  d entropy/dx = -p (log p + entropy)
            chunk = -p * (grad_logprobs[rows, None] + grad_entropy[rows, None] * (log_p + entropy[rows, None]))
            local, mine = _local_labels(labels[rows], shard.start, chunk.shape[1])
            chunk[mine, local[mine]] += grad_logprobs[rows][mine]
            grad[rows, : shard.size] = (chunk / ctx.temperature).to(grad.dtype)
        return grad, None, None, None


def _chunk_sums(shifted: Tensor, labels: Tensor, start: int, out: Tensor) -> None:
    """Adds a chunk's three sums to `out` [3, rows]."""
    weights = shifted.exp()
    out[0] = weights.sum(-1)
    out[1] = (weights * shifted).sum(-1)
    local, mine = _local_labels(labels, start, shifted.shape[1])
    out[2, mine] = shifted[mine, local[mine]]


def _local_labels(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Labels as local columns, and a mask of those in this shard."""
    local = labels - start
    return local, (local >= 0) & (local < columns)


def _shifted(logits: Tensor, rows: slice, shard: VocabShard, temperature: float, shift: Tensor) -> Tensor:
    """logits / temperature - shift in float32, without the padding columns; a copy whatever the dtype of the logits."""
    return logits[rows, : shard.size].to(torch.float32, copy=True).div_(temperature).sub_(shift[rows, None])


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(i, min(i + step, logits.shape[0])) for i in range(0, logits.shape[0], step)]


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: Any) -> None:
    if group is not None:
        dist.all_reduce(tensor, op, group=group)
