"""What proposes draft tokens: an interface, so that a quantised policy, an n-gram table or extra heads can each be one file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from erollout.engine.sampling.logits import ShardLogits
from erollout.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Decoding sequences that want drafts; their KV blocks have room for them."""

    sequences: list[Sequence]
    """Each lags by one token: its last one is not computed yet."""
    num_drafts: list[int]
    """How many tokens each wants: at least 1, in descending order."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """Proposed tokens, on the engine's device: making them forces no synchronisation with the host."""

    token_ids: Tensor
    """int64 [most drafts, sequences]: row i holds every sequence's draft i; beyond a sequence's number anything may stand,
    as long as it is a token of the vocabulary."""
    processed: tuple[ShardLogits, ...] | None
    """Per draft position, the processed logits that the drafts were drawn from, of those (leading) sequences that have such a
    draft. None when each draft was certain: the proposer has no distribution, or the verification needs none."""

    def runs(self, columns: Iterable[tuple[int, int]]) -> Tensor:
        """The drafts of one sequence after the other, int64 [drafts]; each named by its (column, number of drafts)."""
        width = self.token_ids.shape[1]
        index = [step * width + column for column, num_drafts in columns for step in range(num_drafts)]
        return self.token_ids.flatten().index_select(0, torch.tensor(index, dtype=torch.int64, device=self.token_ids.device))


class Proposer(Protocol):
    def require(self, policy_version: int) -> None:
        """Raise RuntimeError, naming both versions, unless the proposer belongs to this version of the policy."""

    def propose(self, request: DraftRequest) -> Drafts:
        """Draft tokens. Under tensor parallelism collective over the replica, with equal results on all of its ranks."""

    def sleep(self) -> None:
        """Give back memory that only a rollout needs."""
