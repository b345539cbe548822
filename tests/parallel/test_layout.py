"""Rank arithmetic against Megatron's own groups."""

import pytest
from ranks import RankPool

from erollout.errors import UserError
from erollout.parallel.layout import DecodeLayout, TrainLayout, even_slice

WORLD = 4
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]


def _megatron_coordinates(splits: list[tuple[int, int]]) -> list[tuple[tuple[int, int, int], list[int]]]:
    """For each (tensor, pipeline): this rank's (tensor, data, pipeline) in parallel_state, and its model replica."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    answers = []
    for tensor, pipeline in splits:
        parallel_state.initialize_model_parallel(tensor, pipeline)
        coordinates = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        answers.append((coordinates, sorted(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))))
        parallel_state.destroy_model_parallel()
    return answers


@pytest.mark.distributed
def test_ranks_are_in_megatrons_order(rank_pool: RankPool) -> None:
    by_rank = rank_pool.run(WORLD, _megatron_coordinates, SPLITS)
    for index, (tensor, pipeline) in enumerate(SPLITS):
        layout = TrainLayout(WORLD, tensor, pipeline)
        for rank in range(WORLD):
            coordinates, replica = by_rank[rank][index]
            assert layout.coordinates(rank) == coordinates, (layout, rank)
            assert sorted(layout.model_replica(coordinates[1])) == replica, (layout, rank)


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(1, 1, 1), (8, 2, 2), (12, 3, 2), (16, 2, 4), (6, 1, 1)])
def test_rank_and_coordinates_are_inverse(world: int, tensor: int, pipeline: int) -> None:
    layout = TrainLayout(world, tensor, pipeline)
    assert layout.data * tensor * pipeline == world
    grid = [(t, d, p) for p in range(pipeline) for d in range(layout.data) for t in range(tensor)]
    assert [layout.coordinates(rank) for rank in range(world)] == grid
    assert [layout.rank(*place) for place in grid] == list(range(world))
    assert sorted(rank for data in range(layout.data) for rank in layout.model_replica(data)) == list(range(world))


def test_a_model_replica_is_ordered_by_stage() -> None:
    assert TrainLayout(8, 2, 2).model_replica(1) == (2, 3, 6, 7)


def test_decode_replicas_are_consecutive_ranks() -> None:
    layout = DecodeLayout(6, 2)
    assert layout.replicas == 3
    assert [layout.ranks(replica) for replica in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert [layout.replica(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [layout.tensor_rank(rank) for rank in range(6)] == [0, 1] * 3


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (2, 3), (8, 1), (0, 1)])
def test_a_training_layout_must_divide_the_world(tensor: int, pipeline: int) -> None:
    with pytest.raises(UserError, match=rf"pipeline_model_parallel_size = {tensor * pipeline} .*world of 4 ranks"):
        TrainLayout(4, tensor, pipeline)


def test_a_decode_layout_must_divide_the_world() -> None:
    with pytest.raises(UserError, match=r"rollout.tensor_model_parallel_size = 3 .*world of 4 ranks"):
        DecodeLayout(4, 3)


def test_even_slices() -> None:
    assert [even_slice(6, 3, part, "size") for part in range(3)] == [(0, 2), (2, 4), (4, 6)]
    with pytest.raises(UserError, match="the width = 7 can't be split over 2"):
        even_slice(7, 2, 0, "the width")
