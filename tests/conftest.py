from collections.abc import Iterator

import pytest
from ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """`rank_pool.run(world_size, function, *args)`: a function on every rank of a real gloo world."""
    pool = RankPool()
    yield pool
    pool.close()
