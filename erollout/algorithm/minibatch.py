"""Which samples of a rollout this rank trains on, in which optimizer step. Pure: every rank computes the same split."""

from collections.abc import Sequence
from dataclasses import dataclass

from erollout.policy.batch import TrainSample, balance, token_weights
from erollout.types import ScoredRollout


@dataclass(slots=True)
class MiniBatch:
    """One data-parallel rank's share of the samples of one optimizer step."""

    indices: list[int]
    """Positions in the rollout's list of samples."""
    samples: list[TrainSample]
    weights: list[float]
    """Of each sample's response tokens; over all data-parallel ranks they sum to 1."""


def split(
    scored: Sequence[ScoredRollout], global_batch_size: int, data_parallel_size: int, data_parallel_rank: int, aggregation: str
) -> list[MiniBatch]:
    """Consecutive runs of global_batch_size samples, each balanced over the data-parallel ranks by tokens."""
    batches = []
    for start in range(0, len(scored), global_batch_size):
        part = [_train_sample(s) for s in scored[start : start + global_batch_size]]
        weights = token_weights([len(sample.response_ids) for sample in part], aggregation)
        mine = balance([sample.length for sample in part], data_parallel_size)[data_parallel_rank]
        batches.append(MiniBatch([start + i for i in mine], [part[i] for i in mine], [weights[i] for i in mine]))
    return batches


def _train_sample(scored: ScoredRollout) -> TrainSample:
    rollout = scored.rollout
    return TrainSample(rollout.prompt_ids, rollout.response_ids, rollout_logprobs=rollout.rollout_logprobs)
