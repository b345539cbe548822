"""The rollout of one step on all decode replicas: refit, generate, score while generating, gather."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.engine.proposers.proposer_set import RequantizeStats
from erollout.engine.sampling.random import request_seed
from erollout.parallel.collectives import all_gather
from erollout.rewards.failures import AllScoringFailed, FailureLog
from erollout.rewards.pool import RewardPool
from erollout.rollout.coordination import Coordination
from erollout.rollout.decode_replica import DecodeReplica, RefitStats, sampling_params
from erollout.rollout.partial import PartialRollouts, RolloutInterrupted, as_partial, fitting, merge_samples
from erollout.rollout.summary import RolloutSummary
from erollout.speculation.statistics import SpeculationStatistics, looks_broken, merge
from erollout.types import PartialRollout, Prompt, Reward, Rollout, RolloutRequest, SamplingParams, ScoredRollout

logger = logging.getLogger(__name__)

TRAINING_STREAM, EVALUATION_STREAM = 0, 1
"""Streams of random numbers, so that evaluation never repeats the noise of training."""


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """Result of a rollout, equal on all ranks."""

    scored: list[ScoredRollout]
    """All replicas' samples, ordered by prompt and sample."""
    reports: list[dict[str, float]]
    """Counts per decode replica: tokens, seconds, scoring errors."""
    speculation: SpeculationStatistics
    """Draft statistics of all replicas together."""
    summaries: list[RolloutSummary]
    """Summary of decisions per decode replica."""
    resumed_samples: int
    """Number of samples, complete or partial, left by an interrupted attempt."""
    kept_tokens: int
    """Number of their tokens, which were not sampled again."""
    failures: Counter[str] = field(default_factory=Counter)
    """Number of responses without a score, by kind of failure."""


