"""Attention of new tokens over the paged KV cache, built from torch operators; bit for bit independent of the batch.

The work of a forward pass is cut into items of one size: a tile of query tokens of one sequence against a chunk of its keys,
which begins at a multiple of the chunk size. Every item is one matrix of a batched product, its partial softmax (unnormalised
output, maximum and sum, as in flash-decoding) is combined over the chunks of a tile in their order. What an item computes and
how it is combined depends on nothing but the query's position and its sequence, so a token's result is the same alone, among
any neighbours, and in a prompt chunk of any length. On the CPU the products have shapes that a self-test found to agree bit for
bit (attention_tiles).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention_tiles import UNTESTED, AttentionTiles, attention_tiles
from erollout.engine.model.row_tiles import in_grains

TARGET_CHUNK = 128
"""Keys of one item, rounded to whole blocks and vectors."""
_VECTOR = 32
"""Divisor of chunk sizes: exp2 gives other last bits to values that do not fill two AVX-512 vectors."""
_MASKED = -1e30
"""Score of a masked key: finite, so that a chunk without any visible key gets weight 0 and not NaN."""


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """New tokens of one sequence: positions [start, end), with the blocks that hold all positions up to `end`."""

    start: int
    end: int
    block_table: list[int]


@dataclass(frozen=True, slots=True)
class TileGroup:
    """All items of a pass with the same tile size; rows are indices into the pass's tokens."""

    tile: int
    rows: Tensor
    """[tiles x tile]: token of every tile row; rows beyond a span's end repeat its last token."""
    valid: Tensor | None
    """Tile rows that are real tokens, in token order; None when all are."""
    item_tiles: Tensor | None
    """[items]: tile of each item, in order; None when every tile has exactly one item."""
    segments: Tensor | None
    """[kv_heads x tiles]: number of items of each tile, or None as above."""
    blocks: Tensor
    """[items x blocks per chunk]: the blocks of each item's chunk, null blocks beyond the end."""
    mask: Tensor
    """float32 [items, tile, 1, chunk]: 0 or _MASKED."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Plan of a pass, prepared once for all layers; each kind of attention has its own form."""


@dataclass(frozen=True, slots=True)
class TiledPlan(AttentionPlan):
    groups: tuple[TileGroup, ...]


