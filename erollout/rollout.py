"""The rollout of one step on all decode replicas: refit, generate, score while generating, gather."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.drafter.drafter import RequantizeStats
from erollout.drafter.self_speculation import SelfSpeculation
from erollout.engine.engine import Engine
from erollout.engine.placement import decode_placement
from erollout.engine.random import request_seed
from erollout.parallel.collectives import all_gather
from erollout.parallel.groups import ParallelContext
from erollout.policy.architecture import Architecture
from erollout.policy.initialization import first_weights
from erollout.resharding.executor import Resharder, ReshardStats, wire_dtype
from erollout.resharding.planner import plan_for_rank
from erollout.resharding.transport import ProcessGroupTransport
from erollout.rewards.pool import RewardPool
from erollout.speculation.statistics import SpeculationStatistics, merge
from erollout.types import Prompt, Reward, Rollout, RolloutRequest, SamplingParams, ScoredRollout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TRAINING_STREAM, EVALUATION_STREAM = 0, 1
"""Streams of random numbers: evaluation never repeats the noise of training."""


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What every rank knows after a rollout."""

    scored: list[ScoredRollout]
    """All replicas' samples, ordered by prompt and sample."""
    reports: list[dict[str, float]]
    """One per decode replica: tokens, seconds, scoring errors."""
    speculation: SpeculationStatistics
    """Of all replicas together."""


@dataclass(frozen=True, slots=True)
class RefitStats:
    """What taking over a policy took, on this rank."""

    reshard: ReshardStats
    requantize: RequantizeStats | None
    """None without a drafter. Its seconds are part of the reshard's: it works on tensors as they land."""


