"""Types that cross package borders. Token ids are Python ints, log-probs are natural logarithms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


def all_sampled(response_ids: Sequence[int]) -> tuple[int, ...]:
    """The loss mask of a response whose tokens all come from the policy."""
    return (1,) * len(response_ids)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters for sampling from the target's logits. The defaults sample the unmodified distribution."""

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    """Longest response in tokens, stop token included."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response and are part of it."""
    stop: tuple[str, ...] = ()
    """Strings that end a response once they appear in its decoded text."""
    ignore_eos: bool = False
    """Ignore stop_token_ids (strings still stop): for benchmarks with fixed lengths."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task item, tokenized."""

    index: int
    """Position in the data order, which identifies the item over the whole run."""
    prompt_ids: tuple[int, ...]
    text: str
    """Text of prompt_ids, after the chat template."""
    task: str
    """Name of its task or dataset, by which rewards are reported."""
    item: dict[str, Any] = field(default_factory=dict)
    """Data for the scorer (reference answer, the task's own record)."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A group: one prompt to be sampled group_size times."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    group_size: int
    sampling: SamplingParams
    seed: int
    """Sample i of the group draws with sequence_seed(seed, i)."""
    finished: frozenset[int] = frozenset()
    """Samples completed by an interrupted attempt, which are not sampled again."""
    begun: tuple["PartialRollout", ...] = ()
    """Partial rollouts of an interrupted attempt, to be resumed."""

    @property
    def num_open(self) -> int:
        """Number of samples to be completed."""
        return self.group_size - len(self.finished)


@dataclass(frozen=True, slots=True)
class PartialRollout:
    """An incomplete response, with all that another replica or a later attempt needs to resume it."""

    prompt_index: int
    sample_index: int
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Processed log-probs, one per response id."""
    raw_logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    """Finish reason of a complete response; None: incomplete."""
    loss_mask: tuple[int, ...] = ()
    """As Rollout.loss_mask."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_mask", self.loss_mask or all_sampled(self.response_ids))

    @property
    def num_sampled(self) -> int:
        """Response tokens that the policy sampled."""
        return sum(self.loss_mask)


@dataclass(slots=True)
class Rollout:
    """One sampled response."""

    prompt_index: int
    sample_index: int
    """0 .. group_size - 1."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    """Log-probs of the distribution sampled from (after penalties, temperature, top-k, top-p, min-p); one per response id."""
    raw_logprobs: tuple[float, ...]
    """Log-probs of the target's softmax without any processing; one per response id."""
    finish_reason: FinishReason
    policy_version: int
    loss_mask: tuple[int, ...] = ()
    """1 for a token that the policy sampled and is trained on, 0 for one that something else put there (a tool's output); one
    per response id. Left out: all are 1."""

    def __post_init__(self) -> None:
        self.loss_mask = self.loss_mask or all_sampled(self.response_ids)

    @property
    def num_sampled(self) -> int:
        """Response tokens that the policy sampled."""
        return sum(self.loss_mask)


@dataclass(slots=True)
class Reward:
    """A score and its origin."""

    prompt_index: int
    sample_index: int
    value: float
    error: str | None = None
    """Reason why the scorer failed (exception or timeout); value is then the configured fallback."""


@dataclass(slots=True)
class ScoredRollout:
    """A rollout with its reward, ready for the algorithm."""

    rollout: Rollout
    reward: float
    task: str
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class DatasetDescription:
    """One split of a run's data, as tracking shows it."""

    name: str
    source: str
    """Paths of its files, or what generates it."""
    rows: int
    """Items of one epoch."""
    columns: dict[str, str]
    """Kind of value by column of the first row: string, long, double, boolean, array or object."""
    digest: str
    """32 hexadecimal digits: of the files' bytes, or of all that determines generated items."""
