"""What crosses package borders. Token ids are Python ints, log-probs are natural logarithms."""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the target's logits. The defaults sample the untouched distribution."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    """Longest response, stop token included."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response; the id itself stays in the response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response once they appear in its decoded text."""
    ignore_eos: bool = False
    """Do not stop at stop_token_ids (strings still stop): for benchmarks with fixed lengths."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task item, tokenized."""

    index: int
    """Position in the data order: identifies the item over the whole run."""
    prompt_ids: tuple[int, ...]
    text: str
    """What prompt_ids decode to, after the chat template."""
    task: str
    """Name of the task or dataset that it came from: rewards are reported by it."""
    item: dict[str, Any] = field(default_factory=dict)
    """What the scorer needs (reference answer, the task's own record)."""


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
    """Samples that an interrupted attempt has completed: they are not sampled again."""
    begun: tuple["PartialRollout", ...] = ()
    """Samples that go on from the tokens which an interrupted attempt has left."""

    @property
    def num_open(self) -> int:
        """Samples to be completed."""
        return self.group_size - len(self.finished)


@dataclass(frozen=True, slots=True)
class PartialRollout:
    """A response on its way: all that another replica, or a later attempt, needs to go on with it."""

    prompt_index: int
    sample_index: int
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Processed, one per response id."""
    raw_logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    """Of one that is complete."""


@dataclass(slots=True)
class Rollout:
    """One sampled response."""

    prompt_index: int
    sample_index: int
    """0 .. group_size - 1."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    """Processed: of the distribution sampled from (after penalties, temperature, top-k, top-p, min-p); one per response id."""
    raw_logprobs: tuple[float, ...]
    """Of the target's softmax without any processing; one per response id."""
    finish_reason: FinishReason
    policy_version: int


@dataclass(slots=True)
class Reward:
    """A score and how it came about."""

    prompt_index: int
    sample_index: int
    value: float
    error: str | None = None
    """Why the scorer gave no answer (exception or timeout); value is then the configured fallback."""


@dataclass(slots=True)
class ScoredRollout:
    """A rollout with its reward, ready for the algorithm."""

    rollout: Rollout
    reward: float
    task: str
    advantage: float = 0.0
