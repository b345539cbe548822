"""The stream of windows and moves between real processes: equal decisions, late, stopped and dead peers."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import RankPool

from erollout.config import CoordinatorConfig
from erollout.coordinator.exchange import Exchange, News, Stream, decode, encode, parcel_width
from erollout.coordinator.occupancy import CURVE_BATCHES, Occupancy
from erollout.coordinator.state_machine import ClusterDecision, StateMachine
from erollout.types import PartialRollout

MAX_TOKENS = 16
QUICK: dict[str, Any] = {"window_seconds": 0.01, "stall_seconds": 25.0}
PATIENCE = 60.0


def partial(index: int, length: int) -> PartialRollout:
    ids = tuple(range(index, index + length))
    mask = tuple(i % 2 for i in ids)
    return PartialRollout(index, index % 3, ids, tuple(-i / 7 for i in ids), tuple(-i / 3 for i in ids), loss_mask=mask)


@pytest.mark.parametrize("lengths", [(), (0,), (MAX_TOKENS, 0, 5)])
def test_sequences_survive_the_way(lengths: tuple[int, ...]) -> None:
    width = parcel_width(MAX_TOKENS)
    partials = [partial(index, length) for index, length in enumerate(lengths)]
    parcel = encode(partials, 4, width)
    assert len(parcel) == 1 + 4 * width
    assert decode(parcel, width) == partials


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Replica:
    """Samples one token of every sequence per step; step times are slept."""

    def __init__(self, prompts: int, group_size: int, slots: int, options: CoordinatorConfig) -> None:
        machine = StateMachine(options, dist.get_world_size(), prompts, group_size, slots, (), MAX_TOKENS)
        self.exchange = Exchange(world(), machine, 1, MAX_TOKENS, options, PATIENCE)
        self.group_size, self.slots = group_size, slots
        self.finished: list[tuple[int, int]] = []
        self.queue: list[list[int]] = []
        """[prompt, sample, tokens left] of what is to be completed here."""
        self.decisions: list[ClusterDecision] = []
        self.carry_out(self.exchange.decision)

    def carry_out(self, decision: ClusterDecision) -> None:
        self.decisions.append(decision)
        for prompt in self.exchange.machine.mine(decision, self.exchange.replica):
            self.queue += [[prompt, sample, 1 + prompt % 7] for sample in range(self.group_size)]

    def occupancy(self) -> Occupancy:
        running = min(len(self.queue), self.slots)
        curve = tuple(0.001 for _ in CURVE_BATCHES)
        return Occupancy(
            running=running,
            waiting=len(self.queue) - running,
            finished=len(self.finished),
            claimed=self.exchange.machine.claimed,
            seconds_per_token=(0.001,),
            curve=curve,
        )

    def take_in(self, news: News) -> None:
        if news.decision is not None:
            self.carry_out(news.decision)
        if news.release:
            leaving, self.queue = self.queue[: news.release], self.queue[news.release :]
            self.exchange.give([PartialRollout(p, s, (0,) * left, (0.0,) * left, (0.0,) * left) for p, s, left in leaving])
        self.queue += [[a.prompt_index, a.sample_index, len(a.response_ids)] for a in news.arrivals]

    def step(self) -> None:
        for sequence in self.queue[: self.slots]:
            sequence[2] -= 1
        self.finished += [(prompt, sample) for prompt, sample, left in self.queue if not left]
        self.queue = [sequence for sequence in self.queue if sequence[2]]


def run(replica: Replica, step_seconds: float, deadline: float) -> None:
    while not replica.exchange.has_ended:
        assert time.monotonic() < deadline, "the rollout does not end"
        replica.take_in(replica.exchange.poll(replica.occupancy))
        if replica.queue:
            replica.step()
        time.sleep(step_seconds)


def rollout(prompts: int, slow: dict[int, float], options: CoordinatorConfig) -> dict[str, Any]:
    replica = Replica(prompts, 2, 4, options)
    run(replica, slow.get(dist.get_rank(), 0.002), time.monotonic() + 60)
    exchange = replica.exchange
    return {"finished": replica.finished, "decisions": replica.decisions, "windows": exchange.windows}


def check_complete(results: list[dict[str, Any]], prompts: int) -> None:
    """Every sample once, and one history of decisions."""
    finished = sorted(place for result in results for place in result["finished"])
    assert finished == [(prompt, sample) for prompt in range(prompts) for sample in range(2)]
    assert all(result["decisions"] == results[0]["decisions"] for result in results)
    assert [decision.epoch for decision in results[0]["decisions"]] == list(range(results[0]["windows"] + 1))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 8])
def test_replicas_share_a_rollout(rank_pool: RankPool, world_size: int) -> None:
    options = CoordinatorConfig(**QUICK)
    results = rank_pool.run(world_size, rollout, 40, {}, options)
    check_complete(results, 40)
    assert all(result["finished"] for result in results)


@pytest.mark.distributed
def test_a_slow_replica_gets_less(rank_pool: RankPool) -> None:
    options = CoordinatorConfig(**QUICK)
    results = rank_pool.run(3, rollout, 60, {2: 0.1}, options)
    check_complete(results, 60)
    assert len(results[2]["finished"]) < max(len(result["finished"]) for result in results) / 2


def no_one_waits(folder: Path) -> tuple[bool, list[float], str | None]:
    """Rank 0 posts once the others, who look often, have called it late: who has called others so, and what all get."""
    rank = dist.get_rank()
    called_late = [folder / str(other) for other in (1, 2)]
    stream = Stream(world(), 0.1 if rank else 30.0, PATIENCE)
    while rank == 0 and not all(file.exists() for file in called_late):
        time.sleep(0.01)
    stream.gather([float(rank)])
    result, was_stalled = None, False
    while result is None:
        result = stream.poll()
        if stream.is_stalled and not was_stalled:
            was_stalled = True
            (folder / str(rank)).touch()
        time.sleep(0.001)
    assert stream.is_free and not stream.is_stalled
    return was_stalled, list(result), stream.error


@pytest.mark.distributed
def test_who_waits_for_a_late_peer_knows_it(rank_pool: RankPool, tmp_path: Path) -> None:
    results = rank_pool.run(3, no_one_waits, tmp_path)
    assert [stalled for stalled, _, _ in results] == [False, True, True]
    assert all(values == [0.0, 1.0, 2.0] and error is None for _, values, error in results)