class RolloutWorker:
    """This rank's part of a decode replica. All methods are collective over the world."""

    def __init__(self, config: Config, replica: DecodeReplica, rewards: RewardPool) -> None:
        self.config = config
        self.context = replica.context
        self.replica = replica
        self.rewards = rewards
        self.engine, self.speculation = replica.engine, replica.speculation
        self._failures = FailureLog()
        self._states: tuple[str, ...] = ()
        """Speculation state (on or off) by batch size when reasons were last logged."""
        self._said_broken = False

    @property
    def coordination(self) -> Coordination:
        """What steers the next rollout; benchmarks put one in the place of another."""
        return self.replica.coordination

    @coordination.setter
    def coordination(self, coordination: Coordination) -> None:
        self.replica.coordination = coordination

    def refit(self, policy: Mapping[str, Tensor], policy_version: int) -> RefitStats:
        """Reshard the policy's weights from the training layout, and requantise the drafter as they arrive."""
        return self.replica.refit(policy, policy_version)

    def load_weights(self) -> RequantizeStats | None:
        """Load the configured model's weights, for sampling without training. Returns None without a drafter."""
        return self.replica.load_weights(self.config.model, self.config.train.seed)

    def rollout(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        group_size: int,
        stream: int,
        step: int,
        speculates: bool = True,
        learns: bool | None = None,
        partial_rollouts: PartialRollouts | None = None,
    ) -> RolloutResult:
        """Sample every prompt group_size times and score the samples.

        Args:
            prompts: prompts of the whole cluster, the same on every rank; the coordinator dispatches them to replicas.
            stream: TRAINING_STREAM or EVALUATION_STREAM.
            speculates: False: without drafts, whatever the mode.
            learns: whether later rollouts learn acceptance and costs from it; default: only in training.
            partial_rollouts: those of an interrupted attempt.

        Raises RolloutInterrupted, after which the run must end: pending scoring is not waited for.
        """
        requests = self.requests(prompts, sampling, group_size, stream, step)
        by_index = {p.index: p for p in prompts}
        trains = stream == TRAINING_STREAM
        before = fitting(partial_rollouts, requests, step)
        self.engine.wake_up()
        done = self._completed(before, by_index)
        learns, trace = trains if learns is None else learns, self._decisions_file(step) if trains else None
        submit = self._scoring(by_index)
        rollouts, summary = self.replica.sample(before.resume(requests), learns, speculates, submit, trace)
        rollouts = done + rollouts
        if self.coordination.was_interrupted:
            self.engine.sleep()
            raise RolloutInterrupted(self._partial_rollouts(before, requests, rollouts) if trains else None)
        if self.speculation is not None and trains and self.speculation.learns_at(step):
            self.speculation.learn_from(rollouts)
        self.engine.sleep()
        parts = self._gather(rollouts, summary)
        if any(part.scoring_was_cut for part in parts):
            logger.info("stop requested during scoring: the next attempt scores the remaining responses")
            found = (as_partial(rollout) for part in parts for rollout in part.rollouts)
            raise RolloutInterrupted(merge_samples(requests, found) if trains else None)
        result = _merged(parts, by_index, before, self._count_failures(parts, step))
        _require_complete(result, len(prompts) * group_size)
        if trains:
            self._say_why(summary)
            self._say_broken(result.speculation, step)
            self.coordination.lengths = tuple(sorted(len(s.rollout.response_ids) for s in result.scored))
        return result

    def requests(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, group_size: int, stream: int, step: int
    ) -> list[RolloutRequest]:
        """What `rollout` asks the engines for."""
        seed = self.config.train.seed * 2 + stream
        return [RolloutRequest(p.index, p.prompt_ids, group_size, sampling, request_seed(seed, step, p.index)) for p in prompts]

    def evaluate(self, data: PromptDataset, step: int, speculates: bool = True, learns: bool | None = None) -> RolloutResult:
        """Sample and score the held-out prompts as configured by the evaluation section; otherwise as `rollout`."""
        options = self.config.evaluation
        prompts = [data.prompt(i) for i in range(min(options.num_prompts, len(data)))]
        sampling = self.sampling_params(options.temperature)
        return self.rollout(prompts, sampling, options.samples_per_prompt, EVALUATION_STREAM, step, speculates, learns)

    def state_dict(self) -> dict[str, Any]:
        """State for later rollouts, as JSON."""
        learnt = self.speculation.state_dict() if self.speculation is not None else {}
        return self.coordination.state_dict() | ({"drafter": learnt} if learnt else {})

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Load a state; None: the checkpoint has none."""
        if state is None:
            return
        if self.speculation is not None and "drafter" in state:
            self.speculation.load_state_dict(state["drafter"])
        self.coordination.load_state_dict(state)

    def sampling_params(self, temperature: float | None = None) -> SamplingParams:
        """Parameters of the configured distribution; evaluation may have its own temperature."""
        ends = (*self.engine.architecture.eos_token_ids, self.replica.tokenizer.eos_token_id)
        return sampling_params(self.config.rollout, ends, temperature)

    def _scoring(self, prompts: dict[int, Prompt]) -> Callable[[Rollout], None]:
        """Submits a response to the scorers."""
        return lambda r: self.rewards.submit(prompts[r.prompt_index], r, self.text(r))

    def _completed(self, before: PartialRollouts, prompts: dict[int, Prompt]) -> list[Rollout]:
        """This replica's share of the responses completed by an earlier attempt, which are scored here."""
        decode = self.context.decode
        rollouts = before.completed(prompts, self.engine.policy_version or 0)
        mine = rollouts[decode.replica(self.context.rank) :: decode.replicas]
        submit = self._scoring(prompts)
        for rollout in mine if self.context.is_decode_leader else ():
            submit(rollout)
        return mine

    def _partial_rollouts(
        self, before: PartialRollouts, requests: Sequence[RolloutRequest], rollouts: list[Rollout]
    ) -> PartialRollouts:
        """The merged samples of all replicas and earlier attempts, on every rank."""
        mine: list[PartialRollout] = []
        if self.context.is_decode_leader:
            mine = [*self.engine.left, *map(as_partial, rollouts)]
        return merge_samples(requests, [*before.samples, *(sample for part in all_gather(mine) for sample in part)])

    def _say_why(self, summary: RolloutSummary) -> None:
        """Log why the first replica speculates or not, in its first rollout and at changes."""
        states = tuple(reason.partition(":")[0] for reason in summary.why)
        if self.context.rank == 0 and self.speculation is not None and states != self._states:
            self._states = states
            logger.info("speculation in training rollouts: %s", "; ".join(summary.why))

    def _say_broken(self, speculation: SpeculationStatistics, step: int) -> None:
        """Warn once of a drafter that the target hardly ever agrees with: samples are right, time is lost."""
        own = self.config.speculation.proposer == "quantized_policy"
        if own and not self._said_broken and looks_broken(speculation) and self.context.rank == 0:
            self._said_broken = True
            logger.warning(
                "step %d: only %.1f%% of %d draft tokens were accepted: the drafter (speculation.drafter.format = %s) does not "
                "follow the policy; samples are right, but set another format or speculation.mode = off, and report it",
                step + 1,
                100 * speculation.acceptance_rate,
                speculation.drafted,
                self.config.speculation.drafter.format,
            )

    def _decisions_file(self, step: int) -> Path | None:
        interval = self.config.speculation.trace_interval
        if not interval or step % interval or self.config.speculation.mode == "off":
            return None
        replica = self.context.decode.replica(self.context.rank)
        return Path(self.config.train.output_dir) / "decisions" / f"step_{step:08d}.replica_{replica:05d}.csv.gz"

    def text(self, rollout: Rollout) -> str:
        """The response as the scorer sees it."""
        return self.engine.response_text(rollout.response_ids)

    def _gather(self, rollouts: list[Rollout], summary: RolloutSummary) -> "list[_Contribution]":
        """Gather all replicas' rollouts and rewards on every rank."""
        contribution: _Contribution | None = None
        if self.context.is_decode_leader:
            rewards = self.rewards.collect(self.replica.stop_requested)
            failed = len(rewards) < len(rollouts) or any(reward.error is not None for reward in rewards.values())
            was_cut = failed and self.replica.stop_requested()
            report = self._report(rollouts, rewards)
            speculation = self.engine.stats.speculation
            contribution = _Contribution(rollouts, rewards, report, speculation, summary, was_cut)
        return [part for part in all_gather(contribution) if part is not None]

    def _count_failures(self, parts: "list[_Contribution]", step: int) -> Counter[str]:
        """Count failures by kind, and log the first of each. Raises AllScoringFailed if so configured."""
        rewards = [reward for part in parts for reward in part.rewards.values()]
        errors = [reward.error for reward in rewards if reward.error is not None]
        counts, new = self._failures.note(errors)
        if self.context.rank == 0:
            for error in new:
                logger.warning("step %d: a response was not scored, and has rewards.error_value: %s", step + 1, error)
        if errors and len(errors) == len(rewards) and self.config.rewards.stop_when_all_fail:
            raise AllScoringFailed(
                f"step {step + 1}: none of {len(rewards)} responses was scored; the first: {errors[0]}; mend the scorer (or "
                "rewards.timeout_seconds), or set rewards.stop_when_all_fail = false"
            )
        return counts

    def _report(self, rollouts: list[Rollout], rewards: dict[tuple[int, int], Reward]) -> dict[str, float]:
        stats = self.engine.stats
        return {
            "seconds": stats.seconds,
            "tokens": float(sum(rollout.num_sampled for rollout in rollouts)),
            "preemptions": float(stats.preemptions),
            "decode_steps": float(stats.steps),
            "scoring_errors": float(sum(r.error is not None for r in rewards.values())),
        }


