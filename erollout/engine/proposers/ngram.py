"""N-gram proposer, or prompt lookup: what followed the last tokens where they stood before in the same prompt and response.

The longest n-gram of the text's end that occurs earlier counts, and of its occurrences the first, as in vLLM and transformers
(https://github.com/apoorvumang/prompt-lookup-decoding). Where none occurs nothing is proposed, and the step is autoregressive.
Drafts are functions of tokens alone: equal on all ranks of a replica, and the same after a preemption, a migration or a resume.
Pure: torch comes with the work.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from erollout.configuration.speculation import NGramConfig, SpeculationConfig
from erollout.engine.sequence import Sequence, SequenceState
from erollout.parallel.placement import Placement
from erollout.speculation.cost.roofline import NO_MODEL, DraftWeights

if TYPE_CHECKING:
    import torch

    from erollout.engine.engine import Engine
    from erollout.engine.proposers.base import DraftRequest, Drafts
    from erollout.engine.proposers.proposer_set import ProposerSet


class NGramIndex:
    """A growing text with the first position behind every n-gram. Constant time per token."""

    def __init__(self, options: NGramConfig) -> None:
        self._sizes = range(options.max_ngram, options.min_ngram - 1, -1)
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """Position of the token behind the first occurrence of each n-gram; the end of the text has no such token yet."""

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        known, behind = self._tokens, self._behind
        for token in tokens:
            position = len(known)
            for size in self._sizes:
                if size <= position:
                    behind.setdefault(tuple(known[position - size :]), position)
            known.append(token)

    def continuation(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the text's last n-gram; none if it is new."""
        for size in self._sizes:
            if size < len(self._tokens) and (position := self._behind.get(tuple(self._tokens[-size:]))) is not None:
                return self._tokens[position : position + length]
        return []


class NGramProposer:
    """A Proposer that keeps an index of every sequence in progress."""

    def __init__(self, options: NGramConfig, device: "torch.device") -> None:
        self.options = options
        self.device = device
        self._indexes: dict[Sequence, NGramIndex] = {}

    def require(self, policy_version: int) -> None:
        """Its drafts belong to every version of the policy."""

    def propose(self, request: "DraftRequest") -> "Drafts":
        from erollout.engine.proposers.base import Drafts

        wanted = zip(request.sequences, request.num_drafts, strict=True)
        found = [self._index(sequence).continuation(num_drafts) for sequence, num_drafts in wanted]
        if len(self._indexes) > 2 * len(found):
            self._indexes = {s: index for s, index in self._indexes.items() if s.state is not SequenceState.FINISHED}
        return Drafts.certain(found, request.num_drafts[0], self.device)

    def sleep(self) -> None:
        self._indexes.clear()

    def _index(self, sequence: Sequence) -> NGramIndex:
        """The index of all known tokens of a sequence."""
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = NGramIndex(self.options)
        index.extend(sequence.tokens(len(index), sequence.num_tokens))
        return index


class NGram:
    """The kind of proposers in this file, for the registry. Keys: speculation.ngram."""

    name = "ngram"

    def drafters(self, options: SpeculationConfig) -> Mapping[str, DraftWeights]:
        return {self.name: NO_MODEL}

    def find(self, drafter: str, group_size: int) -> DraftWeights | None:
        return NO_MODEL if drafter == self.name else None

    def summary(self, options: SpeculationConfig) -> str:
        return f"n-grams of {options.ngram.min_ngram} to {options.ngram.max_ngram} tokens"

    def check(self, options: SpeculationConfig, placement: Placement) -> None:
        """Any model will do."""

    def build(self, options: SpeculationConfig, engine: "Engine") -> "ProposerSet":
        from erollout.engine.proposers.proposer_set import ProposerSet

        return ProposerSet(options, engine, {self.name: NGramProposer(options.ngram, engine.cache.device)})
