"""The state that a decode replica reports to the others at a step border, a short vector of numbers, and its builder. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from erollout.speculation.step import Load

CURVE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes for which a replica reports its predicted step time: powers of two."""
CURVE_CONTEXT_STEP = 1.25
"""Change of the mean context after which the curve is predicted again."""
PREFILL_TOKENS = 2048
"""Prompt length at which prefill seconds per token are predicted: a shorter prompt seems free beside the weights."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """State of one replica after it has carried out the last decision. Counters run from the start of the rollout."""

    steps: int = 0
    arm: int = 0
    """Arm of its last step, an index into the agreed list of arms."""
    running: int = 0
    """Responses in decoding or prefill."""
    waiting: int = 0
    """Responses queued here and not in any pass, including siblings that wait for their shared prompt."""
    finished: int = 0
    """Responses completed here."""
    claimed: int = 0
    """Prompts claimed while no window arrived (`StateMachine.claim`)."""
    stop_requested: int = 0
    """1: a stop was requested here."""
    num_drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    context: float = 0.0
    """Mean number of tokens of the running sequences, prompt included."""
    age: float = 0.0
    """Mean number of response tokens of the running sequences."""
    seconds: float = 0.0
    """Seconds since the rollout began, by its own clock."""
    prefill_seconds: float = 0.0
    """Predicted seconds per prompt token."""
    seconds_per_token: tuple[float, ...] = ()
    """Predicted seconds per token of a sequence at the present load, per agreed arm; inf: not available."""
    curve: tuple[float, ...] = ()
    """Predicted seconds per token of every running sequence with the best arm, at each of CURVE_BATCHES."""

    @property
    def outstanding(self) -> int:
        """Responses that it has not completed yet."""
        return self.running + self.waiting

    def to_vector(self) -> list[float]:
        """All fields, flat. The length is the same on every replica, because the arms are agreed."""
        return [*(float(getattr(self, name)) for name in _SCALARS), *self.seconds_per_token, *self.curve]

    @classmethod
    def from_vector(cls, vector: Sequence[float], num_arms: int) -> "Occupancy":
        """The inverse of `to_vector`; counters are integers again."""
        start = len(_SCALARS)
        arms, curve = tuple(vector[start : start + num_arms]), tuple(vector[start + num_arms :])
        return cls(*map(int, vector[:_COUNTS]), *vector[_COUNTS:start], arms, curve)  # type: ignore[call-arg, arg-type]


class OccupancyBuilder:
    """Builds a replica's occupancies in one rollout. Predictions are cached while the context is about the same."""

    def __init__(
        self,
        max_num_seqs: int,
        seconds_per_token: Callable[[Load], tuple[float, ...]],
        autoregressive_seconds: Callable[[Load], float],
    ) -> None:
        """
        Args:
            max_num_seqs: largest batch.
            seconds_per_token: predicts seconds per token of a sequence at a load, per agreed arm.
            autoregressive_seconds: predicts seconds of a step without speculation at a load.
        """
        self.max_num_seqs = max_num_seqs
        self._seconds_per_token = seconds_per_token
        self._autoregressive_seconds = autoregressive_seconds
        self._prompt_tokens = self._samples = 0
        """Prompt tokens and number of all responses dispatched here; prompt tokens count once per response."""
        self._context = self._prefill_seconds = 0.0
        """Mean context of the cached predictions, and seconds per prompt token."""
        self._curve: tuple[float, ...] = ()

    def given(self, prompt_tokens: int, samples: int) -> None:
        """Count responses to a prompt that are newly queued here."""
        self._prompt_tokens += samples * prompt_tokens
        self._samples += samples

    def build(
        self,
        load: Load,
        outstanding: int,
        *,
        steps: int,
        arm: int,
        finished: int,
        num_drafts: int,
        drafted: int,
        accepted: int,
        seconds: float,
        claimed: int = 0,
        stop_requested: bool = False,
    ) -> Occupancy:
        """The occupancy now.

        Args:
            load: load of the next step.
            outstanding: number of responses that are not complete, waiting ones included.
            steps ... stop_requested: as in `Occupancy`.
        """
        running = min(outstanding - min(load.waiting, outstanding), self.max_num_seqs)
        at = load if load.decoding else Load(max(running, 1), load.context)
        self._predict(load.context)
        return Occupancy(
            steps=steps,
            arm=arm,
            running=running,
            waiting=outstanding - running,
            finished=finished,
            claimed=claimed,
            stop_requested=int(stop_requested),
            num_drafts=num_drafts,
            drafted=drafted,
            accepted=accepted,
            context=load.context,
            age=max(0.0, load.context - self._prompt_tokens / max(self._samples, 1)),
            seconds=seconds,
            prefill_seconds=self._prefill_seconds,
            seconds_per_token=self._seconds_per_token(at),
            curve=self._curve,
        )

    def _predict(self, context: float) -> None:
        """Update the predictions for other batch sizes if the context has changed."""
        if self._curve and self._context / CURVE_CONTEXT_STEP <= context <= self._context * CURVE_CONTEXT_STEP:
            return
        self._context = context
        self._curve = tuple(min(self._seconds_per_token(Load(batch, context))) for batch in CURVE_BATCHES)
        step = self._autoregressive_seconds
        self._prefill_seconds = max(0.0, step(Load(1, context, PREFILL_TOKENS)) - step(Load(1, context))) / PREFILL_TOKENS


_SCALARS = tuple(field.name for field in fields(Occupancy) if field.type in (int, float))
"""All fields but the last two, counters first."""
_COUNTS = sum(field.type is int for field in fields(Occupancy))
"""Number of counters."""