@dataclass(frozen=True, slots=True)
class _Contribution:
    """A replica's contribution to the result."""

    rollouts: list[Rollout]
    rewards: dict[tuple[int, int], Reward]
    report: dict[str, float]
    speculation: SpeculationStatistics
    summary: RolloutSummary
    scoring_was_cut: bool
    """Whether scoring was cut short by a stop request, or failed then: processes of a scorer may have got the signal too."""


def _merged(
    parts: list[_Contribution], prompts: dict[int, Prompt], before: PartialRollouts, failures: Counter[str]
) -> RolloutResult:
    scored: dict[tuple[int, int], ScoredRollout] = {}
    for part in parts:
        for rollout in part.rollouts:
            key = rollout.prompt_index, rollout.sample_index
            # two replicas that had lost each other may both have sampled it: the first one counts
            scored.setdefault(key, ScoredRollout(rollout, part.rewards[key].value, prompts[rollout.prompt_index].task))
    order = {index: position for position, index in enumerate(prompts)}
    return RolloutResult(
        sorted(scored.values(), key=lambda s: (order[s.rollout.prompt_index], s.rollout.sample_index)),
        [part.report for part in parts],
        merge(part.speculation for part in parts),
        [part.summary for part in parts],
        len(before.samples),
        before.num_tokens,
        failures,
    )


def _require_complete(result: RolloutResult, responses: int) -> None:
    """Raise RuntimeError if responses are missing, because a replica left the rollout early."""
    if missing := responses - len(result.scored):
        raise RuntimeError(f"{missing} of {responses} responses are missing: a replica left the rollout before its end")
