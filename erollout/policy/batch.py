"""Sequences to train on and the padded micro-batches they are cut into."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.types import all_sampled


@dataclass(slots=True)
class TrainSample:
    """A prompt with its response and inputs of the loss. Per-token lists have one entry per response id."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    advantage: float = 0.0
    rollout_logprobs: Sequence[float] = ()
    old_logprobs: Sequence[float] = ()
    ref_logprobs: Sequence[float] = ()
    loss_mask: Sequence[int] = ()
    """1 for a response token that is trained on, else 0. Left out: all are 1."""

    def __post_init__(self) -> None:
        self.loss_mask = self.loss_mask or all_sampled(self.response_ids)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(slots=True)
class MicroBatch:
    """Right-padded sequences. B sequences of S positions; position t predicts the token at t + 1."""

    indices: tuple[int, ...]
    """Indices of the samples in the list that was split."""
    tokens: Tensor
    """[B, S] int64: input ids."""
    labels: Tensor
    """[B, S] int64: the token after each position."""
    position_ids: Tensor
    """[B, S] int64."""
    responses: Tensor
    """[B, S] bool: where the label is a response token."""
    mask: Tensor
    """[B, S] float32: 1 where the label is a response token that is trained on."""
    weights: Tensor
    """[B, S] float32: each token's share in the loss of the whole global batch; 0 outside the mask."""
    advantages: Tensor
    """[B, 1] float32."""
    old_logprobs: Tensor
    """[B, S] float32, 0 outside the mask; so are the next two."""
    ref_logprobs: Tensor
    rollout_logprobs: Tensor


def cut_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, longest first, in groups whose padded size (count x longest) stays within max_tokens.

    A sequence longer than max_tokens is a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices for each of `parts` ranks with nearly equal token counts: longest first, each to the least loaded rank.

    Ties go to the rank with fewer sequences, so that no rank stays empty while there are as many sequences as ranks.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(parts), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(share) for share in shares]


def collate(
    samples: Sequence[TrainSample], indices: Sequence[int], weights: Sequence[Sequence[float]], pad_multiple: int
) -> MicroBatch:
    """Pad samples[i] for i in `indices` to their longest, rounded up to pad_multiple; weights[i]: one per response id."""
    chosen = [samples[i] for i in indices]
    longest = max(2, *(sample.length for sample in chosen)) - 1
    width = -(-longest // pad_multiple) * pad_multiple
    tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
    labels = torch.zeros_like(tokens)
    responses = torch.zeros(len(chosen), width, dtype=torch.bool)
    mask, weight, old, ref, rollout = (torch.zeros(len(chosen), width) for _ in range(5))
    for row, (index, sample) in enumerate(zip(indices, chosen, strict=True)):
        assert len(sample.prompt_ids), "the first response token has no position that predicts it"
        ids = torch.tensor([*sample.prompt_ids, *sample.response_ids])
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
        response = slice(len(sample.prompt_ids) - 1, len(ids) - 1)
        responses[row, response] = True
        columns = (
            (mask, sample.loss_mask),
            (weight, weights[index]),
            (old, sample.old_logprobs),
            (ref, sample.ref_logprobs),
            (rollout, sample.rollout_logprobs),
        )
        for target, values in columns:
            if len(values):
                assert len(values) == len(sample.response_ids), "one value per response id"
                target[row, response] = torch.tensor(values, dtype=torch.float32)
                target[row] *= mask[row]
    return MicroBatch(
        indices=tuple(indices),
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(width).expand(len(chosen), -1).contiguous(),
        responses=responses,
        mask=mask,
        weights=weight,
        advantages=torch.tensor([[sample.advantage] for sample in chosen], dtype=torch.float32),
        old_logprobs=old,
        ref_logprobs=ref,
        rollout_logprobs=rollout,
    )


def token_weights(loss_masks: Sequence[Sequence[int]], aggregation: str) -> list[list[float]]:
    """Weight of each response token, per response, such that all weights of the batch sum to 1; 0 where the mask is 0.

    token-mean: all tokens that are trained on have equal weights. sequence-mean: all responses have equal weights, shared by
    their tokens.
    """
    counts = [sum(mask) for mask in loss_masks]
    total = max(1, sum(counts))
    shares = [1.0 / (total if aggregation == "token-mean" else max(1, count) * len(loss_masks)) for count in counts]
    return [[share if trained else 0.0 for trained in mask] for mask, share in zip(loss_masks, shares, strict=True)]
