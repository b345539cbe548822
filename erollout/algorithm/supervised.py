"""Supervised fine-tuning as an algorithm: the loss of a token is minus its log-prob."""

from collections.abc import Sequence

from torch import Tensor

from erollout.policy.batch import MicroBatch, TrainSample, token_weights


class Supervised:
    metric_names: tuple[str, ...] = ("loss", "entropy")

    def token_weights(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Every token counts the same."""
        return token_weights([sample.loss_mask for sample in samples], "token-mean")

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of each token [B, S]."""
        return -logprobs, {"loss": -logprobs, "entropy": entropy}
