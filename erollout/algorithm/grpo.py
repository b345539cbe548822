"""GRPO: group-relative advantages, clipped policy-gradient loss (arXiv 2402.03300), separate clip bounds (2503.14476)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erollout.algorithm.kl import ESTIMATORS
from erollout.config import AlgorithmConfig
from erollout.policy.batch import MicroBatch, TrainSample, token_weights
from erollout.types import ScoredRollout

_EPSILON = 1e-6


class GRPO:
    """Group-relative advantages and a clipped loss for each token."""

    metric_names: tuple[str, ...] = (
        "loss",
        "entropy",
        "ratio",
        "clip_fraction_low",
        "clip_fraction_high",
        "approx_kl",
        "kl_reference",
    )
    max_rollouts = 1

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config
        self.uses_reference = config.kl_coefficient > 0
        self._kl = ESTIMATORS[config.kl_estimator]

    def select(self, group: Sequence[ScoredRollout]) -> bool:
        """GRPO trains on every group."""
        return True

    def token_weights(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """By the configured aggregation."""
        return token_weights([sample.loss_mask for sample in samples], self.config.aggregation)

    def shaped_reward(self, reward: float, sample: TrainSample) -> float:
        """The reward of a sample (with its log-probs), minus its KL to the reference if that is part of the reward."""
        if not (self.uses_reference and self.config.kl_placement == "reward"):
            return reward
        old, ref = torch.tensor(sample.old_logprobs), torch.tensor(sample.ref_logprobs)
        mask = torch.tensor(sample.loss_mask)
        return reward - self.config.kl_coefficient * float((self._kl(old, ref) * mask).sum())

    def advantages(self, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
        """The advantage of each sample: its (shaped) reward relative to its group.

        Args:
            rewards: reward per sample of the whole batch.
            groups: prompt of each sample; samples of one group need not be adjacent.
        """
        shaped = torch.tensor(rewards, dtype=torch.float64)
        return group_relative(shaped, torch.tensor(groups, dtype=torch.int64), self.config.normalize_advantages).tolist()

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token [B, S], to be averaged by the caller, and metrics, each [B, S] too."""
        config = self.config
        log_ratio = (logprobs - batch.old_logprobs) * batch.mask
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
        loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        kl = torch.zeros_like(loss)
        if self.uses_reference:
            kl = self._kl(logprobs * batch.mask, batch.ref_logprobs)
            if config.kl_placement == "loss":
                loss = loss + config.kl_coefficient * kl
        loss = loss - config.entropy_coefficient * entropy
        report = {
            "loss": loss,
            "entropy": entropy,
            "ratio": ratio,
            "clip_fraction_low": ((ratio < clipped) & (batch.advantages < 0)).float(),
            "clip_fraction_high": ((ratio > clipped) & (batch.advantages > 0)).float(),
            "approx_kl": ratio - 1.0 - log_ratio,
            "kl_reference": kl,
        }
        return loss, report


def group_relative(rewards: Tensor, groups: Tensor, normalize: bool) -> Tensor:
    """rewards [n] minus the mean of their group [n], divided by the group's standard deviation if `normalize`.

    A group whose rewards are all equal has advantage 0 throughout, exactly.
    """
    names, member = groups.unique(return_inverse=True)
    count = rewards.new_zeros(len(names)).index_add_(0, member, torch.ones_like(rewards))
    lowest = rewards.new_zeros(len(names)).scatter_reduce_(0, member, rewards, "amin", include_self=False)
    rewards = rewards - lowest[member]  # the mean of equal numbers may round, the mean of zeros does not
    mean = torch.zeros_like(count).index_add_(0, member, rewards) / count
    centred = rewards - mean[member]
    if not normalize:
        return centred
    variance = torch.zeros_like(count).index_add_(0, member, centred.square()) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + _EPSILON)[member]
