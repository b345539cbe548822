"""Sequences to train on and the padded micro-batches they are cut into."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class TrainSample:
    """A prompt with its response and inputs of the loss. Per-token lists have one entry per response id."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    advantage: float = 0.0
    rollout_logprobs: Sequence[float] = ()
    old_logprobs: Sequence[float] = ()
    ref_logprobs: Sequence[float] = ()

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
    mask: Tensor
    """[B, S] float32: 1 where the label is a response token."""
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


def collate(samples: Sequence[TrainSample], indices: Sequence[int], weights: Sequence[float], pad_multiple: int) -> MicroBatch:
    """Pad samples[i] for i in `indices` to their longest, rounded up to pad_multiple; weights[i] is of each response token."""
    chosen = [samples[i] for i in indices]
    longest = max(2, *(sample.length for sample in chosen)) - 1
    width = -(-longest // pad_multiple) * pad_multiple
    tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
    labels = torch.zeros_like(tokens)
    mask, weight, old, ref, rollout = (torch.zeros(len(chosen), width) for _ in range(5))
    for row, (index, sample) in enumerate(zip(indices, chosen, strict=True)):
        assert len(sample.prompt_ids), "the first response token has no position that predicts it"
        ids = torch.tensor([*sample.prompt_ids, *sample.response_ids])
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
        response = slice(len(sample.prompt_ids) - 1, len(ids) - 1)
        mask[row, response] = 1.0
        weight[row, response] = weights[index]
        for target, values in ((old, sample.old_logprobs), (ref, sample.ref_logprobs), (rollout, sample.rollout_logprobs)):
            if len(values):
                assert len(values) == len(sample.response_ids), "one log-prob per response id"
                target[row, response] = torch.tensor(values, dtype=torch.float32)
    return MicroBatch(
        indices=tuple(indices),
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(width).expand(len(chosen), -1).contiguous(),
        mask=mask,
        weights=weight,
        advantages=torch.tensor([[sample.advantage] for sample in chosen], dtype=torch.float32),
        old_logprobs=old,
        ref_logprobs=ref,
        rollout_logprobs=rollout,
    )


def token_weights(response_lengths: Sequence[int], aggregation: str) -> list[float]:
    """Weight of each token, per response, such that all weights of the batch sum to 1.

    token-mean: all tokens have equal weights. sequence-mean: all responses have equal weights, shared by their tokens.
    """
    if aggregation == "token-mean":
        total = sum(response_lengths)
        return [1.0 / max(1, total)] * len(response_lengths)
    return [1.0 / (max(1, n) * len(response_lengths)) for n in response_lengths]
