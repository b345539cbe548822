"""Passes of a decode model, from scheduled batches or known sequences to logits: builds the inputs of every pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erollout.engine.model.attention import QuerySpan
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.inputs import ForwardInputs, slots_of
from erollout.engine.scheduler import Batch


class ModelRunner:
    """Runs passes of a decode model: the target's, a drafter's, and those that measure either."""

    def __init__(self, model: DecodeModel) -> None:
        self.model = model
        self.cache = model.cache

    @torch.inference_mode()
    def run(self, batch: Batch, draft_ids: Tensor | None = None) -> Tensor:
        """Compute a batch, whose block copies are already made.

        Args:
            draft_ids: int64 [drafts], on the device: each sequence's drafts, in the order of batch.scheduled.

        Returns: logits [rows, local vocabulary]: 1 + num_drafts rows per sequence that catches up, for its last known token and
            its drafts, in the order of batch.scheduled.
        """
        items = sorted(
            batch.scheduled, key=lambda item: item.num_tokens + item.num_drafts > 1
        )  # plans want single tokens first
        token_ids: list[int] = []
        last_rows: dict[int, int] = {}
        for item in items:
            token_ids += item.sequence.tokens(item.start, item.end)
            last_rows[id(item.sequence)] = len(token_ids) - 1
            token_ids += [0] * item.num_drafts
        spans = [QuerySpan(item.start, item.end + item.num_drafts, item.sequence.block_table) for item in items]
        wanted = _wanted_rows(batch, last_rows)
        inputs = self.inputs(spans, token_ids, wanted or [len(token_ids) - 1])  # never empty
        if draft_ids is not None:
            inputs.token_ids.index_copy_(0, self._tensor(_draft_rows(batch, last_rows)), draft_ids)
        return self.model.forward(inputs)[: len(wanted)]

    def inputs(
        self, spans: list[QuerySpan], token_ids: Sequence[int], logit_rows: Sequence[int] | None = None
    ) -> ForwardInputs:
        """A pass over the tokens of `spans`, those of a single token first.

        Args:
            token_ids: token ids of all spans, in order.
            logit_rows: tokens whose logits are needed; None: all.
        """
        size = self.cache.block_size
        positions = [position for span in spans for position in range(span.start, span.end)]
        slots = [slot for span in spans for slot in slots_of(span.block_table, size, span.start, span.end)]
        ids, placed = self._tensor(token_ids), self._tensor(positions)
        rows = self._tensor(logit_rows if logit_rows is not None else range(len(positions)))
        return ForwardInputs(ids, placed, self._tensor(slots), self.model.plan(spans), rows)

    def reading(self, token_ids: Sequence[int], start: int = 0) -> ForwardInputs:
        """A pass over a sequence from position `start` on, in the cache's first blocks, with the logits of all its tokens."""
        blocks = list(range(-(-len(token_ids) // self.cache.block_size)))
        return self.inputs([QuerySpan(start, len(token_ids), blocks)], token_ids[start:])

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.device)


def _wanted_rows(batch: Batch, last_rows: dict[int, int]) -> list[int]:
    """Rows of the pass whose logits are needed, from the row of each sequence's last known token."""
    rows: list[int] = []
    for item in batch.scheduled:
        if item.catches_up:
            last = last_rows[id(item.sequence)]
            rows += range(last, last + 1 + item.num_drafts)
    return rows


def _draft_rows(batch: Batch, last_rows: dict[int, int]) -> list[int]:
    """Rows of the pass that hold drafts."""
    rows: list[int] = []
    for item in batch.scheduled:
        last = last_rows[id(item.sequence)]
        rows += range(last + 1, last + 1 + item.num_drafts)
    return rows
