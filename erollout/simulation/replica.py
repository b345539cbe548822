"""A decode replica under a virtual clock: the common part of the stepwise and the jumping replica."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, inf
from typing import NamedTuple, Protocol

import numpy as np

from erollout.coordinator.occupancy import Occupancy, OccupancyBuilder
from erollout.simulation.truth import Truth
from erollout.simulation.workload import Workload
from erollout.speculation.step import OFF, Arm, Load, StepOutcome


class Chooser(Protocol):
    """The part of a toggle that a rollout needs."""

    @property
    def arms(self) -> tuple[Arm, ...]: ...

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm: ...

    def observe(self, outcome: StepOutcome) -> None: ...

    def seconds_per_token(self, load: Load) -> tuple[float, ...]: ...


class Part(NamedTuple):
    """A response on its way from one replica to another."""

    prompt: int
    sample: int
    emitted: int
    """Number of tokens that it has."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Engine limits of every replica."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_tokens: int | None = None
    """KV cache size in tokens; None: enough for all."""
    block_size: int = 16


class BusySpan(NamedTuple):
    """Consecutive steps with the same arm and number of sequences."""

    start: float
    end: float
    running: int
    arm: Arm


@dataclass(slots=True)
class Ledger:
    """Counts of one replica in one rollout."""

    steps: int = 0
    tokens: int = 0
    finished: int = 0
    num_drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    recomputed_tokens: int = 0
    """Number of tokens prefilled again, after a migration or a preemption."""
    preemptions: int = 0
    busy: float = 0.0
    """Total seconds of all steps."""
    decoding: float = 0.0
    """Sum over all steps of seconds times decoding sequences."""
    speculating: float = 0.0
    """Total seconds of steps with drafts."""
    lost: float = 0.0
    """Seconds lost against the best arm of each step, for the same number of tokens."""
    spans: list[BusySpan] | None = None
    """Busy spans; None: not recorded."""

    def add(self, start: float, seconds: float, running: int, arm: Arm, steps: int) -> None:
        self.steps += steps
        self.busy += seconds
        self.decoding += seconds * running
        self.speculating += seconds * arm.speculates
        if self.spans is not None:
            end = start + seconds
            if self.spans and self.spans[-1][1:] == (start, running, arm):
                start = self.spans.pop().start
            self.spans.append(BusySpan(start, end, running, arm))


class Replica(ABC):
    """A virtual replica. Steps follow each other without a pause while there is work; `now` is then a step border."""

    def __init__(
        self, workload: Workload, truth: Truth, chooser: Chooser, limits: Limits, generator: np.random.Generator
    ) -> None:
        self.workload = workload
        self.truth = truth
        self.chooser = chooser
        self.limits = limits
        self.generator = generator
        self.imposed: Arm | None = None
        """The arm imposed by the cluster; None: the chooser decides."""
        self.now = 0.0
        self.finished_at = 0.0
        """Time at which its last response was complete."""
        self.ledger = Ledger()
        self._arm = OFF
        self._occupancies = OccupancyBuilder(limits.max_num_seqs, chooser.seconds_per_token, partial(truth.step_seconds, OFF))

    @abstractmethod
    def take(self, prompts: Sequence[int]) -> None:
        """Queue all responses to these prompts."""

    @abstractmethod
    def arrive(self, parts: Sequence[Part]) -> None:
        """Queue responses that migrated here: their tokens are prefilled again."""

    @abstractmethod
    def release(self, count: int) -> list[Part]:
        """Release up to `count` responses, cheapest to prefill again first."""

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """Number of responses that are not complete."""

    @abstractmethod
    def _step(self, limit: float) -> None:
        """Take one step, or several alike that begin before `limit`; `now` moves to the border after them."""

    @abstractmethod
    def _load(self) -> Load:
        """The load of the next step."""

    def run_until(self, time: float) -> None:
        """Run to the first step border at or after `time`; an idle replica waits until then."""
        while self.now < time and self.outstanding:
            self._step(time)
        if self.now < time < inf:
            self.now = time

    def occupancy(self) -> Occupancy:
        """Its occupancy at this step border."""
        ledger, arms = self.ledger, self.chooser.arms
        return self._occupancies.build(
            self._load(),
            self.outstanding,
            steps=ledger.steps,
            arm=arms.index(self._arm) if self._arm in arms else 0,
            finished=ledger.finished,
            num_drafts=ledger.num_drafts,
            drafted=ledger.drafted,
            accepted=ledger.accepted,
            seconds=self.now,
        )

    def _given(self, prompt: int, samples: int) -> None:
        """Count responses that are newly queued here."""
        self._occupancies.given(int(self.workload.prompt_tokens[prompt]), samples)

    def _count(self, arm: Arm, load: Load, seconds: float, steps: int) -> None:
        """Account for `steps` steps that take `seconds` in total."""
        if load.decoding:
            best = self.truth.best(load)
            if best != arm:
                least, taken = (self.truth.seconds_per_token(each, load) for each in (best, arm))
                self.ledger.lost += (
                    steps * self.truth.step_seconds(arm, Load(load.decoding, load.context)) * (1 - least / taken)
                )
        self.ledger.add(self.now, seconds, load.decoding, arm, steps)
        self._arm = arm
        self.now += seconds

    def _seconds(self, arm: Arm, load: Load) -> float:
        """Seconds of one step, with noise."""
        seconds = self.truth.step_seconds(arm, load)
        if self.truth.noise:
            seconds *= exp(self.truth.noise * float(self.generator.standard_normal()))
        return seconds