class Attention(Protocol):
    def plan(self, spans: list[QuerySpan]) -> AttentionPlan:
        """Prepare a pass. `spans` is in token order, those of a single token first."""

    def __call__(self, query: Tensor, layer_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention of every token over its sequence, itself included.

        Args:
            query: [tokens, num_heads, head_size], rotated.
            layer_cache: the cache of one layer, which already holds the keys and values of the pass's own tokens.
            plan: of this pass.

        Returns: [tokens, num_heads x head_size].
        """


class _Cut:
    """Tiles and items of a group under construction; the attributes are those of TileGroup, as lists."""

    def __init__(self, tile: int) -> None:
        self.tile = tile
        self.rows: list[int] = []
        self.valid: list[int] = []
        self.positions: list[int] = []
        """Position of every tile row's token."""
        self.items: list[tuple[int, int]] = []
        """(tile, position of the chunk's first key)."""
        self.blocks: list[int] = []

    def add_tile(self, row_of_position_0: int, first: int, last: int) -> None:
        """The tile of a span's positions [first, last]."""
        self.valid += range(len(self.rows), len(self.rows) + last - first + 1)
        positions = [min(position, last) for position in range(first, first + self.tile)]
        self.positions += positions
        self.rows += [row_of_position_0 + position for position in positions]


class PagedAttention(Attention):
    """Plans passes and runs them, for one rank's heads."""

    def __init__(self, num_heads: int, cache: KVCache, num_kv_heads: int, head_size: int) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.queries_per_kv = num_heads // num_kv_heads
        self.head_size = head_size
        self.scale = head_size**-0.5 / math.log(2)  # exp2 is 15 times faster than exp here, where MKL stumbles over underflow
        self.cache = cache
        self.blocks_per_chunk = _blocks_per_chunk(cache.block_size)
        self.chunk = self.blocks_per_chunk * cache.block_size
        self._tiles = self._make_tiles()
        self._offsets = torch.arange(self.chunk, device=cache.device)

    def plan(self, spans: list[QuerySpan]) -> TiledPlan:
        """Cut a pass into items."""
        single = sum(span.end - span.start == 1 for span in spans)
        groups = []
        if single:
            groups.append(self._group(spans[:single], 0, self._tiles.single))
        if len(spans) > single:
            groups.append(self._group(spans[single:], single, self._tiles.several))
        return TiledPlan(tuple(groups))

    def __call__(self, query: Tensor, layer_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """See Attention."""
        assert isinstance(plan, TiledPlan)
        outputs = [self._attend(query, layer_cache, group) for group in plan.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _make_tiles(self) -> AttentionTiles:
        if self.cache.device.type != "cpu":
            return UNTESTED
        return attention_tiles(self.queries_per_kv, self.head_size, self.chunk, self.cache.dtype, torch.get_num_threads())

    def _group(self, spans: list[QuerySpan], first_row: int, tile: int) -> TileGroup:
        cut = _Cut(tile)
        for span in spans:
            for start in range(span.start, span.end, tile):
                last = min(start + tile, span.end) - 1
                cut.add_tile(first_row - span.start, start, last)
                for key in range(0, last + 1, self.chunk):
                    cut.items.append((len(cut.rows) // tile - 1, key))
                    cut.blocks += self._chunk_blocks(span.block_table, key, last)
            first_row += span.end - span.start
        return self._to_tensors(cut)

    def _chunk_blocks(self, table: list[int], first_key: int, last_position: int) -> list[int]:
        """Blocks of the chunk at `first_key`, those beyond the last position replaced by the null block."""
        first = first_key // self.cache.block_size
        end = min(first + self.blocks_per_chunk, last_position // self.cache.block_size + 1)
        return table[first:end] + [self.cache.null_block] * (first + self.blocks_per_chunk - end)

    def _to_tensors(self, cut: "_Cut") -> TileGroup:
        device = self.cache.device
        items = torch.tensor(cut.items, device=device)
        item_tiles, first_keys = items[:, 0].contiguous(), items[:, 1]
        tiles = len(cut.rows) // cut.tile
        positions = torch.tensor(cut.positions, device=device).view(tiles, cut.tile).index_select(0, item_tiles)
        hidden = self._offsets > (positions - first_keys[:, None])[:, :, None]
        several = len(cut.items) > tiles
        return TileGroup(
            tile=cut.tile,
            rows=torch.tensor(cut.rows, device=device),
            valid=torch.tensor(cut.valid, device=device) if len(cut.valid) < len(cut.rows) else None,
            item_tiles=item_tiles if several else None,
            segments=torch.bincount(item_tiles, minlength=tiles).repeat(self.num_kv_heads) if several else None,
            blocks=torch.tensor(cut.blocks, device=device),
            mask=torch.zeros(hidden.shape, device=device).masked_fill_(hidden, _MASKED).unsqueeze(2),
        )

    def _attend(self, query: Tensor, layer_cache: Tensor, group: TileGroup) -> Tensor:
        """[valid rows of the group, num_heads x head_size]."""
        heads, per_kv, size = self.num_kv_heads, self.queries_per_kv, self.head_size
        items = group.mask.shape[0]
        tiles = group.rows.shape[0] // group.tile
        tile_query = query.index_select(0, group.rows).view(tiles, group.tile, heads, per_kv, size).permute(2, 0, 1, 3, 4)
        if group.item_tiles is not None:
            tile_query = tile_query.index_select(1, group.item_tiles)
        item_query = tile_query.reshape(heads * items, group.tile * per_kv, size)
        keys, values = layer_cache.index_select(1, group.blocks).view(2, heads * items, self.chunk, size).unbind(0)

        scores = self._tiles.batched(group.tile, item_query, keys.transpose(1, 2)).view(
            heads, items, group.tile, per_kv, self.chunk
        )
        scores = torch.add(group.mask, scores, alpha=self.scale)  # float32, in units of log 2
        maximum = scores.amax(-1, keepdim=True)
        weights = _exp2(scores.sub_(maximum))
        total = weights.sum(-1, keepdim=True)
        weights = weights.to(query.dtype).view(heads * items, group.tile * per_kv, self.chunk)
        output = self._tiles.batched(group.tile, weights, values).view(heads * items, group.tile, per_kv, size)
        maximum, total = (x.view(heads * items, group.tile, per_kv, 1) for x in (maximum, total))
        if group.segments is not None:
            output, total = _combine(output, maximum, total, group.segments)
        output = (output / total).to(query.dtype).view(heads, tiles, group.tile, per_kv, size)
        output = output.permute(1, 2, 0, 3, 4).reshape(tiles * group.tile, heads * per_kv * size)
        return output if group.valid is None else output.index_select(0, group.valid)


def _blocks_per_chunk(block_size: int) -> int:
    whole_vectors = _VECTOR // math.gcd(_VECTOR, block_size)
    return max(1, TARGET_CHUNK // (block_size * whole_vectors)) * whole_vectors


def _combine(output: Tensor, maximum: Tensor, total: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each segment's items, brought to the segment's maximum, in their order. A segment of one item is left as it is."""
    highest = torch.segment_reduce(maximum, "max", lengths=segments, axis=0, unsafe=True)
    difference = maximum - highest.repeat_interleave(segments, 0)
    weight = _exp2(difference.expand(*difference.shape[:-1], _VECTOR).contiguous())[..., :1]  # in whole vectors
    both = torch.cat((output * weight, total * weight), -1)
    both = torch.segment_reduce(both, "sum", lengths=segments, axis=0, unsafe=True)
    return both[..., :-1], both[..., -1:]


def _exp2(x: Tensor) -> Tensor:
    """In place, of x [..., a multiple of _VECTOR]."""
    in_grains(Tensor.exp2_, x.view(-1, _VECTOR))
    return x


def reference_attention(query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Causal grouped-query attention in plain float32: the definition that PagedAttention is tested against.

    Args:
        query: [tokens, num_heads, head_size] at positions start, start + 1, ...
        keys, values: [start + tokens, kv_heads, head_size].
    """
    per_kv = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(per_kv, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * query.shape[-1] ** -0.5
    visible = torch.arange(keys.shape[0]) <= start + torch.arange(query.shape[0])[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
