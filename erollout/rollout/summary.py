"""Summary of one replica's rollout: seconds by batch size, busy spans, moves, and reasons for speculating or not. Pure."""

from dataclasses import dataclass, field

from erollout.coordinator.migration import Move
from erollout.speculation.step import Load
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import Bin, DecisionTrace

BINS = 200
"""Number of spans of a rollout's time that replicas exchange."""


@dataclass(slots=True)
class BatchShare:
    """A rollout's steps at batch sizes up to a power of two and above the previous one."""

    seconds: float = 0.0
    emitted: int = 0
    """Number of emitted tokens."""
    speculating: float = 0.0
    """Seconds in steps that speculate."""
    num_speculative_tokens: float = 0.0
    """Integral of num_speculative_tokens over those seconds."""

    def add(self, other: "BatchShare") -> None:
        self.seconds += other.seconds
        self.emitted += other.emitted
        self.speculating += other.speculating
        self.num_speculative_tokens += other.num_speculative_tokens


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Summary of one replica's rollout."""

    seconds: float = 0.0
    """Seconds until the rollout was over for this replica, including waiting for others."""
    metrics: dict[str, float] = field(default_factory=dict)
    bins: list[Bin] = field(default_factory=list)
    """Summaries of equal spans of these seconds."""
    shares: dict[int, BatchShare] = field(default_factory=dict)
    """Shares by largest batch size: 1, 2, 4, 8, ...; 0: passes with prompt tokens."""
    moves: list[tuple[float, Move]] = field(default_factory=list)
    """Moves between all replicas, with the seconds at which this one learnt of them."""
    why: tuple[str, ...] = ()
    """Explanations, in words, for its largest and its smallest batch."""


def summarize(
    toggle: Toggle, engine_seconds: float, coordination: dict[str, float], moves: list[tuple[float, Move]]
) -> RolloutSummary:
    """The summary of a completed rollout. `coordination`: metrics of ReplicaControl."""
    metrics = {f"toggle/{name}": value for name, value in toggle.metrics().items()}
    metrics |= {f"coordinator/{name}": value for name, value in coordination.items()}
    trace, seconds = toggle.trace, max(engine_seconds, toggle.trace.seconds)
    return RolloutSummary(seconds, metrics, trace.binned(BINS, seconds), shares(trace), moves, _reasons(toggle))


def shares(trace: DecisionTrace) -> dict[int, BatchShare]:
    """A rollout's seconds by batch size; passes with prompt tokens count as batch 0."""
    found: dict[int, BatchShare] = {}
    columns = trace.columns
    for step, (batch, prompts) in enumerate(zip(columns["decoding"], columns["prefill_tokens"], strict=True)):
        seconds, n = columns["seconds"][step], trace.arm(step).num_speculative_tokens
        share = BatchShare(seconds, columns["emitted"][step], seconds * (n > 0), seconds * n)
        found.setdefault(0 if prompts else 1 << (batch - 1).bit_length(), BatchShare()).add(share)
    return dict(sorted(found.items()))


def _reasons(toggle: Toggle) -> tuple[str, ...]:
    """Explanations at the largest and the smallest batch of the rollout."""
    decoding, contexts = (toggle.trace.columns[name] for name in ("decoding", "context"))
    loads = [Load(batch, context) for batch, context in zip(decoding, contexts, strict=True) if batch]
    ends = [end(loads, key=lambda load: load.decoding) for end in (max, min)] if loads else []
    return tuple(dict.fromkeys(toggle.explain(load) for load in ends))
