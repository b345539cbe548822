"""Supervised fine-tuning as an algorithm: the loss of a token is minus its log-prob."""

from torch import Tensor

from erollout.policy.batch import MicroBatch


class Supervised:
    metric_names: tuple[str, ...] = ("loss", "entropy")
    aggregation = "token-mean"

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of each token [B, S]."""
        return -logprobs, {"loss": -logprobs, "entropy": entropy}
