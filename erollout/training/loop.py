"""The run loop shared by all training: steps until the last one or a stop request, with evaluations and checkpoints.

Every rank runs it; only rank 0 tracks and prints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from erollout.checkpoint.checkpointer import Checkpointer, RunState
from erollout.policy.actor import Actor
from erollout.resilience.unattended import ignore, never
from erollout.rewards.failures import AllScoringFailed
from erollout.rollout.partial import RolloutInterrupted
from erollout.tracking.metrics import PhaseTimer, memory_metrics
from erollout.tracking.profiler import span
from erollout.tracking.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Cadence:
    """Number of steps of a run, and intervals in steps; 0: never."""

    steps: int
    checkpoint: int
    checksum: int
    evaluation: int = 0
    figures: bool = True
    """Whether figures are drawn at each evaluation and after the last step."""


@dataclass(frozen=True, slots=True)
class RunServices:
    """Services of a run: tracking, console, stop requests and watchdog."""

    tracker: Tracker
    report: Callable[[int, Mapping[str, float]], None] = ignore
    """Shows a finished step, or an evaluation, on the console."""
    stops: Callable[[int], bool] = never
    """Whether the ranks agree to stop after the given number of steps. Collective."""
    enter: Callable[[int, str], None] = ignore
    """Tells this rank's watchdog that a phase begins, in the step after the given number of steps."""
    profiled: Callable[[int], AbstractContextManager[None]] = nullcontext  # type: ignore[assignment]  # it yields what it is given
    """Context of a step, by its number from 1, in which it is profiled if that was asked for."""


class Phases:
    """The phases of one step, reported to the watchdog and timed."""

    def __init__(self, step: int = 0, enter: Callable[[int, str], None] = ignore) -> None:
        self._step = step
        self._enter = enter
        self._timer = PhaseTimer()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._enter(self._step, name)
        with self._timer(name), span(f"step/{name}"):
            yield

    def seconds(self) -> dict[str, float]:
        """`seconds/<phase>` and `seconds/step`, at the end of the step."""
        return self._timer.collect()


@dataclass(frozen=True, slots=True)
class Trained:
    """What was trained on."""

    samples: int = 0
    tokens: int = 0
    """Response tokens."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What to track of a step or an evaluation."""

    metrics: dict[str, float]
    figures: Callable[[], dict[str, "Figure"]] = dict
    """Makes plots by name, called when they are due."""
    samples: Sequence[Mapping[str, object]] = ()
    """Rows of the samples table."""
    trained: Trained = Trained()
    epochs: float = 0.0
    """Passes over the training data so far."""


class Training(Protocol):
    """A kind of training, as seen by the run loop. All methods are collective."""

    actor: Actor

    def train_step(self, step: int, phase: Phases) -> StepReport:
        """Make step number `step`, from 0. Raises RolloutInterrupted or AllScoringFailed, with the policy unchanged."""
        ...

    def evaluate(self, step: int) -> StepReport:
        """Evaluate the policy after `step` steps on held-out prompts, if Cadence.evaluation is set. Raises as train_step."""
        ...

    def saved(self, state: RunState) -> RunState:
        """The run's state, completed with that of this kind of training."""
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
        """`state`: state to resume from."""
        self.training = training
        self.cadence = cadence
        self.context = training.actor.context
        self.checkpointer = checkpointer
        self.services = services
        self.state = state
        self._changed = False
        """Whether the state differs from the last checkpoint."""

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.state.step

    def run(self) -> None:
        """Train to the last step, or until a stop is requested, evaluating and saving on the way."""
        try:
            self._evaluate_and_save()  # an evaluation may be due
            while self.step < self.cadence.steps and not self.services.stops(self.step):
                self._train_step()
                self.checkpointer.advance()
                if self._due(self.cadence.checksum):
                    self._require_equal_replicas()
                self._evaluate_and_save()
        except RolloutInterrupted as interrupted:
            self.services.stops(self.step)
            self._changed = self._changed or interrupted.has_samples
        except AllScoringFailed:  # so that progress before the scorer failed is not lost
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
        self.services.tracker.log_samples(self.step, report.samples, "evaluation")
        self.services.report(self.step, report.metrics)

    def save(self) -> None:
        self.services.enter(self.step, "checkpoint")
        self._require_equal_replicas()
        self.checkpointer.save(self.training.saved(self.state))
        self.services.tracker.log_saved(self.step)
        self._changed = False

    def _train_step(self) -> None:
        with self.services.profiled(self.step + 1):
            report = self.training.train_step(self.step, Phases(self.step, self.services.enter))
        samples, tokens = self.state.samples + report.trained.samples, self.state.tokens + report.trained.tokens
        self.state = replace(self.state, step=self.step + 1, samples=samples, tokens=tokens)
        self._changed = True
        progress = {"progress/samples": float(samples), "progress/tokens": float(tokens), "progress/epoch": report.epochs}
        metrics = report.metrics | progress | memory_metrics(self.context.device.type)
        self.services.tracker.log_metrics(self.step, metrics)
        self.services.tracker.log_samples(self.step, report.samples, "training")
        self.services.report(self.step, metrics)
        draws = self.cadence.figures and (self._due(self.cadence.evaluation) or self.step == self.cadence.steps)
        if self.context.rank == 0 and draws:
            for name, figure in report.figures().items():
                self.services.tracker.log_figure(f"{name}_step_{self.step:08d}", figure)

    def _evaluate_and_save(self) -> None:
        """Evaluate and save, if due and not done."""
        if self._due(self.cadence.evaluation) and not any(row["step"] == self.step for row in self.state.history):
            self.evaluate()
        if self._due(self.cadence.checkpoint) and self.step:
            self._save_changes()

    def _save_changes(self) -> None:
        if self.cadence.checkpoint and self._changed:
            self.save()

    def _require_equal_replicas(self) -> None:
        """Compare replicas, also before a checkpoint, so that corrupted parameters do not replace good ones."""
        if self.cadence.checksum and self.context.train.data > 1:
            self.training.actor.require_equal_replicas(self.step)

    def _due(self, interval: int) -> bool:
        return bool(interval) and (self.step % interval == 0 or self.step == self.cadence.steps)
