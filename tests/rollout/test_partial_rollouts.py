"""Rollouts that end before their time and go on later, elsewhere: every token and log-prob as if nothing had happened."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool
from test_engine import by_sample
from test_engine import make_requests as three_groups
from test_replica_control import ADAPTIVE, GROUP_SIZE, OFF_MODE, PATIENCE, SLOTS, Costs, Recorder, expected, make_requests
from test_speculative_engine import check_pool
from tiny_speculation import DRAFTER, make_speculative_engine

from erollout.config import CoordinatorConfig
from erollout.configuration.speculation import SpeculationConfig
from erollout.coordinator.exchange import Exchange
from erollout.coordinator.state_machine import StateMachine
from erollout.engine.engine import Engine
from erollout.engine.orders import Orders
from erollout.rollout.control import AgreedControl, ReplicaControl
from erollout.rollout.partial import PartialRollouts, as_partial, fitting, merge_samples
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle
from erollout.types import PartialRollout, Prompt, Rollout, RolloutRequest, SamplingParams

REQUESTS = three_groups(SamplingParams(repetition_penalty=1.2, max_tokens=24, stop_token_ids=(3, 5, 8)))


@dataclass
class Interrupting:
    """The same arm at every step, and the end before step `steps`."""

    arm: Arm
    steps: int
    calls: int = 0

    def orders(self, load: Load) -> Orders:
        self.calls += 1
        return Orders(self.arm, is_last=True, interrupts=self.calls > self.steps)

    def released(self, partials: list[PartialRollout]) -> None:
        raise AssertionError("nothing was to be released")

    def observe(self, outcome: StepOutcome) -> None:
        pass


@cache
def _engine(**rollout: int) -> Engine:
    return make_speculative_engine("good", "coupled", 3, **rollout)


def _completed(kept: PartialRollouts, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    return kept.completed({r.prompt_index: Prompt(r.prompt_index, r.prompt_ids, "", "") for r in requests}, 1)


@settings(max_examples=20)
@given(
    attempts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    arm=st.sampled_from([OFF, Arm(DRAFTER, 3)]),
    limits=st.sampled_from([{}, {"num_kv_blocks": 13}, {"max_num_batched_tokens": 30}, {"max_num_seqs": 2}]),
)
def test_an_interrupted_rollout_goes_on_to_the_same_samples(attempts: list[int], arm: Arm, limits: dict[str, int]) -> None:
    """Wherever it is interrupted, however often, with preempted, queued and half computed sequences."""
    engine = _engine(**limits)
    kept = merge_samples(REQUESTS, ())
    tokens = 0
    for steps in [*attempts, 1000]:
        done = engine.run(Interrupting(arm, steps), requests=kept.resume(REQUESTS))
        check_pool(engine)
        tokens += engine.stats.decode_tokens
        assert not {(r.prompt_index, r.sample_index) for r in done} & {
            (s.prompt_index, s.sample_index) for s in [*kept.finished, *engine.left]
        }
        kept = merge_samples(REQUESTS, [*kept.samples, *engine.left, *map(as_partial, done)])
        assert kept.num_tokens == tokens, "a token was lost or sampled twice"
        kept = PartialRollouts.from_bytes(kept.to_bytes())
    assert engine.left == [] and kept.begun == []
    assert by_sample(_completed(kept, REQUESTS)) == _whole()


@cache
def _whole() -> dict[tuple[int, int], tuple[Any, ...]]:
    return by_sample(make_speculative_engine("good", "coupled", 3).generate(REQUESTS))


def test_one_replica_stops_at_the_step_at_which_it_is_asked() -> None:
    lengths = [12, 9, 6]
    asked: list[int] = []
    toggle = Toggle(SpeculationConfig(), (), Costs())
    toggle.begin_rollout(True)
    control = ReplicaControl(make_requests(lengths), SLOTS, toggle, None, stop_requested=lambda: len(asked) >= 5)
    engine = _engine()
    done = engine.run(Recorder(control, [], asked))
    assert engine.stats.steps == 5 and control.interrupted and len(done) + len(engine.left) <= len(lengths) * GROUP_SIZE
    assert {len(partial.response_ids) for partial in engine.left} == {5}


def test_a_rollout_that_is_complete_is_not_interrupted() -> None:
    toggle = Toggle(SpeculationConfig(), (), Costs())
    toggle.begin_rollout(True)
    requests = merge_samples(make_requests([4]), [_finished(0), _finished(1)]).resume(make_requests([4]))
    control = ReplicaControl(requests, SLOTS, toggle, None, stop_requested=lambda: True)
    assert _engine().run(control) == [] and not control.interrupted


def _finished(sample: int) -> PartialRollout:
    return PartialRollout(100, sample, (5,), (-1.0,), (-1.0,), "stop")


def test_samples_of_other_requests_are_not_used() -> None:
    kept = merge_samples(make_requests([4]), [_finished(0)])
    assert fitting(kept, make_requests([4]), 7) is kept
    assert fitting(kept, make_requests([5]), 7).samples == () == fitting(None, make_requests([4]), 7).samples


def attempt(
    lengths: Sequence[int],
    coordinator: dict[str, Any],
    speculation: dict[str, Any],
    asked: int,
    kept: PartialRollouts,
    tensor: int = 1,
) -> tuple[list[Rollout], list[PartialRollout], bool]:
    """One rank's part of a rollout, whose replicas' leaders are asked to stop after so many steps (rank 0 alone at once,
    where they are negative): what is complete here, what is left, and whether it was interrupted."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + tensor))) for first in range(0, world, tensor)]
    leaders = dist.new_group(list(range(0, world, tensor)))
    group = groups[rank // tensor] if tensor > 1 else None
    requests = kept.resume(make_requests(lengths))
    options, speculation_options = CoordinatorConfig(**coordinator), SpeculationConfig(**speculation)
    toggle = Toggle(speculation_options, () if speculation_options.mode == "off" else (DRAFTER,), Costs())
    leader, steps = None, []
    if rank % tensor == 0:
        counts = world // tensor, len(lengths), GROUP_SIZE, SLOTS
        machine = StateMachine(options, *counts, lengths, max(lengths), len(kept.finished))
        exchange = Exchange(leaders, machine, len(toggle.arms), max(lengths), options, PATIENCE)
        toggle.begin_rollout(True)

        def is_asked() -> bool:
            return len(steps) >= asked if asked >= 0 else rank == 0

        leader = ReplicaControl(requests, SLOTS, toggle, exchange, options.lock_step, is_asked)
    agreed = AgreedControl(leader, group, toggle.arms, requests, speculation_options.decision_interval)
    engine = make_speculative_engine("good", "coupled", 2, group, max_num_seqs=SLOTS)
    dist.barrier()
    rollouts = engine.run(Recorder(agreed, [], steps))
    return rollouts, engine.left, leader is None or leader.interrupted


LENGTHS = [60, 6, 40, 8] * 3
NEVER = 10**9


def _everything(
    lengths: Sequence[int], parts: Sequence[tuple[list[Rollout], list[PartialRollout], bool]]
) -> list[PartialRollout]:
    assert all(interrupted for _, _, interrupted in parts)
    return [sample for rollouts, left, _ in parts for sample in [*left, *map(as_partial, rollouts)]]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("coordinator", "speculation", "asked"),
    [
        ({"policy": "makespan", "window_seconds": 0.005, "stall_seconds": 25.0}, OFF_MODE, 20),
        ({"policy": "makespan", "window_seconds": 0.005, "stall_seconds": 25.0}, ADAPTIVE, -1),
        ({"policy": "cluster", "lock_step": True, "dispatch": "static", "stall_seconds": 25.0}, ADAPTIVE, 20),
    ],
    ids=["moves", "one-asked", "lock-step"],
)
def test_replicas_stop_together_and_another_number_of_them_goes_on(
    coordinator: dict[str, Any], speculation: dict[str, Any], asked: int, rank_pool: RankPool
) -> None:
    requests = make_requests(LENGTHS)
    first = rank_pool.run(3, attempt, LENGTHS, coordinator, speculation, asked, merge_samples(requests, ()))
    kept = merge_samples(requests, _everything(LENGTHS, first))
    assert len(kept.finished) < len(LENGTHS) * GROUP_SIZE and (kept.begun or asked < 0)
    second = rank_pool.run(2, attempt, LENGTHS, coordinator, speculation, 5, kept)
    kept = merge_samples(requests, [*kept.samples, *_everything(LENGTHS, second)])
    last = rank_pool.run(2, attempt, LENGTHS, coordinator, speculation, NEVER, kept)
    assert not any(left or interrupted for _, left, interrupted in last)
    rollouts = [rollout for part, _, _ in last for rollout in part]
    assert len(rollouts) == len(LENGTHS) * GROUP_SIZE - len(kept.finished), "a complete sample was sampled again"
    assert by_sample(rollouts + _completed(kept, requests)) == expected(LENGTHS)


@pytest.mark.distributed
@pytest.mark.parametrize("interval", [1, 3])
def test_ranks_of_a_replica_stop_at_the_same_step(interval: int, rank_pool: RankPool) -> None:
    requests = make_requests(LENGTHS)
    coordinator, speculation = {"window_seconds": 0.005, "stall_seconds": 25.0}, {**ADAPTIVE, "decision_interval": interval}
    parts = rank_pool.run(4, attempt, LENGTHS, coordinator, speculation, 20, merge_samples(requests, ()), 2)
    assert parts[0] == parts[1] and parts[2] == parts[3] and (parts[0][1] or parts[2][1])
    kept = merge_samples(requests, _everything(LENGTHS, parts))
    last = rank_pool.run(4, attempt, LENGTHS, coordinator, speculation, NEVER, kept, 2)
    assert last[0][:2] == last[1][:2] and last[2][:2] == last[3][:2]
    samples = by_sample([rollout for part, _, _ in last for rollout in part] + _completed(kept, requests))
    assert {place: sample[0] for place, sample in samples.items()} == {
        place: sample[0] for place, sample in expected(LENGTHS).items()
    }
