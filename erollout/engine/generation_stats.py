"""Statistics of a call of the engine."""

from dataclasses import dataclass, field

from erollout.speculation.statistics import SpeculationStatistics


@dataclass(slots=True)
class GenerationStats:
    """Statistics of one call to generate or run."""

    prefill_tokens: int = 0
    """Number of prefilled prompt tokens: each prompt once per group, more after a preemption."""
    recomputed_tokens: int = 0
    """Number of response tokens prefilled again, after a preemption or a migration."""
    decode_tokens: int = 0
    """Number of sampled tokens."""
    steps: int = 0
    """Number of forward passes."""
    preemptions: int = 0
    seconds: float = 0.0
    running: list[int] = field(default_factory=list)
    """Number of sequences in each forward pass."""
    speculation: SpeculationStatistics = field(default_factory=SpeculationStatistics)
