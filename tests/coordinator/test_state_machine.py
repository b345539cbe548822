"""The cluster's decisions over windows of occupancies: who samples what, in which arm, and when the rollout is over."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erollout.config import CoordinatorConfig
from erollout.coordinator.occupancy import CURVE_BATCHES, Occupancy
from erollout.coordinator.state_machine import ClusterDecision, StateMachine

CURVE = tuple(0.01 + 0.001 * batch for batch in CURVE_BATCHES)


def machine(
    options: CoordinatorConfig | None = None, replicas: int = 2, prompts: int = 12, group_size: int = 2, slots: int = 4
) -> StateMachine:
    options = options or CoordinatorConfig(policy="replica")
    return StateMachine(options, replicas, prompts, group_size, slots, (10, 20, 30), 64)


def busy(running: int = 0, waiting: int = 0, **values: object) -> Occupancy:
    return Occupancy(running=running, waiting=waiting, curve=CURVE, **values)  # type: ignore[arg-type]


def test_vectors_hold_every_field() -> None:
    occupancy = Occupancy(3, 1, 4, 5, 7, 2, 1, 11, 33, 22, 100.5, 33.25, 1.5, 1e-4, (0.1, inf), CURVE)
    vector = occupancy.to_vector()
    assert all(isinstance(value, float) for value in vector)
    again = Occupancy.from_vector(vector, num_arms=2)
    assert again == occupancy
    assert [type(v) for v in (again.steps, again.context, again.claimed, again.seconds)] == [int, float, int, float]
    assert len(vector) == len(Occupancy(seconds_per_token=(0.0, 0.0), curve=CURVE).to_vector())
    assert occupancy.outstanding == 9


def test_static_dispatch_gives_everything_at_once() -> None:
    static = machine(CoordinatorConfig(policy="replica", dispatch="static"), prompts=7)
    assert static.start() == ClusterDecision(0, None, ((0, 2, 4, 6), (1, 3, 5)))
    assert static.advance([busy(4, 4), busy(4, 2)]) == ClusterDecision(1)
    assert static.claim(0) is None


def test_dynamic_dispatch_fills_the_slots_and_one_more() -> None:
    assert machine(prompts=12).start().dispatched == ((0, 2, 4), (1, 3, 5))
    assert machine(prompts=4).start().dispatched == ((0, 2), (1, 3)), "few prompts are spread evenly"
    assert machine(prompts=3, replicas=4).start().dispatched == ((0,), (1,), (2,), ())
    assert machine(prompts=12, group_size=8).start().dispatched == ((0, 2), (1, 3))


def test_the_rest_goes_to_who_is_free_first() -> None:
    dynamic = machine(prompts=9)
    dynamic.start()
    assert dynamic.advance([busy(4, 1), busy(4, 2)]).dispatched == (), "a reserve of one prompt is enough"
    assert dynamic.advance([busy(4, 0, finished=2), busy(4, 2)]).dispatched == ((6, 7), ()), "more where they end quickly"
    assert dynamic.advance([busy(4, 4, finished=2), busy(1, 0, finished=5)]).dispatched == ((), (8,))
    assert dynamic.advance([busy(1), busy(1)]).dispatched == ()


def test_the_last_prompt_goes_to_the_faster_of_two_full_replicas() -> None:
    for slow in (0, 1):
        dynamic = machine(prompts=7)
        dynamic.start()
        window = [busy(4, 0), busy(4, 0)]
        window[slow] = replace(window[slow], curve=tuple(2 * seconds for seconds in CURVE))
        expected = [(6,), (6,)]
        expected[slow] = ()
        assert dynamic.advance(window).dispatched == tuple(expected)


def test_the_last_prompts_are_shared() -> None:
    dynamic = machine(prompts=9)
    dynamic.start()
    assert dynamic.advance([busy(1), busy(2)]).dispatched == ((6, 8), (7,))


def test_the_end_is_when_nobody_has_anything_left() -> None:
    dynamic = machine(prompts=7)
    dynamic.start()
    assert not dynamic.advance([busy(), busy(finished=6)]).finished, "the last prompt is handed out only now"
    assert not dynamic.advance([busy(1, 1, finished=6), busy(finished=6)]).finished
    assert not dynamic.advance([busy(0, 1, finished=7), busy(finished=6)]).finished, "what waits counts"
    assert dynamic.advance([busy(finished=8), busy(finished=6)]) == ClusterDecision(4, None, finished=True)
    assert machine(prompts=0).advance([busy(), busy()]).finished


def test_lost_responses_are_noticed() -> None:
    static = machine(CoordinatorConfig(dispatch="static"), prompts=2)
    static.start()
    with pytest.raises(AssertionError, match="1 responses were lost"):
        static.advance([busy(finished=2), busy(finished=1)])


def test_a_replica_that_is_asked_to_stop_stops_all_of_them() -> None:
    dynamic = machine()
    dynamic.start()
    assert not dynamic.advance([busy(4, 2), busy(4, 2)]).is_last
    stopped = dynamic.advance([busy(4, 2), busy(0, 0, stop_requested=1)])
    assert stopped == ClusterDecision(2, interrupted=True) and stopped.is_last
    complete = machine(CoordinatorConfig(dispatch="static"), prompts=2)
    complete.start()
    assert complete.advance([busy(finished=2, stop_requested=1), busy(finished=2)]) == ClusterDecision(1, finished=True)


def test_what_an_earlier_attempt_completed_is_not_missed() -> None:
    static = StateMachine(CoordinatorConfig(dispatch="static"), 2, 2, 2, 4, (), 64, num_done=3)
    static.start()
    assert static.advance([busy(finished=1), busy()]).finished


def test_claims_come_from_the_end_of_the_home_and_are_not_handed_out() -> None:
    here, there = machine(prompts=12), machine(prompts=12)
    for each in (here, there):
        each.start()
    assert [here.claim(1), here.claim(1)] == [11, 9] and here.claimed == 2
    assert [there.claim(0), there.claim(0), there.claim(0), there.claim(0)] == [10, 8, 6, None] and there.claimed == 3
    window = [busy(0, 0, claimed=3), busy(0, 0, claimed=2)]
    decisions = [each.advance(window) for each in (here, there)]
    assert decisions[0] == decisions[1]
    assert sorted(p for prompts in decisions[0].dispatched for p in prompts) == [7]


def test_a_claim_that_the_window_does_not_show_is_sampled_twice_unless_handed_to_the_claimer() -> None:
    here, there = machine(prompts=7, replicas=2), machine(prompts=7, replicas=2)
    for each in (here, there):
        each.start()
    assert here.claim(0) == 6
    to_me = [busy(0, 0), busy(4, 2)]  # taken before the claim
    decision = here.advance(to_me)
    assert decision.dispatched == ((6,), ()) and here.mine(decision, 0) == ()
    decision = there.advance([busy(4, 2), busy(0, 0)])
    assert decision.dispatched == ((), (6,)) and there.mine(decision, 1) == (6,)
    assert not there.advance([busy(0, 2, finished=6, claimed=1), busy(0, 0, finished=8)]).finished
    assert there.advance([busy(finished=8, claimed=1), busy(finished=8)]).finished


@given(
    st.integers(1, 6),
    st.integers(0, 40),
    st.integers(1, 4),
    st.integers(1, 8),
    st.data(),
)
@settings(max_examples=200)
def test_every_prompt_is_handed_out_once_and_loads_stay_even(
    replicas: int, prompts: int, group: int, slots: int, data: st.DataObject
) -> None:
    dynamic = machine(replicas=replicas, prompts=prompts, group_size=group, slots=slots)
    outstanding, finished, given_out = [0] * replicas, [0] * replicas, []
    decision = dynamic.start()
    for _ in range(400):
        for replica, mine in enumerate(decision.dispatched):
            given_out += mine
            outstanding[replica] += len(mine) * group
        if decision.finished:
            break
        spread = max(outstanding) - min(outstanding)
        done = [data.draw(st.integers(min(1, left), min(left, 2 * slots))) for left in outstanding]
        if len(given_out) < prompts and decision.epoch == 0:
            assert spread == 0, "every replica begins with as much"
        outstanding = [left - d for left, d in zip(outstanding, done, strict=True)]
        finished = [f + d for f, d in zip(finished, done, strict=True)]
        window = [
            busy(min(left, slots), left - min(left, slots), finished=f) for left, f in zip(outstanding, finished, strict=True)
        ]
        decision = dynamic.advance(window)
        if len(given_out) + sum(map(len, decision.dispatched)) < prompts:  # what is left waits for room
            totals = [
                left + len(m) * group for left, m in zip(outstanding, decision.dispatched or [()] * replicas, strict=True)
            ]
            assert all(total >= slots for total in totals), "no slot stays empty while a prompt waits"
    assert decision.finished
    assert sorted(given_out) == list(range(prompts))


def cluster(*, lock_step: bool = False) -> StateMachine:
    static = machine(CoordinatorConfig(policy="cluster", dispatch="static", lock_step=lock_step), slots=64)
    assert static.start().arm == 0
    return static


def rated(running: int, *seconds: float, waiting: int = 0) -> Occupancy:
    return busy(running, waiting, seconds_per_token=seconds)


def test_one_arm_for_all_is_the_best_for_the_sum() -> None:
    assert cluster().advance([rated(8, 0.02, 0.03), rated(1, 0.02, 0.01)]).arm == 0
    assert cluster().advance([rated(2, 0.02, 0.021), rated(1, 0.02, 0.01)]).arm == 1
    assert cluster().advance([rated(2, 0.02, 0.021, waiting=30), rated(1, 0.02, 0.01)]).arm == 0, "what waits counts"
    assert cluster().advance([rated(0, 0.02, 9.0), rated(1, 0.02, 0.01)]).arm == 1, "who has nothing has no say"
    assert cluster().advance([rated(0, 0.02, 0.01, waiting=1), rated(0, 0.02, 0.01)]).arm == 0


def test_in_lock_step_the_slowest_decides() -> None:
    window = [rated(9, 0.02, 0.01), rated(1, 0.02, 0.03)]
    assert cluster().advance(window).arm == 1
    assert cluster(lock_step=True).advance(window).arm == 0


def test_the_arm_changes_for_a_clear_gain_and_away_from_the_impossible() -> None:
    one = cluster()
    assert one.advance([rated(1, 0.02, 0.0197)]).arm == 0
    assert one.advance([rated(1, 0.02, 0.019)]).arm == 1
    assert one.advance([rated(1, 0.0198, 0.02)]).arm == 1
    assert one.advance([rated(1, 0.02, inf)]).arm == 0
    assert one.advance([rated(1, inf, inf)]).arm == 0


@pytest.mark.parametrize("policy", ["replica", "makespan"])
def test_other_policies_leave_the_arm_to_the_replica(policy: str) -> None:
    each = machine(CoordinatorConfig(policy=policy))  # type: ignore[arg-type]
    assert each.start().arm is None
    assert each.advance([rated(1, 0.02, 0.01), rated(1, 0.02, 0.01)]).arm is None
