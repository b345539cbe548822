"""Interface of proposers of draft tokens: a quantised policy, an n-gram table or extra heads can each be one file."""

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from erollout.engine.sampling.logits import ShardLogits
from erollout.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Decoding sequences that need drafts, for which their KV blocks have room."""

    sequences: list[Sequence]
    """The sequences, each of which lags by one token."""
    num_drafts: list[int]
    """Number of drafts for each sequence: at least 1, in descending order."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """Proposed tokens, on the engine's device, made without synchronisation with the host."""

    token_ids: Tensor
    """int64 [most drafts, sequences]: row i holds every sequence's draft i; entries beyond a sequence's number are arbitrary
    tokens of the vocabulary."""
    processed: tuple[ShardLogits, ...] | None
    """Processed logits from which the drafts were sampled, per draft position, of the (leading) sequences with such a draft.
    None if each draft was certain: the proposer has no distribution, or the verification needs none."""
    num_drafts: tuple[int, ...] | None = None
    """Number of drafts of each sequence, where the proposer had fewer than were requested; None: it had all of them."""
    on_host: bool = False
    """Whether the host made them, so that its clock tells how long that took, on an accelerator too."""

    @classmethod
    def certain(cls, found: List[List[int]], most: int, device: torch.device) -> "Drafts":
        """Drafts that are known on the host.

        Args:
            found: the drafts of each sequence, as many as there are and at most those requested.
            most: largest number of drafts requested.
        """
        columns = [[*ids, *[0] * (most - len(ids))] for ids in found]
        token_ids = torch.tensor(columns, dtype=torch.int64, device=device).T.contiguous()
        return cls(token_ids, None, tuple(map(len, found)), on_host=True)

    def runs(self, columns: Iterable[tuple[int, int]]) -> Tensor:
        """The drafts of several sequences in a row, int64 [drafts]; each sequence given by (column, number of drafts)."""
        width = self.token_ids.shape[1]
        index = [step * width + column for column, num_drafts in columns for step in range(num_drafts)]
        return self.token_ids.flatten().index_select(0, torch.tensor(index, dtype=torch.int64, device=self.token_ids.device))


class Proposer(Protocol):
    def require(self, policy_version: int) -> None:
        """Raise RuntimeError, naming both versions, unless the proposer belongs to this version of the policy."""

    def propose(self, request: DraftRequest) -> Drafts:
        """Draft tokens, or fewer than requested where there is nothing to propose. Under tensor parallelism collective over the
        replica, with equal results on all of its ranks."""

    def sleep(self) -> None:
        """Free memory that only a rollout needs."""
