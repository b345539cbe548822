"""Inputs of one forward pass of the decode model, shared by target, drafter and all measurements."""

from dataclasses import dataclass, replace

from torch import Tensor

from erollout.engine.model.attention import AttentionPlan


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """New tokens of some sequences, contiguous per sequence. Tensors are int64, on the model's device."""

    token_ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[tokens]: position of each token in its sequence."""
    slots: Tensor
    """[tokens]: cache slot of each token's keys and values, block x block_size + offset."""
    plan: AttentionPlan
    """The model's plan for these tokens."""
    logit_rows: Tensor
    """[rows]: indices of the tokens whose logits are needed."""

    def with_tokens(self, token_ids: Tensor) -> "ForwardInputs":
        """The same pass over other tokens, [tokens]."""
        return replace(self, token_ids=token_ids)


def slots_of(block_table: list[int], block_size: int, start: int, end: int) -> list[int]:
    """Cache slots of the keys and values of positions [start, end)."""
    return [block_table[position // block_size] * block_size + position % block_size for position in range(start, end)]
