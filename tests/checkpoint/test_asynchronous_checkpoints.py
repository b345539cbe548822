"""Checkpoints that a thread writes while training goes on: the same as others, whatever comes in between."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from test_resume import failing_train
from tiny_runs import sft_here, tiny_tree, train_here

from erollout.checkpoint.manifest import complete_checkpoints, damage
from erollout.checkpoint.writing import Writing

DELAY = 0.5
"""Seconds in which several steps of the tiny model change what is being saved."""


class _LateWriting(Writing):
    def _write(self, buckets: Sequence[Any]) -> None:
        time.sleep(DELAY)
        super()._write(buckets)


def with_late_writers(run: Any, tree: dict[str, Any]) -> Any:
    """For RankPool.run."""
    from erollout.checkpoint import checkpointer

    checkpointer.Writing = _LateWriting  # type: ignore[misc]
    try:
        return run(tree)
    finally:
        checkpointer.Writing = Writing  # type: ignore[misc]


def _tree(folder: Path, asynchronous: bool, **sections: Any) -> dict[str, Any]:
    checkpoint = {"interval": 2, "keep_last": 9, "asynchronous": asynchronous}
    return tiny_tree(folder, checkpoint=checkpoint, supervised={"steps": 5, "batch_size": 4}, **sections)


def _shards(folder: Path) -> dict[str, bytes]:
    found = complete_checkpoints(folder / "run" / "checkpoints")
    return {str(path.relative_to(folder)): path.read_bytes() for place in found for path in place.glob("*.distcp")}


@pytest.mark.distributed
@pytest.mark.parametrize("distributed_optimizer", [True, pytest.param(False, marks=pytest.mark.full)])
def test_what_is_saved_is_of_its_step(distributed_optimizer: bool, rank_pool: RankPool, tmp_path: Path) -> None:
    optimizer = {"use_distributed_optimizer": distributed_optimizer}
    for name, asynchronous in (("plain", False), ("late", True)):
        (tmp_path / name).mkdir()
        rank_pool.run(2, with_late_writers, sft_here, _tree(tmp_path / name, asynchronous, optimizer=optimizer))
    plain, late = _shards(tmp_path / "plain"), _shards(tmp_path / "late")
    assert {Path(name).parent.name for name in plain} == {"step_00000002", "step_00000004", "step_00000005"}
    assert plain == late and len(set(plain.values())) == len(plain)
    for place in complete_checkpoints(tmp_path / "late" / "run" / "checkpoints"):
        assert damage(place) is None


@pytest.mark.distributed
def test_a_reinforcement_learning_run_has_its_last_checkpoint_when_it_ends(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, with_late_writers, train_here, _tree(tmp_path, True, train={"steps": 2}))
    (place,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert damage(place) is None


@pytest.mark.distributed
def test_a_write_that_fails_is_every_ranks_error(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, train_here, _tree(tmp_path, False, train={"steps": 2}))
    before = _shards(tmp_path)
    limit = max(map(len, before.values())) // 5
    messages = rank_pool.run(2, failing_train, _tree(tmp_path, True, train={"steps": 4}), limit)
    for message in messages:
        assert "can't save checkpoint" in message and "step_00000004" in message and "\n" not in message
    assert _shards(tmp_path) == before
