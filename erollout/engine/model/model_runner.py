"""From a scheduled batch to the logits that need sampling: all of a pass's tensors are built here, once."""

import torch
from torch import Tensor

from erollout.engine.model.attention import QuerySpan
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.scheduler import Batch


class ModelRunner:
    def __init__(self, model: DecodeModel) -> None:
        self.model = model
        self.cache = model.cache

    @torch.inference_mode()
    def run(self, batch: Batch, draft_ids: Tensor | None = None) -> Tensor:
        """Compute a batch, whose block copies are made already.

        Args:
            draft_ids: int64 [drafts], on the device: each sequence's drafts in turn, in the order of batch.scheduled.

        Returns: logits [rows, local vocabulary]: 1 + num_drafts rows for each sequence that catches up, of its last known
            token and of its drafts, in the order of batch.scheduled.
        """
        items = sorted(
            batch.scheduled, key=lambda item: item.num_tokens + item.num_drafts > 1
        )  # plans want single tokens first
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: dict[int, int] = {}
        for item in items:
            end = item.end + item.num_drafts
            token_ids += item.sequence.tokens(item.start, item.end)
            last_rows[id(item.sequence)] = len(token_ids) - 1
            token_ids += [0] * item.num_drafts
            positions += range(item.start, end)
            slots += slots_of(item.sequence.block_table, self.cache.block_size, item.start, end)
        wanted = _wanted_rows(batch, last_rows)
        rows = wanted or [len(token_ids) - 1]  # never empty
        spans = [QuerySpan(item.start, item.end + item.num_drafts, item.sequence.block_table) for item in items]
        ids = self._tensor(token_ids)
        if draft_ids is not None:
            ids.index_copy_(0, self._tensor(_draft_rows(batch, last_rows)), draft_ids)
        logits = self.model.forward(
            ids, self._tensor(positions), self._tensor(slots), self.model.plan(spans), self._tensor(rows)
        )
        return logits[: len(wanted)]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.device)


def slots_of(block_table: list[int], block_size: int, start: int, end: int) -> list[int]:
    """Where the keys and values of positions [start, end) lie in the cache."""
    return [block_table[position // block_size] * block_size + position % block_size for position in range(start, end)]


def _wanted_rows(batch: Batch, last_rows: dict[int, int]) -> list[int]:
    """Rows of the pass whose logits are wanted, by the row of each sequence's last known token."""
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
