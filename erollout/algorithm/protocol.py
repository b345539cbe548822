"""What the trainer knows of an algorithm."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from erollout.policy.batch import MicroBatch, TrainSample


class Algorithm(Protocol):
    metric_names: tuple[str, ...]
    uses_reference: bool
    aggregation: str

    def shaped_reward(self, reward: float, sample: TrainSample) -> float: ...

    def advantages(self, rewards: Sequence[float], groups: Sequence[int]) -> list[float]: ...

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]: ...
