"""N-gram proposer, or prompt lookup: what followed the last tokens where they stood before in the same prompt and response.

The longest n-gram at the text's end that occurs earlier within a window counts, and its first occurrence there, as in vLLM and
transformers (https://github.com/apoorvumang/prompt-lookup-decoding). Where none occurs nothing is proposed.
Drafts are functions of tokens alone: equal on all ranks of a replica, and the same after a preemption, a migration or a resume.
Pure: torch comes with the work.
"""

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from erollout.configuration.speculation import NGramConfig, SpeculationConfig
from erollout.engine.sequence import Sequence
from erollout.parallel.placement import Placement
from erollout.speculation.cost.roofline import NO_MODEL, DraftWeights

if TYPE_CHECKING:
    import torch

    from erollout.engine.engine import Engine
    from erollout.engine.proposers.base import DraftRequest, Drafts
    from erollout.engine.proposers.proposer_set import ProposerSet


def as_text(tokens: list[int]) -> str:
    """One character per token: vocabularies are smaller than Unicode, with its 1,114,112 code points."""
    return array("I", tokens).tobytes().decode("utf-32-le", "surrogatepass")


def continuation(text: str, options: NGramConfig, length: int) -> str:
    """Up to `length` tokens that followed an earlier occurrence of the text's last n-gram; none if it is new.

    One pass over the text: an n-gram that is a token longer first occurs at most one token before the shorter one does.
    """
    start = behind = 0
    for size in range(options.min_ngram, options.max_ngram + 1):
        start = text.find(text[-size:], max(0, start - 1), len(text) - 1) if size < len(text) else -1
        if start < 0:
            break
        behind = start + size
    return text[behind : behind + length] if behind else ""


class NGramProposer:
    """A Proposer that keeps the last tokens of every sequence in progress, up to the window, as text of four bytes each."""

    def __init__(self, options: NGramConfig, device: "torch.device") -> None:
        self.options = options
        self.device = device
        self._texts: WeakKeyDictionary[Sequence, tuple[int, str]] = WeakKeyDictionary()
        """Number of tokens known of each sequence, and the last ones of them."""

    def require(self, policy_version: int) -> None:
        """Its drafts belong to every version of the policy."""

    def propose(self, request: "DraftRequest") -> "Drafts":
        from erollout.engine.proposers.base import Drafts

        wanted = zip(request.sequences, request.num_drafts, strict=True)
        found = [continuation(self._text(sequence), self.options, num_drafts) for sequence, num_drafts in wanted]
        return Drafts.certain([list(map(ord, text)) for text in found], request.num_drafts[0], self.device)

    def sleep(self) -> None:
        self._texts.clear()

    def _text(self, sequence: Sequence) -> str:
        """The last tokens of a sequence."""
        window, end = self.options.window, sequence.num_tokens
        known, text = self._texts.get(sequence, (0, ""))
        text = (text + as_text(sequence.tokens(max(known, end - window), end)))[-window:]
        self._texts[sequence] = end, text
        return text


class NGram:
    """The kind of proposers in this file, for the registry. Keys: speculation.ngram."""

    name = "ngram"
    section = "ngram"
    known = (name,)

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
