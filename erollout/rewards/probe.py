"""Probe of the reward function before a run: one response is scored in a scoring process like the run's."""

import logging
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from erollout.errors import UserError
from erollout.rewards.scorers import Scorer
from erollout.rewards.worker import ScoreResult, Worker, WorkerDied
from erollout.types import Prompt

logger = logging.getLogger(__name__)

_FORMS = ("{}", "<answer>{}</answer>", "#### {}", "\\boxed{{{}}}")
"""Formats of the reference answer, one of which a function may require."""
_REFERENCE_SECONDS = 5.0
"""Time for checking references before a run; errors in later ones are counted during it."""


class ScorerProbe:
    """A scoring process for a few trials, started in the background."""

    def __init__(self, scorer: Scorer, timeout_seconds: float) -> None:
        """Raises UserError if no process can be started."""
        self._scorer = scorer
        self._timeout_seconds = timeout_seconds
        try:
            self._worker = Worker(scorer)
        except WorkerDied as error:
            raise UserError(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.close()

    def require_scores(self, prompt: Prompt, solution: str | None) -> None:
        """Raise UserError for a function that does not load, hangs, or returns something that is not a number.

        A function that raises for every form of a right answer may require another form, so this is only a warning: a step
        whose responses all fail ends the run.

        Args:
            solution: a right answer; None: none is available.
        """
        try:
            self._worker.wait_until_ready()
        except WorkerDied as error:
            raise UserError(str(error)) from error
        failed: list[ScoreResult] = []
        for response in dict.fromkeys([form.format(solution) for form in _FORMS if solution is not None] + [""]):
            outcome = self._score(prompt, response)
            if outcome.error is None:
                return
            failed.append(outcome)
            if outcome.worker_lost:  # each further try would take as long
                break
        what = f"{self._key()} can't score the first item ({prompt.task})"
        if refused := next((outcome for outcome in failed if not outcome.raised), None):
            fix = "fix it, or raise rewards.timeout_seconds" if refused.timed_out else "fix it"
            raise UserError(f"{what}: {refused.error}; {fix}")
        logger.warning(
            "%s, however its answer is written: %s; responses that it raises at get rewards.error_value", what, failed[0].error
        )

    def require_readable(self, prompts: Iterable[Prompt]) -> None:
        """Raise UserError, with count and first row, for reference answers that the function can't read."""
        failed, end = [], time.monotonic() + _REFERENCE_SECONDS
        for prompt in prompts:
            outcome = self._score(prompt, "0")
            if outcome.error is not None:
                failed.append(outcome.error)
            if outcome.worker_lost or time.monotonic() > end:
                break
        if failed:
            raise UserError(f"{len(failed)} reference answers can't be used; the first: {failed[0]}; fix or drop the rows")

    def _score(self, prompt: Prompt, response: str) -> ScoreResult:
        try:
            return self._worker.score(prompt, response, self._timeout_seconds)
        except WorkerDied as error:
            return ScoreResult(error=str(error), worker_lost=True)

    def _key(self) -> str:
        return f"rewards.function = {self._scorer.function!r}"
