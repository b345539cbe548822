"""From a scheduled batch to the logits that need sampling: all of a pass's tensors are built here, once."""

import torch
from torch import Tensor

from erollout.engine.attention import Span
from erollout.engine.decode_model import DecodeModel
from erollout.engine.scheduler import Batch, ScheduledSequence


class ModelRunner:
    def __init__(self, model: DecodeModel) -> None:
        self.model = model
        self.cache = model.cache
        self.min_rows = model.attention.min_rows

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute a batch.

        Returns: logits [sequences that catch up, local vocabulary], in the order of batch.scheduled.
        """
        self.cache.copy_blocks(batch.copies)
        items = sorted(batch.scheduled, key=lambda item: item.num_tokens > 1)  # attention wants single tokens first
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: dict[int, int] = {}
        for item in items:
            token_ids += item.sequence.tokens(item.start, item.end)
            positions += range(item.start, item.end)
            slots += self._slots(item)
            last_rows[id(item.sequence)] = len(token_ids) - 1
        padding = max(0, self.min_rows - len(token_ids))
        token_ids += [0] * padding
        positions += [0] * padding
        slots += [self.cache.scratch_block * self.cache.block_size] * padding
        wanted = [last_rows[id(item.sequence)] for item in batch.scheduled if item.catches_up]
        rows = wanted + [len(token_ids) - 1] * max(0, self.min_rows - len(wanted))  # min_rows >= 1: never empty
        spans = [Span(item.start, item.end, item.sequence.block_table) for item in items]
        logits = self.model.forward(
            self._tensor(token_ids),
            self._tensor(positions),
            self._tensor(slots),
            self.model.attention.plan(spans, padding),
            self._tensor(rows),
        )
        return logits[: len(wanted)]

    def _slots(self, item: ScheduledSequence) -> list[int]:
        size, table = self.cache.block_size, item.sequence.block_table
        return [table[position // size] * size + position % size for position in range(item.start, item.end)]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.device)
