"""One rank's part of a decode replica: engine, proposers of drafts, and its coordination with the other replicas."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erollout.config import Config, ModelConfig, RolloutConfig
from erollout.drafter.registry import proposer_kind, unused_keys
from erollout.engine.engine import Engine
from erollout.engine.model.decode_layout import decode_placement
from erollout.engine.proposers.proposer_set import ProposerSet, RequantizeStats
from erollout.parallel.groups import ParallelContext
from erollout.policy.architecture import Architecture
from erollout.policy.initialization import first_weights
from erollout.resharding.executor import Resharder, ReshardStats, wire_dtype
from erollout.resharding.planner import plan_for_rank
from erollout.resharding.transport import ProcessGroupTransport
from erollout.resilience.unattended import ignore, never
from erollout.rollout.coordination import Coordination
from erollout.rollout.summary import RolloutSummary
from erollout.types import Rollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RefitStats:
    """Cost of a refit on this rank."""

    reshard: ReshardStats
    requantize: RequantizeStats | None
    """Cost of requantising; None: no drafter. Its seconds are part of the reshard's, during which it runs."""


class DecodeReplica:
    """Samples requests of the whole cluster. All methods are collective over the world."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        context: ParallelContext,
        tokenizer: PreTrainedTokenizerBase,
        stop_requested: Callable[[], bool] = never,
        alive: Callable[[], None] = ignore,
    ) -> None:
        """
        Args:
            stop_requested: whether a stop was requested in this process, which interrupts a rollout.
            alive: called at each step of the engine as a sign of life.
        """
        self.config = config
        self.context = context
        self.tokenizer = tokenizer
        self.stop_requested = stop_requested
        length = config.model.max_position_embeddings or architecture.max_position_embeddings
        self.engine = Engine(architecture, config.rollout, context.decode_group, context.device, tokenizer, length)
        self.speculation: ProposerSet | None = None
        if config.speculation.mode != "off":
            self.speculation = proposer_kind(config.speculation).build(config.speculation, self.engine)
            self.speculation.switch(True)
            if unused := unused_keys(config.speculation):
                logger.info("speculation.proposer = %s does not use %s", config.speculation.proposer, ", ".join(unused))
        self.coordination = Coordination(config, context, self.engine, self.speculation, stop_requested, alive)

    def load_weights(self, model: ModelConfig, seed: int) -> RequantizeStats | None:
        """Load a model's weights, or random ones, for sampling without training. Returns None without a drafter."""
        architecture, decode = self.engine.architecture, self.context.decode
        placement = decode_placement(architecture, decode.tensor, decode.tensor_rank(self.context.rank))
        first_weights(self.engine.local_tensors(), architecture, model, placement, seed)
        if self.speculation is not None:
            self.speculation.all_landed()
        return self.weights_updated(0)

    def refit(self, policy: Mapping[str, Tensor], policy_version: int) -> RefitStats:
        """Reshard the policy's weights from the training layout, and requantise the drafter as they arrive.

        policy: this rank's parameters, named as in training_placement().
        """
        stats = self._resharder.run(policy, self.engine.local_tensors())
        return RefitStats(stats, self.weights_updated(policy_version))

    @cached_property
    def _resharder(self) -> Resharder:
        context, architecture = self.context, self.engine.architecture
        sent = wire_dtype(*(getattr(torch, part.dtype) for part in (self.config.model, self.config.rollout)))
        plan = plan_for_rank(architecture, context.train, context.decode, context.rank, decode_placement, sent.itemsize)
        hook = self.speculation.tensor_landed if self.speculation is not None else None
        return Resharder(plan, ProcessGroupTransport(None, context.device), sent, context.device, hook)

    def weights_updated(self, policy_version: int) -> RequantizeStats | None:
        """Declare that engine and proposers hold this version."""
        self.engine.weights_updated(policy_version)
        return self.speculation.complete(policy_version) if self.speculation is not None else None

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        learns: bool,
        speculates: bool = True,
        on_finished: Callable[[Rollout], None] | None = None,
        decisions: Path | None = None,
    ) -> tuple[list[Rollout], RolloutSummary]:
        """Sample requests, which are the same on every rank; the coordinator dispatches them. The engine is awake.

        Args:
            learns: whether later calls learn acceptance and costs from this one.
            speculates: False: without drafts, whatever the mode.
            on_finished: called on the replica's leader with each response as soon as it is complete.
            decisions: file for the decision trace; None: not written.

        Returns: this replica's responses, and its summary. `coordination.was_interrupted` tells whether some are missing.
        """
        control = self.coordination.begin(requests, learns, speculates)
        rollouts = self.engine.run(control, on_finished if self.context.is_decode_leader else None)
        return rollouts, self.coordination.end(decisions)


def with_ends(stop_token_ids: Sequence[int], ends: Sequence[int | None]) -> tuple[int, ...]:
    """Ids that end a response: end-of-sequence ids of model and tokenizer (None: it has none), then the others, once each."""
    return tuple(dict.fromkeys((*(end for end in ends if end is not None), *stop_token_ids)))


def sampling_params(rollout: RolloutConfig, ends: Sequence[int | None], temperature: float | None = None) -> SamplingParams:
    """Parameters of the configured distribution.

    Args:
        ends: end-of-sequence ids of model and tokenizer.
        temperature: instead of the configured one, as in evaluation.
    """
    return SamplingParams(
        temperature=rollout.temperature if temperature is None else temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=rollout.max_tokens,
        stop_token_ids=with_ends(rollout.stop_token_ids, ends),
        stop=rollout.stop,
        ignore_eos=rollout.ignore_eos,
    )
