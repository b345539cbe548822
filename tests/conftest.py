import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads: several on few cores are ten times slower

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests in the background of a script: what they start must hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep only each n-th case of a table marked `quick(every=n)` for `make test`."""
    seen: dict[str, int] = {}
    for item in items:
        if mark := item.get_closest_marker("quick"):
            table = item.nodeid.partition("[")[0]
            if seen.setdefault(table, 0) % mark.kwargs["every"]:
                item.add_marker("full")
            seen[table] += 1


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """`rank_pool.run(world_size, function, *args)`: a function on every rank of a real gloo world."""
    pool = RankPool()
    yield pool
    pool.close()
