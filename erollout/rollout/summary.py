"""How one replica's rollout went: its seconds by batch size, its busy spans, its moves, and why it speculated or not. Pure."""

from dataclasses import dataclass, field

from erollout.coordinator.migration import Move
from erollout.speculation.step import Load
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import Bin, DecisionTrace

BINS = 200
"""Spans of a rollout's time that replicas tell each other about."""


@dataclass(slots=True)
class BatchShare:
    """The steps of a rollout at batches up to a power of two, and beyond the one before."""

    seconds: float = 0.0
    emitted: int = 0
    """Tokens."""
    speculating: float = 0.0
    """Seconds of these in steps that speculate."""
    num_speculative_tokens: float = 0.0
    """Summed over those seconds."""

    def add(self, other: "BatchShare") -> None:
        self.seconds += other.seconds
        self.emitted += other.emitted
        self.speculating += other.speculating
        self.num_speculative_tokens += other.num_speculative_tokens


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """How one replica's rollout went."""

    seconds: float = 0.0
    """Until the rollout was over for this replica, waiting for the others included."""
    metrics: dict[str, float] = field(default_factory=dict)
    bins: list[Bin] = field(default_factory=list)
    """Equal spans of these seconds."""
    shares: dict[int, BatchShare] = field(default_factory=dict)
    """By the largest batch of each: 1, 2, 4, 8, ...; passes with prompt tokens in them: 0."""
    moves: list[tuple[float, Move]] = field(default_factory=list)
    """All moves of sequences between replicas, with the seconds at which this one learnt of them."""
    why: tuple[str, ...] = ()
    """In words, why it would speculate or not at the most and at the fewest sequences that it had at once."""


def summarize(
    toggle: Toggle, engine_seconds: float, coordination: dict[str, float], moves: list[tuple[float, Move]]
) -> RolloutSummary:
    """The summary of a rollout that has ended; `coordination`: what ReplicaControl reports."""
    metrics = {f"toggle/{name}": value for name, value in toggle.metrics().items()}
    metrics |= {f"coordinator/{name}": value for name, value in coordination.items()}
    trace, seconds = toggle.trace, max(engine_seconds, toggle.trace.seconds)
    return RolloutSummary(seconds, metrics, trace.binned(BINS, seconds), shares(trace), moves, _reasons(toggle))


def shares(trace: DecisionTrace) -> dict[int, BatchShare]:
    """Where a rollout's seconds went, by batch size; passes with prompt tokens in them are batch 0."""
    found: dict[int, BatchShare] = {}
    columns = trace.columns
    for step, (batch, prompts) in enumerate(zip(columns["decoding"], columns["prefill_tokens"], strict=True)):
        seconds, n = columns["seconds"][step], trace.arm(step).num_speculative_tokens
        share = BatchShare(seconds, columns["emitted"][step], seconds * (n > 0), seconds * n)
        found.setdefault(0 if prompts else 1 << (batch - 1).bit_length(), BatchShare()).add(share)
    return dict(sorted(found.items()))


def _reasons(toggle: Toggle) -> tuple[str, ...]:
    """Why, at the largest and the smallest batch of the rollout."""
    decoding, contexts = (toggle.trace.columns[name] for name in ("decoding", "context"))
    loads = [Load(batch, context) for batch, context in zip(decoding, contexts, strict=True) if batch]
    ends = [end(loads, key=lambda load: load.decoding) for end in (max, min)] if loads else []
    return tuple(dict.fromkeys(toggle.explain(load) for load in ends))
