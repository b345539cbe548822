"""Seconds of a pass from what it reads and computes: the roofline of EfficientRollout (arXiv 2606.18967), with tiles. Pure.

    T = max(bytes / bandwidth, FLOP / rate) + overheads + communication

for a step of the target (1 token of each sequence), a step of the drafter (the same over the drafter's bytes) and the verify
pass (n + 1 tokens of each). To the paper's overhead per sequence come one per pass, which is what a tiny model consists of, one
per token of context, which attention kernels that walk a sequence's cache in order have, and tiles: a matmul computes whole
blocks of rows, so the time climbs in steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

Pass = Literal["target", "draft", "verify"]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a pass reads and computes on one rank of a tensor-parallel replica."""

    weight_bytes: float
    """Of the target."""
    draft_bytes: Mapping[str, float]
    """Of each drafter by its format's name: scales, and what it shares with the target, included."""
    flops: float
    """Of all matmuls with weights, for one token."""
    attention_flops: float
    """For one token and one token of its context."""
    kv_bytes: float
    """In the cache, of one token."""
    reduces: int = 0
    """All-reduces of a pass: two a layer, none without tensor parallelism."""
    reduce_bytes: float = 0.0
    """Of one token in one all-reduce."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a kind of pass costs on one hardware."""

    bandwidth: float
    """Bytes/s."""
    compute: float
    """FLOP/s."""
    weight_factor: float = 1.0
    """Of the time its weights take, over that of a plain read: eta of the paper."""
    kv_factor: float = 1.0
    """The same for the cache: kappa_eff / kappa."""
    per_pass: float = 0.0
    """Seconds, whatever is computed."""
    per_sequence: float = 0.0
    """Seconds per sequence: c of the paper."""
    per_token: float = 0.0
    """Seconds per token of the verify pass: its decision."""
    per_context: float = 0.0
    """Seconds per token of the mean context, at any batch."""
    tile: int = 1
    """Tokens that matmuls compute at once."""
    sequence_tile: int = 1
    """Sequences that the overhead grows by at once."""
    padded: bool = False
    """Whether the drafter's batch is filled up to a multiple of n + 1, as in engines whose graphs serve both passes."""


@dataclass(frozen=True, slots=True)
class Communication:
    """All-reduces between the ranks of a replica."""

    latency: float = 0.0
    """Seconds of one."""
    bandwidth: float = float("inf")
    """Bytes/s."""
    per_sequence: float = 0.0
    """Seconds per sequence and pass: c_comm of the paper, where it was measured as such."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a pass by cause: `memory` and `compute` overlap, the rest comes on top."""

    memory: float
    compute: float
    overhead: float
    communication: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.overhead + self.communication

    @property
    def limit(self) -> str:
        """What most of the time goes into."""
        shares = {
            "bandwidth": self.memory if self.memory >= self.compute else 0.0,
            "compute": self.compute if self.compute > self.memory else 0.0,
            "overhead": self.overhead,
            "communication": self.communication,
        }
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True, slots=True)
class Roofline:
    """All passes of one model on one hardware."""

    size: ModelSize
    target: PassCost
    verify: PassCost
    draft: Mapping[str, PassCost]
    """By format."""
    communication: Communication = field(default_factory=Communication)

    def parts(
        self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: int = 0, prefill_tokens: int = 0
    ) -> Parts:
        """Of one pass over `batch` sequences (and prompt tokens beside them). `format` counts for "draft", n for "verify"."""
        size = self.size
        cost = self.target if kind == "target" else self.verify if kind == "verify" else self.draft[format]
        weights = size.draft_bytes[format] if kind == "draft" else size.weight_bytes
        tokens = batch * (num_speculative_tokens + 1 if kind == "verify" else 1) + prefill_tokens
        memory = (weights * cost.weight_factor + size.kv_bytes * cost.kv_factor * batch * context) / cost.bandwidth
        compute = _tiled(tokens, cost.tile) * (size.flops + size.attention_flops * context) / cost.compute
        rows = _tiled(batch, num_speculative_tokens + 1) if cost.padded else batch
        overhead = (
            cost.per_token * (tokens - prefill_tokens)  # prompts are not decided about
            + cost.per_pass
            + cost.per_sequence * _tiled(rows, cost.sequence_tile)
            + cost.per_context * context
        )
        links = self.communication
        reduce = size.reduces * (links.latency + tokens * size.reduce_bytes / links.bandwidth) + links.per_sequence * batch
        return Parts(memory, compute, overhead, reduce)

    def rows(self, kind: Pass, format: str, batch: int, num_speculative_tokens: int) -> int:
        """Of the matmuls of one pass: its tokens, and where the drafter's batch is filled up, what it is filled up to."""
        if kind == "draft":
            return _tiled(batch, num_speculative_tokens + 1) if self.draft[format].padded else batch
        return batch * (num_speculative_tokens + 1 if kind == "verify" else 1)

    def seconds(
        self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: int = 0, prefill_tokens: int = 0
    ) -> float:
        return self.parts(kind, format, batch, context, num_speculative_tokens, prefill_tokens).seconds

    def prefill_seconds(self, tokens: int) -> float:
        """A pass over prompt tokens alone."""
        return self.seconds("verify", "", 0, tokens / 2, 0, tokens)


def _tiled(count: int, tile: int) -> int:
    return ceil(count / tile) * tile
