import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads: several on few cores are ten times slower

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """`rank_pool.run(world_size, function, *args)`: a function on every rank of a real gloo world."""
    pool = RankPool()
    yield pool
    pool.close()
