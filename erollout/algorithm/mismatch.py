"""Mismatch of the decode engine's and the actor's log-probs before any update: should be rounding; measured every step."""

from collections.abc import Sequence

import torch

from erollout.parallel.collectives import all_max, all_sum
from erollout.policy.batch import TrainSample


def mismatch_metrics(samples: Sequence[TrainSample], device: torch.device) -> dict[str, float]:
    """Difference of old_logprobs and rollout_logprobs over the sampled response tokens of all ranks' samples.

    Args:
        samples: each sample on exactly one rank; a rank that mirrors another one passes an empty list.
    """
    tokens, absolute, kl = all_sum(_sums(samples), device)
    largest_ratio, largest = all_max(_maxima(samples), device)
    return {
        "mismatch/mean_abs_difference": absolute / max(1.0, tokens),
        "mismatch/kl": kl / max(1.0, tokens),
        "mismatch/max_ratio": largest_ratio,
        "mismatch/max_abs_difference": largest,
    }


def _sums(samples: Sequence[TrainSample]) -> list[float]:
    """[tokens, sum of |old - rollout|, sum of the k3 estimate of KL(rollout || old)]."""
    log_ratio = _log_ratio(samples)
    return [float(len(log_ratio)), float(log_ratio.abs().sum()), float((log_ratio.exp() - 1.0 - log_ratio).sum())]


def _maxima(samples: Sequence[TrainSample]) -> list[float]:
    """[largest old/rollout probability ratio, largest |difference|]."""
    log_ratio = _log_ratio(samples)
    return [float(log_ratio.exp().max()), float(log_ratio.abs().max())] if len(log_ratio) else [0.0, 0.0]


def _log_ratio(samples: Sequence[TrainSample]) -> torch.Tensor:
    """old - rollout of every token that the policy sampled [tokens], float64."""
    old = [value for sample in samples for value in sample.old_logprobs]
    rollout = [value for sample in samples for value in sample.rollout_logprobs]
    sampled = [bool(value) for sample in samples for value in sample.loss_mask]
    difference = torch.tensor(old, dtype=torch.float64) - torch.tensor(rollout, dtype=torch.float64)
    return difference[torch.tensor(sampled, dtype=torch.bool)]
