"""The pool of KV cache blocks, with copy on write between sequences that share a block. Pure.

A block table maps a sequence's positions to blocks: position p is in block table[p // block_size]. Tables of forked sequences
share blocks; a shared block is read-only, and a writer gets its own copy.
"""

from typing import NamedTuple


class BlockCopy(NamedTuple):
    """Keys and values of `source` must be copied to `destination` before the next write to it."""

    source: int
    destination: int


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks for `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def missing(self, table: list[int], start: int, end: int) -> int:
        """Number of free blocks that `reserve` of the same range would take."""
        return max(0, self.blocks_for(end) - len(table)) + len(self._shared(table, start, end))

    def reserve(self, table: list[int], start: int, end: int) -> list[BlockCopy]:
        """Make positions [start, end) writable for the owner of `table`, which grows in place.

        Returns the copies to make first: shared blocks in the range are replaced by private ones.
        Raises AssertionError if the pool has too few free blocks: call `missing` before.
        """
        assert self.missing(table, start, end) <= self.num_free, "reserve without enough free blocks"
        copies = [self._privatize(table, index) for index in self._shared(table, start, end)]
        while len(table) < self.blocks_for(end):
            table.append(self._take())
        return copies

    def fork(self, table: list[int]) -> list[int]:
        """A second table of the same blocks, which are shared until one of their holders writes."""
        for block in table:
            self._references[block] += 1
        return list(table)

    def truncate(self, table: list[int], num_tokens: int) -> None:
        """Free the blocks beyond the first `num_tokens` positions; 0 empties the table."""
        for _ in range(len(table) - self.blocks_for(num_tokens)):
            self._drop(table.pop())

    def _shared(self, table: list[int], start: int, end: int) -> list[int]:
        """Indices into `table` of existing blocks of positions [start, end) that are shared with another table."""
        first, last = start // self.block_size, min(self.blocks_for(end), len(table))
        return [index for index in range(first, last) if self._references[table[index]] > 1]

    def _privatize(self, table: list[int], index: int) -> BlockCopy:
        copy = BlockCopy(table[index], self._take())
        self._drop(copy.source)
        table[index] = copy.destination
        return copy

    def _take(self) -> int:
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)
