"""What ends a run before it is spoilt: replicas that differ, and updates that are not finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure
from tiny_runs import history, tiny_tree, train_here

from erollout.errors import UserError
from erollout.policy.integrity import checksums, require_equal_replicas

pytestmark = pytest.mark.distributed


def _flip_a_bit(on_rank: int) -> tuple[str, str]:
    """What is said before and after one rank's memory changed."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    tensors = {"embedding": torch.ones(4, 3), "norm": torch.linspace(-1, 1, 7).bfloat16()}
    said = []
    for step in (1, 2):
        try:
            require_equal_replicas(tensors, step)
            said.append("")
        except UserError as error:
            said.append(str(error))
        if dist.get_rank() == on_rank:
            tensors["norm"].view(torch.int16)[3] ^= 1
    return said[0], said[1]


def test_a_flipped_bit_is_found_on_all_ranks(rank_pool) -> None:
    for before, after in rank_pool.run(3, _flip_a_bit, 2):
        assert before == "" and "norm of rank 2 is not that of the others among 0, 1, 2" in after and "after step 2" in after


def test_of_two_replicas_none_is_blamed(rank_pool) -> None:
    for _, after in rank_pool.run(2, _flip_a_bit, 1):
        assert "norm of rank 0, 1, and no majority" in after


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_counts(dtype: torch.dtype, offset: int) -> None:
    tensor = torch.randn(15 + offset).to(dtype)[offset:]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    before = checksums({"x": tensor}).item()
    for place in (7, 14):
        for bit in range(8 * tensor.element_size() - 1):
            tensor.view(integers)[place] ^= 1 << bit
            assert checksums({"x": tensor}).item() != before
            tensor.view(integers)[place] ^= 1 << bit
    assert checksums({"x": tensor}).item() == before


def train_with_a_flipped_bit(tree: dict[str, Any]) -> None:
    """A run in which a bit of the second rank's parameters turns over in the first step's update."""
    from erollout.policy.actor import Actor

    update = Actor.update

    def corrupt(self: Actor, *args: Any) -> Any:
        metrics = update(self, *args)
        if dist.get_rank() == 1:
            next(iter(self.local_tensors().values())).view(torch.int32)[..., 0] ^= 1
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actor, "update", corrupt)
        train_here(tree)


@pytest.mark.parametrize(("interval", "saves"), [(1, 0), (1000, 1)], ids=["while training", "before a checkpoint"])
def test_replicas_are_compared(interval: int, saves: int, rank_pool, tmp_path: Path) -> None:
    tree = tiny_tree(
        tmp_path,
        fault_tolerance={"checksum_interval": interval},
        parallel={"world_size": 2},
        checkpoint={"interval": saves},
        speculation={"mode": "off"},
    )
    with pytest.raises(RankFailure, match="after step 1"):
        rank_pool.run(2, train_with_a_flipped_bit, tree)
    assert not list((tmp_path / "run").glob("checkpoints/step_*/manifest.json"))


UNBOUNDED: dict[str, Any] = {
    "rewards": {"function": "toy_scorer:enormous", "timeout_seconds": 100.0},
    "algorithm": {"normalize_advantages": False},
}
"""A run whose gradient's norm is not finite; the loss is."""


@pytest.mark.parametrize("is_distributed", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_checkpoint_from_before_the_first_update_that_counts(is_distributed: bool, rank_pool, tmp_path: Path) -> None:
    """The optimizer has no state yet, though steps were done."""
    tree = tiny_tree(
        tmp_path,
        **UNBOUNDED,
        train={"steps": 1},
        checkpoint={"interval": 1},
        optimizer={"use_distributed_optimizer": is_distributed},
    )
    rank_pool.run(1, train_here, tree)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000001"]
    tree["train"]["steps"], tree["algorithm"] = 3, {}
    tree["rewards"]["function"] = "toy_scorer:share_of_digits"
    rank_pool.run(1, train_here, tree)
    rows = history(tmp_path)
    assert [row["train/update_skipped"] for row in rows] == [1, 0, 0]
    assert rows[1]["train/learning_rate"] == rows[0]["train/learning_rate"], "a skipped update is none of the schedule's"
    tree["train"]["steps"] = 4
    rank_pool.run(1, train_here, tree)
    assert history(tmp_path)[-1]["step"] == 4


def test_updates_that_are_never_finite_end_the_run(rank_pool, tmp_path: Path) -> None:
    """The loss is finite, the gradient's norm is not."""
    tree = tiny_tree(tmp_path, **UNBOUNDED, fault_tolerance={"max_nonfinite_steps": 2}, train={"steps": 3})
    with pytest.raises(RankFailure, match=r"max_nonfinite_steps = 2: loss or gradient of the last 2 updates, up to step 2"):
        rank_pool.run(1, train_here, tree)
    (row,) = history(tmp_path)
    assert row["train/update_skipped"] == 1 and row["train/nonfinite_in_a_row"] == 1
    (kept,) = (tmp_path / "run" / "nonfinite").iterdir()
    batch = json.loads(kept.read_text())
    assert kept.name == "step_00000002.rank_00000.json" and len(batch["samples"]) == 16
    assert batch["samples"][0]["response_ids"] and batch["metrics"]["update_skipped"] == 1
