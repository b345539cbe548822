"""Which samples of a rollout this rank trains on, in which optimizer step. Every rank computes the same split."""

from collections.abc import Sequence
from dataclasses import dataclass

from erollout.policy.batch import TrainSample, balance, token_weights
from erollout.types import Rollout, ScoredRollout


@dataclass(slots=True)
class MiniBatch:
    """One data-parallel rank's share of the samples of one optimizer step."""

    indices: list[int]
    """Positions in the rollout's list of samples."""
    samples: list[TrainSample]
    weights: list[float]
    """Of each sample's response tokens; over all data-parallel ranks they sum to 1."""


def split(
    scored: Sequence[ScoredRollout],
    global_batch_size: int,
    data_parallel_size: int,
    data_parallel_rank: int,
    aggregation: str,
    raw_logprobs: bool = False,
) -> list[MiniBatch]:
    """Consecutive runs of global_batch_size samples, each balanced over the data-parallel ranks by tokens.

    raw_logprobs: whether the engine's raw log-probs, and not the processed ones, are those to compare with the actor's.
    """
    batches = []
    for start in range(0, len(scored), global_batch_size):
        part = [_train_sample(s.rollout, raw_logprobs) for s in scored[start : start + global_batch_size]]
        weights = token_weights([len(sample.response_ids) for sample in part], aggregation)
        mine = balance([sample.length for sample in part], data_parallel_size)[data_parallel_rank]
        batches.append(MiniBatch([start + i for i in mine], [part[i] for i in mine], [weights[i] for i in mine]))
    return batches


def _train_sample(rollout: Rollout, raw: bool) -> TrainSample:
    logprobs = rollout.raw_logprobs if raw else rollout.rollout_logprobs
    return TrainSample(rollout.prompt_ids, rollout.response_ids, rollout_logprobs=logprobs)
