"""Shapes of attention's batched products that give a query the same bits, found by a self-test as in row_tiles."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from erollout.engine.model.row_tiles import aligned, bits_of, cancelling

logger = logging.getLogger(__name__)

TILES = (1, 2, 4, 8, 16, 32)
"""Candidate numbers of query tokens per item."""
BATCHES = (1, 4, 16)
"""Candidate numbers of items per batched product."""


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Tiles that give a token's query heads the same bits at any place of the tile and the batch."""

    single: int
    """Query tokens per item for a sequence that computes one token."""
    several: int
    """Query tokens per item for a sequence that computes several tokens."""
    batches: dict[int, tuple[int, ...]]
    """Batch sizes of each tile, descending, down to 1; empty if nothing is promised."""

    def batched(self, tile: int, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, [items, rows, n] @ [items, n, m] for items of this tile, in batches of these sizes."""
        if not self.batches or left.shape[0] in self.batches[tile]:
            return torch.bmm(left, right)
        cuts = self._cuts(tile, left.shape[0])
        outputs = [torch.bmm(aligned(left[start:end]), right[start:end]) for start, end in cuts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _cuts(self, tile: int, items: int) -> Iterator[tuple[int, int]]:
        start = 0
        for size in self.batches[tile]:
            while items - start >= size:
                yield start, start + size
                start += size


UNTESTED = AttentionTiles(1, TILES[-1], {})
"""On a GPU, whose products promise no equal bits."""


@cache
def attention_tiles(queries_per_kv: int, head_size: int, chunk: int, dtype: torch.dtype, threads: int) -> AttentionTiles:
    """Tiles on the CPU for chunks of `chunk` keys, with the widest range: few queries in decoding, many in prefill."""
    query, key = cancelling(queries_per_kv, chunk, head_size, dtype)
    weight, value = cancelling(queries_per_kv, head_size, chunk, dtype)
    keys, values = key.repeat(BATCHES[-1], 1, 1).transpose(1, 2), value.t().repeat(BATCHES[-1], 1, 1)
    classes: dict[bytes, dict[int, list[int]]] = {}
    with torch.inference_mode():
        for tile in TILES:
            for batch in BATCHES:
                scores = _bits_of_tokens(torch.bmm(query.repeat(batch, tile, 1), keys[:batch]), queries_per_kv)
                outputs = _bits_of_tokens(torch.bmm(weight.repeat(batch, tile, 1), values[:batch]), queries_per_kv)
                if scores is not None and outputs is not None:
                    classes.setdefault(scores + outputs, {}).setdefault(tile, []).append(batch)
    usable = [{tile: batches for tile, batches in tiles.items() if 1 in batches} for tiles in classes.values()]
    best = max(filter(None, usable), key=lambda tiles: (max(tiles) / min(tiles), max(tiles)))
    batches = {tile: tuple(reversed(best[tile])) for tile in (min(best), max(best))}
    found = AttentionTiles(min(best), max(best), batches)
    shape = f"{queries_per_kv} queries per KV head, head size {head_size}, {dtype}, {threads} threads"
    logger.debug("attention tiles of %s: %s", shape, found)
    return found


def _bits_of_tokens(products: Tensor, queries_per_kv: int) -> bytes | None:
    """Bits of the queries of one token; None: they depend on its place in the tile or the batch."""
    tokens = products.view(-1, queries_per_kv, products.shape[-1])
    first = bits_of(tokens[0])
    return first if all(bits_of(token) == first for token in tokens[1:]) else None
