"""Seconds of a pass from what it reads and computes: the roofline of EfficientRollout (arXiv 2606.18967), with tiles. Pure.

    T = max(bytes / bandwidth, FLOP / rate) + overheads + communication

for a target step (1 token per sequence), a drafter step (the same with the drafter's bytes) and a verify pass (n + 1 tokens per
sequence). Beyond the paper's overhead per sequence there are an overhead per pass (most of a tiny model's time), one per token
of context (attention kernels that walk a sequence's cache in order), and tiles: a matmul computes whole blocks of rows, so its
time grows in steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pass = Literal["target", "draft", "verify"]
Number = TypeVar("Number", float, "NDArray[np.float64]")
"""One pass, or an array with an entry per pass."""


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """What one step of a drafter reads, in bytes per weight of the policy; None: as many as the target's."""

    linear: float | None
    """Bytes per weight of the linear layers, including scales."""
    head: float | None
    """Bytes per weight of the LM head."""


NO_MODEL = DraftWeights(0.0, 0.0)
"""What a drafter reads that runs no model: its steps have overheads only."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Bytes and FLOP of a pass on one rank of a tensor-parallel replica."""

    weight_bytes: float
    """Bytes of the target's weights."""
    draft_bytes: Mapping[str, float]
    """Weight bytes of each drafter by format name, including scales and what it shares with the target; 0: it runs no model."""
    flops: float
    """FLOP per token of all matmuls with weights."""
    attention_flops: float
    """FLOP of attention per token and token of its context."""
    kv_bytes: float
    """Bytes of one token in the KV cache."""
    reduces: int = 0
    """All-reduces per pass: two per layer, none without tensor parallelism."""
    reduce_bytes: float = 0.0
    """Bytes per token in one all-reduce."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """Cost coefficients of a kind of pass on given hardware."""

    bandwidth: float
    """Bytes/s."""
    compute: float
    """FLOP/s."""
    weight_factor: float = 1.0
    """Time to read the weights over that of a plain read: eta of the paper."""
    kv_factor: float = 1.0
    """The same for the KV cache: kappa_eff / kappa of the paper."""
    per_pass: float = 0.0
    """Fixed seconds per pass."""
    per_sequence: float = 0.0
    """Seconds per sequence: c of the paper."""
    per_token: float = 0.0
    """Seconds per token of a verify pass, for acceptance."""
    per_context: float = 0.0
    """Seconds per token of the mean context, at any batch."""
    tile: int = 1
    """Number of tokens in a matmul tile."""
    sequence_tile: int = 1
    """Number of sequences by which the overhead per sequence grows at once."""
    padded: bool = False
    """Whether the drafter's batch is padded to a multiple of n + 1, as in engines whose graphs serve both passes."""


@dataclass(frozen=True, slots=True)
class Communication:
    """All-reduces between the ranks of a replica."""

    latency: float = 0.0
    """Seconds per all-reduce."""
    bandwidth: float = float("inf")
    """Bytes/s."""
    per_sequence: float = 0.0
    """Seconds per sequence and pass: c_comm of the paper, where it was measured as such."""


@dataclass(frozen=True, slots=True)
class Parts(Generic[Number]):
    """Seconds of a pass by cause: `memory` and `compute` overlap, the rest is added."""

    memory: Number
    compute: Number
    overhead: Number
    communication: Number

    @property
    def seconds(self) -> Number:
        by_compute = self.compute > self.memory
        longer = self.compute * by_compute + self.memory * (1 - by_compute)  # max, for arrays too
        return longer + self.overhead + self.communication

    @property
    def limit(self: "Parts[float]") -> str:
        """The cause with the most seconds."""
        shares = {
            "bandwidth": self.memory if self.memory >= self.compute else 0.0,
            "compute": self.compute if self.compute > self.memory else 0.0,
            "overhead": self.overhead,
            "communication": self.communication,
        }
        return max(shares, key=lambda name: shares[name])


def parts_of(
    size: ModelSize,
    cost: PassCost,
    links: Communication,
    weight_bytes: Number,
    batch: Number,
    context: Number,
    width: Number,
    per_sequence: Number,
    prefill_tokens: float = 0,
) -> Parts[Number]:
    """The roofline's formula, for one pass or an array of them.

    Args:
        weight_bytes: bytes of the weights that the pass reads; 0: no model runs, so that only overheads count.
        width: num_speculative_tokens + 1 of the cycle.
        per_sequence: tokens of the pass per sequence: the width in a verify pass, else 1.
    """
    decoded = batch * per_sequence
    tokens = decoded + prefill_tokens
    rows = _tiled(batch, width) if cost.padded else batch
    runs = weight_bytes > 0
    return Parts(
        memory=(weight_bytes * cost.weight_factor + size.kv_bytes * cost.kv_factor * batch * context) / cost.bandwidth * runs,
        compute=_tiled(tokens, cost.tile) * (size.flops + size.attention_flops * context) / cost.compute * runs,
        overhead=cost.per_token * decoded  # prompt tokens need no acceptance
        + cost.per_pass
        + cost.per_sequence * _tiled(rows, cost.sequence_tile)
        + cost.per_context * context,
        communication=(
            size.reduces * (links.latency + tokens * size.reduce_bytes / links.bandwidth) + links.per_sequence * batch
        )
        * runs,
    )


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of all passes of one model on given hardware."""

    size: ModelSize
    target: PassCost
    verify: PassCost
    draft: Mapping[str, PassCost]
    """Costs of a drafter step, by format."""
    communication: Communication = field(default_factory=Communication)

    def parts(
        self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: float = 0, prefill_tokens: int = 0
    ) -> Parts[float]:
        """Parts of one pass over `batch` sequences and prefill_tokens. Only "draft" uses `format`; "target" does not use n.

        n may be a mean over the sequences of a verify pass."""
        size, width = self.size, num_speculative_tokens + 1
        cost = self.target if kind == "target" else self.verify if kind == "verify" else self.draft[format]
        weights = size.draft_bytes[format] if kind == "draft" else size.weight_bytes
        per_sequence = width if kind == "verify" else 1
        return parts_of(size, cost, self.communication, weights, batch, context, width, per_sequence, prefill_tokens)

    def rows(self, kind: Pass, format: str, batch: int, num_speculative_tokens: float) -> float:
        """Number of matmul rows of one pass: its tokens, after padding where the drafter's batch is padded."""
        if kind == "draft":
            return int(_tiled(batch, num_speculative_tokens + 1)) if self.draft[format].padded else batch
        return batch * (num_speculative_tokens + 1 if kind == "verify" else 1)

    def seconds(
        self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: float = 0, prefill_tokens: int = 0
    ) -> float:
        return self.parts(kind, format, batch, context, num_speculative_tokens, prefill_tokens).seconds

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds of a pass over prompt tokens alone."""
        return self.seconds("verify", "", 0, tokens / 2, 0, tokens)


def _tiled(count: Number, tile: Number | int) -> Number:
    """`count` rounded up to whole tiles."""
    return -(-count // tile) * tile
