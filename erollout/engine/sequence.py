"""A response in progress: its tokens, how far they are computed, and its block table. Pure."""

from dataclasses import dataclass, field
from enum import Enum

from erollout.types import FinishReason, PartialRollout, SamplingParams


class SequenceState(Enum):
    WAITING = "waiting"
    """Not admitted: it is in no forward pass. It may still hold the blocks of its group's prompt."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """Sample `sample_index` of a request, from prompt to finish."""

    order: int
    """Order of arrival: earlier sequences are served first and preempted last."""
    request_index: int
    """Position of the request in the call to generate."""
    sample_index: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """As Rollout.loss_mask."""
    num_computed_tokens: int = 0
    """Number of leading tokens whose keys and values are in the cache; it catches up with num_tokens."""
    block_table: list[int] = field(default_factory=list)
    """Block i holds the keys and values of tokens [i * block_size, (i + 1) * block_size)."""
    followers: list["Sequence"] = field(default_factory=list)
    """Siblings that wait for this sequence, their group's leader, to prefill the shared prompt."""
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions [start, end) of prompt and response."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.response_ids[start - prompt : end - prompt]
        return [*self.prompt_ids[start:end], *self.response_ids[: max(0, end - prompt)]]

    def append(self, token_id: int, logprob: float, raw_logprob: float) -> None:
        self.response_ids.append(token_id)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)
        self.loss_mask.append(1)

    def partial(self, prompt_index: int) -> PartialRollout:
        """What another replica, or a later attempt, needs to resume this response."""
        return PartialRollout(
            prompt_index,
            self.sample_index,
            tuple(self.response_ids),
            tuple(self.logprobs),
            tuple(self.raw_logprobs),
            loss_mask=tuple(self.loss_mask),
        )

    def restore(self, partial: PartialRollout) -> None:
        """Take over a response as it was, with nothing computed."""
        self.response_ids, self.loss_mask = list(partial.response_ids), list(partial.loss_mask)
        self.logprobs, self.raw_logprobs = list(partial.logprobs), list(partial.raw_logprobs)
