"""Copy on write against a model of what every table must read: nobody ever sees what another holder of a block wrote."""

from hypothesis import given, settings
from hypothesis import strategies as st

from erollout.engine.block_manager import BlockManager

BLOCK = 4


class Table:
    """A table, the contents that its owner expects and a clock-stamped write per position."""

    def __init__(self, blocks: list[int], contents: list[int]) -> None:
        self.blocks = blocks
        self.contents = contents


class Pool:
    """The manager beside simulated block memory."""

    def __init__(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK)
        self.memory = [[-1] * BLOCK for _ in range(num_blocks)]
        self.clock = 0

    def write(self, table: Table, start: int, count: int) -> None:
        """Write positions [start, start + count), and no more than fit."""
        end = start + count
        if self.manager.missing(table.blocks, start, end) > self.manager.num_free:
            return
        for source, destination in self.manager.reserve(table.blocks, start, end):
            self.memory[destination] = list(self.memory[source])
        del table.contents[start:]
        for position in range(start, end):
            self.clock += 1
            self.memory[table.blocks[position // BLOCK]][position % BLOCK] = self.clock
            table.contents.append(self.clock)

    def read(self, table: Table) -> list[int]:
        return [self.memory[table.blocks[p // BLOCK]][p % BLOCK] for p in range(len(table.contents))]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["new", "append", "fork", "rollback", "free"]), st.integers(0, 7), st.integers(1, 9)), max_size=60
)


@settings(max_examples=150)
@given(actions=ACTIONS, num_blocks=st.integers(1, 24))
def test_tables_never_see_each_others_writes_and_the_pool_returns_to_full(
    actions: list[tuple[str, int, int]], num_blocks: int
) -> None:
    pool = Pool(num_blocks)
    tables: list[Table] = []
    for action, which, count in actions:
        table = tables[which % len(tables)] if tables else None
        if action == "new" or table is None:
            tables.append(Table([], []))
        elif action == "append":
            pool.write(table, len(table.contents), count)
        elif action == "fork":
            tables.append(Table(pool.manager.fork(table.blocks), list(table.contents)))
        elif action == "rollback":  # what a rejected draft does
            del table.contents[max(0, len(table.contents) - count) :]
            pool.manager.truncate(table.blocks, len(table.contents))
        else:
            pool.manager.truncate(table.blocks, 0)
            tables.remove(table)
        for other in tables:
            assert pool.read(other) == other.contents
        held = {block for other in tables for block in other.blocks}
        assert pool.manager.num_free == num_blocks - len(held)
    for table in tables:
        pool.manager.truncate(table.blocks, 0)
    assert pool.manager.num_free == num_blocks


def test_only_the_block_that_is_written_is_copied() -> None:
    manager = BlockManager(10, BLOCK)
    leader: list[int] = []
    manager.reserve(leader, 0, 10)  # two full blocks and half of a third
    follower = manager.fork(leader)
    assert manager.num_free == 7
    copies = manager.reserve(follower, 10, 11)
    assert [(c.source, c.destination) for c in copies] == [(leader[2], follower[2])]
    assert follower[:2] == leader[:2] and follower[2] != leader[2]
    assert manager.reserve(leader, 10, 11) == []  # it is the last holder: it writes in place


def test_the_last_holder_of_a_full_last_block_needs_no_copy() -> None:
    manager = BlockManager(4, BLOCK)
    leader: list[int] = []
    manager.reserve(leader, 0, 8)
    follower = manager.fork(leader)
    assert manager.missing(follower, 8, 9) == 1
    assert manager.reserve(follower, 8, 9) == []
    assert follower[:2] == leader
