"""What is known of lengths and speeds, and the moves that follow: only where they end the rollout earlier."""

from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erollout.config import CoordinatorConfig
from erollout.coordinator.lengths import RemainingLengths
from erollout.coordinator.migration import GAIN, Migration, Move
from erollout.coordinator.occupancy import CURVE_BATCHES, Occupancy
from erollout.coordinator.state_machine import StateMachine
from erollout.coordinator.throughput import seconds_per_token

SPECULATING = tuple(0.005 + 0.0015 * batch for batch in CURVE_BATCHES)
"""Seconds: every sequence more makes the step slower."""
READING_WEIGHTS = tuple(max(0.012, 0.0015 * batch) for batch in CURVE_BATCHES)
"""Up to 8 sequences cost the same."""
LENGTHS = (200, 250, 300, 350, 400, 500, 700, 1000, 1500, 2000)
SLOTS = 16


def migration(lengths: tuple[int, ...] = LENGTHS, window_seconds: float = 0.05) -> Migration:
    return Migration(SLOTS, RemainingLengths(lengths, 2048), window_seconds)


def loaded(sequences: int, curve: tuple[float, ...] = SPECULATING, **values: float) -> Occupancy:
    running = min(sequences, SLOTS)
    fields = {"context": 300.0, "age": 200.0, "prefill_seconds": 1e-4, **values}
    return Occupancy(running=running, waiting=sequences - running, curve=curve, **fields)  # type: ignore[arg-type]


def test_residual_lengths_are_those_of_longer_responses() -> None:
    lengths = RemainingLengths((10, 20, 30), 100)
    assert lengths.mean_residual(0) == mean((10, 20, 30, 37.5))
    assert lengths.mean_residual(10) == mean((10, 20, 27.5))
    assert lengths.mean_residual(25) == mean((5, 12.5))
    assert lengths.mean_residual(30) == 7.5, "some may grow longer than any before"
    assert RemainingLengths((10, 90), 100).mean_residual(90) == 10, "but not beyond max_tokens"
    assert lengths.mean_residual(37.5) == lengths.mean_residual(500) == lengths.residual(37.5, 0.5) == 1
    assert [lengths.residual(0, share) for share in (0.125, 0.375, 0.5, 0.875, 1)] == [10, 20, 25, 37.5, 37.5]
    assert lengths.residual(20, 0.25) == 10


def test_without_a_last_rollout_all_lengths_are_as_likely() -> None:
    lengths = RemainingLengths((), 1024)
    assert lengths.mean_residual(0) == pytest.approx(512, rel=0.01)
    assert lengths.mean_residual(824) == pytest.approx(100, rel=0.03)
    assert lengths.residual(0, 7 / 8) == pytest.approx(896, rel=0.01)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.floats(0, 520), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_takes_longer(known: list[int], age: float, one: float, two: float) -> None:
    lengths = RemainingLengths(known, 512)
    assert 1 <= lengths.residual(age, min(one, two)) <= lengths.residual(age, max(one, two)) <= max(1, 512 - age)
    assert 1 <= lengths.mean_residual(age) <= max(1, 512 - age)


def test_speed_is_linear_between_batches_and_shared_by_a_queue() -> None:
    curve = tuple(float(batch) for batch in CURVE_BATCHES)
    for sequences in (1, 1.5, 2, 3, 3.5, 4, 100, 256, 300):
        assert seconds_per_token(curve, sequences, 512) == pytest.approx(sequences)
    assert seconds_per_token(curve, 0.25, 512) == 1
    assert seconds_per_token(READING_WEIGHTS, 12, 512) == pytest.approx(0.018)
    assert seconds_per_token(READING_WEIGHTS, 40, 8) == 5 * READING_WEIGHTS[3]
    assert seconds_per_token((), 40, 8) == 5, "without a curve all batches are alike"


def test_an_idle_replica_takes_half() -> None:
    assert migration().moves([loaded(8), loaded(0)]) == (Move(0, 1, 4),)
    assert migration().moves([loaded(0), loaded(5)]) == (Move(1, 0, 2),)
    assert migration().moves([loaded(10), loaded(1)]) == (), "a busy one would be late with its own"
    assert migration().moves([loaded(1), loaded(0)]) == ()


def test_the_slowest_replicas_are_helped_first() -> None:
    slow = tuple(1.5 * seconds for seconds in SPECULATING)
    window = [loaded(8), loaded(0), loaded(12), loaded(8, slow), loaded(0), loaded(1), loaded(7)]
    assert migration().moves(window) == (Move(3, 1, 6), Move(2, 4, 6))
    assert migration().moves([loaded(8), loaded(6), loaded(0), loaded(9, age=1999.0)]) == (Move(0, 2, 4),)


def test_a_slower_replica_takes_less() -> None:
    slower = tuple(1.25 * seconds for seconds in SPECULATING)
    assert migration().moves([loaded(12), loaded(0, slower)]) == (Move(0, 1, 3),)
    assert migration().moves([loaded(12, slower), loaded(0)]) == (Move(0, 1, 9),)
    assert migration().moves([loaded(12), loaded(0, tuple(3 * seconds for seconds in SPECULATING))]) == ()


