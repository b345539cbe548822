"""The loop that every training run shares: steps until the last one or a request to stop, and what is due between them.

Every rank runs it; only rank 0 tracks and prints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from erollout.checkpoint.checkpointer import Checkpointer, RunState
from erollout.policy.actor import Actor
from erollout.resilience.unattended import ignore, never
from erollout.rewards.failures import AllScoringFailed
from erollout.rollout.partial import RolloutInterrupted
from erollout.tracking.metrics import PhaseTimer, memory_metrics
from erollout.tracking.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Cadence:
    """Number of steps of a run, and steps between two of what is due in between; 0: never."""

    steps: int
    checkpoint: int
    checksum: int
    evaluation: int = 0


@dataclass(frozen=True, slots=True)
class RunServices:
    """Whom a run tells how it goes, and whom it asks whether to go on."""

    tracker: Tracker
    report: Callable[[int, Mapping[str, float]], None] = ignore
    """Shows a finished step, or an evaluation, on the console."""
    stops: Callable[[int], bool] = never
    """Whether the ranks agree to stop after so many steps. Collective."""
    enter: Callable[[int, str], None] = ignore
    """Tells the watchdog of this rank that a phase begins in the step after so many."""


class Phases:
    """The phases of one step: each is a sign of life for the watchdog, and timed."""

    def __init__(self, step: int = 0, enter: Callable[[int, str], None] = ignore) -> None:
        self._step = step
        self._enter = enter
        self._timer = PhaseTimer()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._enter(self._step, name)
        with self._timer(name):
            yield

    def seconds(self) -> dict[str, float]:
        """`seconds/<phase>` and `seconds/step`, at the end of the step."""
        return self._timer.collect()


@dataclass(frozen=True, slots=True)
class StepReport:
    """What there is to track of a step or an evaluation."""

    metrics: dict[str, float]
    figures: Callable[[], dict[str, "Figure"]] = dict
    """Plots by name, drawn when they are due."""
    samples: Sequence[Mapping[str, object]] = ()
    """Responses to show, one row each."""


class Training(Protocol):
    """What one kind of training does in a step. All methods are collective."""

    actor: Actor

    def train_step(self, step: int, phase: Phases) -> StepReport:
        """The step after `step` others. Raises RolloutInterrupted or AllScoringFailed, the policy being as before."""
        ...

    def evaluate(self, step: int) -> StepReport:
        """The policy after `step` steps on held-out prompts. Raises as train_step; needed where Cadence.evaluation is set."""
        ...

    def saved(self, state: RunState) -> RunState:
        """The run's state with what this kind of training has to keep."""
        ...


class RunLoop:
    """One training run and its position. All methods are collective."""

    def __init__(
        self,
        training: Training,
        cadence: Cadence,
        checkpointer: Checkpointer,
        services: RunServices,
        state: RunState,
    ) -> None:
        """`state`: where the run goes on."""
        self.training = training
        self.cadence = cadence
        self.context = training.actor.context
        self.checkpointer = checkpointer
        self.services = services
        self.state = state
        self._changed = False
        """There is something that the last checkpoint doesn't know."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def run(self) -> None:
        """Train to the last step, or until asked to stop, evaluating and saving on the way."""
        try:
            self._evaluate_and_save()  # an evaluation may be left to do
            while self.step < self.cadence.steps and not self.services.stops(self.step):
                self._train_step()
                self.checkpointer.advance()
                if self._due(self.cadence.checksum):
                    self._require_equal_replicas()
                self._evaluate_and_save()
        except RolloutInterrupted as interrupted:
            self.services.stops(self.step)
            self._changed = self._changed or interrupted.has_samples
        except AllScoringFailed:  # what was learnt before the scorer failed is not lost with it
            if self.step:
                self._save_changes()
            self.checkpointer.wait()
            raise
        self._save_changes()
        self.checkpointer.wait()
        self.services.enter(self.step, "end")

    def evaluate(self) -> None:
        """Held-out accuracy of the present policy."""
        self.services.enter(self.step, "evaluation")
        report = self.training.evaluate(self.step)
        self.state = replace(self.state, history=(*self.state.history, {"step": float(self.step), **report.metrics}))
        self._changed = True
        self.services.tracker.log_metrics(self.step, report.metrics)
        self.services.tracker.log_samples(self.step, report.samples)
        self.services.report(self.step, report.metrics)

    def save(self) -> None:
        self.services.enter(self.step, "checkpoint")
        self._require_equal_replicas()
        self.checkpointer.save(self.training.saved(self.state))
        self.services.tracker.log_saved(self.step)
        self._changed = False

    def _train_step(self) -> None:
        report = self.training.train_step(self.step, Phases(self.step, self.services.enter))
        self.state = replace(self.state, step=self.step + 1)
        self._changed = True
        metrics = report.metrics | memory_metrics(self.context.device.type)
        self.services.tracker.log_metrics(self.step, metrics)
        self.services.report(self.step, metrics)
        if self.context.rank == 0 and (self._due(self.cadence.evaluation) or self.step == self.cadence.steps):
            for name, figure in report.figures().items():
                self.services.tracker.log_figure(f"{name}_step_{self.step:08d}", figure)

    def _evaluate_and_save(self) -> None:
        """Do both where they are due and not done."""
        if self._due(self.cadence.evaluation) and not any(row["step"] == self.step for row in self.state.history):
            self.evaluate()
        if self._due(self.cadence.checkpoint) and self.step:
            self._save_changes()

    def _save_changes(self) -> None:
        if self.cadence.checkpoint and self._changed:
            self.save()

    def _require_equal_replicas(self) -> None:
        """Before a checkpoint too: what has gone wrong unseen is not to take the place of what was right."""
        if self.cadence.checksum and self.context.train.data > 1:
            self.training.actor.require_equal_replicas(self.step)

    def _due(self, interval: int) -> bool:
        return bool(interval) and (self.step % interval == 0 or self.step == self.cadence.steps)
