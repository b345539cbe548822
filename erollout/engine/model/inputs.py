"""What one forward pass of the decode model reads: the one description that target, drafter and every measurement share."""

from dataclasses import dataclass, replace

from torch import Tensor

from erollout.engine.model.attention import AttentionPlan


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """New tokens of some sequences, those of each in a row. Tensors are int64, on the model's device."""

    token_ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[tokens]: each token's in its sequence."""
    slots: Tensor
    """[tokens]: block x block_size + offset where each token's keys and values go."""
    plan: AttentionPlan
    """The model's own of the same tokens."""
    logit_rows: Tensor
    """[rows]: the tokens whose logits are wanted."""

    def with_tokens(self, token_ids: Tensor) -> "ForwardInputs":
        """The same pass over other tokens, [tokens]."""
        return replace(self, token_ids=token_ids)


def slots_of(block_table: list[int], block_size: int, start: int, end: int) -> list[int]:
    """Where the keys and values of positions [start, end) lie in the cache."""
    return [block_table[position // block_size] * block_size + position % block_size for position in range(start, end)]