def test_nothing_moves_where_small_batches_are_no_faster() -> None:
    assert migration().moves([loaded(8, READING_WEIGHTS), loaded(0, READING_WEIGHTS)]) == ()
    assert migration().moves([loaded(16, READING_WEIGHTS), loaded(0, READING_WEIGHTS)]) == (Move(0, 1, 8),)
    assert migration().moves([loaded(16, ()), loaded(0, ())]) == (), "nor where nothing is known"
    assert migration().moves([loaded(48, ()), loaded(0, ())]) == (Move(0, 1, 24),), "but queues get shorter"


def test_nothing_moves_that_ends_before_it_would_have_arrived() -> None:
    assert migration().moves([loaded(8, age=1900), loaded(0)]) == (Move(0, 1, 4),)
    assert migration().moves([loaded(8, age=2040), loaded(0)]) == ()
    assert migration(window_seconds=5.0).moves([loaded(8, age=1900), loaded(0)]) == ()
    late = [loaded(8, age=1900, seconds=100.0), loaded(0)]
    assert migration().moves(late) == (Move(0, 1, 4),), "the first window tells nothing of how long one takes"
    slow_windows = migration()
    slow_windows.moves([loaded(1), loaded(0)])
    assert slow_windows.moves(late) == (), "a window takes as long as the last one took"
    expensive = loaded(0, prefill_seconds=0.01)
    assert migration().moves([loaded(8, context=1900.0, age=1600), expensive]) == ()


def test_moves_wait_for_the_end_of_the_dispatch() -> None:
    for policy, expected in (("makespan", (Move(0, 1, 4),)), ("replica", ())):
        machine = StateMachine(CoordinatorConfig(policy=policy), 2, 4, 8, 8, LENGTHS, 2048)  # type: ignore[arg-type]
        assert machine.start().dispatched == ((0, 2), (1, 3))
        assert machine.advance([loaded(8), loaded(0)]).moves == expected
    machine = StateMachine(CoordinatorConfig(), 2, 6, 8, 8, LENGTHS, 2048)
    machine.start()
    decision = machine.advance([loaded(16), loaded(0)])
    assert decision.dispatched == ((), (4, 5)) and decision.moves == ()
    assert machine.advance([loaded(16), loaded(0)]).moves


loads = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 2048), st.sampled_from((SPECULATING, READING_WEIGHTS))), min_size=1)


def _window(drawn: list[tuple[int, float, tuple[float, ...]]]) -> list[Occupancy]:
    return [loaded(sequences, curve, age=age) for sequences, age, curve in drawn]


@given(loads)
def test_no_move_makes_it_worse(drawn: list[tuple[int, float, tuple[float, ...]]]) -> None:
    window = _window(drawn)
    machine = migration()
    moves = machine.moves(window)
    assert moves == migration().moves(window), "equal inputs, equal decisions"
    involved = [replica for move in moves for replica in (move.source, move.target)]
    assert len(involved) == len(set(involved))
    for move in moves:
        source, target = window[move.source], window[move.target]
        stages = machine.stages(source.outstanding, source.running * source.age / source.outstanding)
        before = machine.seconds(source, source.outstanding, stages)
        after = max(
            machine.seconds(source, source.outstanding - move.num_sequences, stages),
            machine.seconds(target, move.num_sequences, stages),
        )
        assert after < (1 - GAIN) * before
        assert target.outstanding == 0 < move.num_sequences < source.outstanding


@given(loads, st.randoms(use_true_random=False))
def test_the_numbering_of_replicas_hardly_matters(drawn: list[tuple[int, float, tuple[float, ...]]], shuffle) -> None:
    drawn = [(n, age + index * 1e-3, curve) for index, (n, age, curve) in enumerate(drawn)]  # no ties
    order = list(range(len(drawn)))
    shuffle.shuffle(order)
    moves = migration().moves(_window(drawn))
    shuffled = migration().moves(_window([drawn[index] for index in order]))
    named = {(order[move.source], move.num_sequences) for move in shuffled}
    assert named == {(move.source, move.num_sequences) for move in moves}


@given(st.integers(1, 64), st.floats(0, 2048))
def test_stages_last_until_the_longest_of_all(sequences: int, age: float) -> None:
    machine = migration()
    stages = machine.stages(sequences, age)
    longest = machine.lengths.residual(age, sequences / (sequences + 1))
    assert sum(stage.tokens for stage in stages) == pytest.approx(longest)
    assert all(one.alive > two.alive for one, two in pairwise(stages)) and stages[0].alive <= 0.75
    assert machine.stages(sequences, age) == stages


def test_repeated_windows_spread_the_load_and_come_to_rest() -> None:
    machine = migration()
    outstanding, moved = [40, 0, 3, 0, 0, 0], 0
    for _ in range(40):
        for move in machine.moves([loaded(n) for n in outstanding]):
            outstanding[move.source] -= move.num_sequences
            outstanding[move.target] += move.num_sequences
            moved += 1
    assert sum(outstanding) == 43 and min(outstanding) >= 1 and max(outstanding) <= 10
    assert moved == 4, "one for each idle replica"
