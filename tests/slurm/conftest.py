"""A real Slurm cluster for the tests of this folder, or a reason why there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankPool
from slurm_runs import AT_ONCE, INTERVAL, STEPS, Cluster, Run, Unavailable
from tiny_runs import train_here


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes with four GPUs each that are none. It ends with this process, however that ends."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
    except Unavailable as reason:
        pytest.skip(f"no Slurm cluster on this machine: {reason}")
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with no jobs and all nodes up, before and after."""
    yield started_cluster
    started_cluster.restore()


@pytest.fixture
def nodes(cluster: Cluster) -> Cluster:
    """A cluster whose nodes have networks and mounts of their own."""
    if cluster.is_flat:
        pytest.skip("namespaces can't be made here (neither root nor user namespaces): all nodes share this host")
    return cluster


@pytest.fixture(scope="session")
def unbroken(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was never disturbed, on two ranks of this process's own."""
    run = Run(tmp_path_factory.mktemp("unbroken"), STEPS, rewards=AT_ONCE)
    rank_pool.run(2, train_here, run.tree)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """To be submitted, and disturbed."""
    return Run(tmp_path / "it", STEPS, INTERVAL)