class RolloutWorker:
    """This rank's part of a decode replica. All methods are collective over the world."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        context: ParallelContext,
        tokenizer: PreTrainedTokenizerBase,
        rewards: RewardPool,
    ) -> None:
        self.config = config
        self.context = context
        self.tokenizer = tokenizer
        self.rewards = rewards
        max_model_len = config.model.max_position_embeddings or architecture.max_position_embeddings
        self.engine = Engine(
            architecture, config.rollout, context.decode_group, context.device, tokenizer, max_model_len=max_model_len
        )
        self.speculation = SelfSpeculation(config, self.engine) if config.speculation.mode != "off" else None
        self.resharder = self._build_resharder(architecture)

    def refit(self, policy: dict[str, Tensor], policy_version: int) -> RefitStats:
        """Take over the policy's weights from the training layout, and make the drafter of them as they land."""
        stats = self.resharder.run(policy, self.engine.local_tensors())
        return RefitStats(stats, self._updated(policy_version))

    def load_weights(self) -> RequantizeStats | None:
        """Take the configured model's weights instead of a policy's: for sampling without training. None without a drafter."""
        architecture, decode = self.engine.architecture, self.context.decode
        placement = decode_placement(architecture, decode.tensor, decode.tensor_rank(self.context.rank))
        first_weights(self.engine.local_tensors(), architecture, self.config.model, placement, self.config.train.seed)
        if self.speculation is not None:
            self.speculation.all_landed()
        return self._updated(0)

    def rollout(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, group_size: int, stream: int, step: int
    ) -> RolloutResult:
        """Sample every prompt group_size times and score the samples.

        Args:
            prompts: of the whole cluster, the same on every rank; replica r takes prompts r, r + replicas, ...
            stream: TRAINING_STREAM or EVALUATION_STREAM.
        """
        replica = self.context.decode.replica(self.context.rank)
        mine = prompts[replica :: self.context.decode.replicas]
        seed = self.config.train.seed * 2 + stream
        requests = [
            RolloutRequest(p.index, p.prompt_ids, group_size, sampling, request_seed(seed, step, p.index)) for p in mine
        ]
        self.engine.wake_up()
        rollouts = self._generate(requests, {p.index: p for p in mine})
        if self.speculation is not None and stream == TRAINING_STREAM:
            due = step % self.config.speculation.drafter.statistics_interval == 0
            if due or not self.speculation.has_learned:  # the first rollout of a resumed run too
                self.speculation.learn_from(rollouts)
        self.engine.sleep()
        return self._gather(rollouts, {p.index: p for p in prompts})

    def evaluate(self, data: PromptDataset, step: int) -> RolloutResult:
        """Sample and score the held-out prompts as the evaluation section says."""
        options = self.config.evaluation
        prompts = [data.prompt(i) for i in range(min(options.num_prompts, len(data)))]
        sampling = self.sampling_params(options.temperature)
        return self.rollout(prompts, sampling, options.samples_per_prompt, EVALUATION_STREAM, step)

    def sampling_params(self, temperature: float | None = None) -> SamplingParams:
        """The configured distribution; evaluation may have its own temperature."""
        rollout = self.config.rollout
        return SamplingParams(
            temperature=rollout.temperature if temperature is None else temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty,
            max_tokens=rollout.max_tokens,
            stop_token_ids=self._stop_token_ids(),
            stop=rollout.stop,
            ignore_eos=rollout.ignore_eos,
        )

    def _updated(self, policy_version: int) -> RequantizeStats | None:
        """Engine and drafter now hold this version."""
        self.engine.weights_updated(policy_version)
        return self.speculation.complete(policy_version) if self.speculation is not None else None

    def _generate(self, requests: list[RolloutRequest], prompts: dict[int, Prompt]) -> list[Rollout]:
        if not self.context.is_decode_leader:
            return self.engine.generate(requests)
        return self.engine.generate(
            requests, on_finished=lambda r: self.rewards.submit(prompts[r.prompt_index], r, self.text(r))
        )

    def text(self, rollout: Rollout) -> str:
        """The response as the scorer sees it."""
        return str(self.tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True))

    def _gather(self, rollouts: list[Rollout], prompts: dict[int, Prompt]) -> RolloutResult:
        """Every replica's rollouts and rewards to every rank."""
        contribution: _Contribution | None = None
        if self.context.is_decode_leader:
            rewards = self.rewards.collect()
            contribution = _Contribution(rollouts, rewards, self._report(rollouts, rewards), self.engine.stats.speculation)
        parts = [part for part in all_gather(contribution) if part is not None]
        scored: list[ScoredRollout] = []
        for part in parts:
            for rollout in part.rollouts:
                reward = part.rewards[rollout.prompt_index, rollout.sample_index]
                scored.append(ScoredRollout(rollout, reward.value, prompts[rollout.prompt_index].task))
        order = {index: position for position, index in enumerate(prompts)}
        scored.sort(key=lambda s: (order[s.rollout.prompt_index], s.rollout.sample_index))
        return RolloutResult(scored, [part.report for part in parts], merge(part.speculation for part in parts))

    def _report(self, rollouts: list[Rollout], rewards: dict[tuple[int, int], Reward]) -> dict[str, float]:
        stats = self.engine.stats
        return {
            "seconds": stats.seconds,
            "tokens": float(sum(len(r.response_ids) for r in rollouts)),
            "preemptions": float(stats.preemptions),
            "decode_steps": float(stats.steps),
            "scoring_errors": float(sum(r.error is not None for r in rewards.values())),
        }

    def _stop_token_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        ends = (*self.engine.architecture.eos_token_ids, *(() if eos is None else (eos,)), *self.config.rollout.stop_token_ids)
        return tuple(dict.fromkeys(ends))

    def _build_resharder(self, architecture: Architecture) -> Resharder:
        context, sent = self.context, wire_dtype(DTYPES[self.config.model.dtype], DTYPES[self.config.rollout.dtype])
        plan = plan_for_rank(architecture, context.train, context.decode, context.rank, decode_placement, sent.itemsize)
        hook = self.speculation.tensor_landed if self.speculation is not None else None
        return Resharder(plan, ProcessGroupTransport(None, context.device), sent, context.device, hook)


@dataclass(frozen=True, slots=True)
class _Contribution:
    """What a replica tells the others."""

    rollouts: list[Rollout]
    rewards: dict[tuple[int, int], Reward]
    report: dict[str, float]
    speculation: SpeculationStatistics
