"""What a run knows of an algorithm: the loss of a token, its weight, and for reinforcement learning groups and advantages.

A step asks in this order: `select` (of each group, once its responses are scored), `token_weights` (of each optimizer step's
samples), `shaped_reward` (of each sample, with its log-probs), `advantages` (of all samples), `token_loss` (of each
micro-batch). Every rank asks the same, except where it says otherwise.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from erollout.policy.batch import MicroBatch, TrainSample
from erollout.types import ScoredRollout


class WeightedLoss(Protocol):
    """What an optimizer step is made of."""

    metric_names: tuple[str, ...]
    """Names of what `token_loss` reports."""

    def token_weights(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """The weight of each response token in the loss of one optimizer step; 0 where the sample's loss_mask is 0.

        Args:
            samples: those of the optimizer step, on all ranks; their log-probs and advantages are not known yet.

        Returns: per sample, one weight per response id. Losses and metrics are sums over tokens with these weights.
        """
        ...

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token [B, S], unweighted, and what to report, each [B, S] too.

        Args:
            logprobs: [B, S], of the policy that is updated; gradients flow through it.
            entropy: [B, S], of its distribution at each position.
            batch: what is known of these tokens: mask, old, reference and rollout log-probs, advantages.
        """
        ...


class Algorithm(WeightedLoss, Protocol):
    """A method of reinforcement learning from groups of scored responses to the same prompt."""

    uses_reference: bool
    """Whether samples need the log-probs of the frozen first policy."""
    max_rollouts: int
    """Rollouts of one step at most: while groups are missing, the next one draws a prompt for each. What is missing after the
    last is made up from groups that were not selected, so that steps keep their size."""

    def select(self, group: Sequence[ScoredRollout]) -> bool:
        """Whether a step trains on this group: all responses to one prompt, scored."""
        ...

    def shaped_reward(self, reward: float, sample: TrainSample) -> float:
        """The reward that advantages are made of. Asked on the one rank that knows the sample's log-probs."""
        ...

    def advantages(self, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
        """The advantage of each sample of the step.

        Args:
            rewards: shaped, one per sample.
            groups: the prompt that each sample answers; samples of one group need not be adjacent.
        """
        ...
