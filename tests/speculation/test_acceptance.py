"""Acceptance by position against drafts whose chances are known."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erollout.speculation.acceptance import PRIOR, Acceptance, AcceptanceByContext


def drafts(chances: list[float], lengths: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """drafted_at and accepted_at of one step with drafts of these lengths."""
    drafted_at, accepted_at = [0] * max(lengths), [0] * max(lengths)
    for n in lengths:
        going = True
        for position in range(n):
            going = going and rng.random() < chances[position]
            drafted_at[position] += 1
            accepted_at[position] += going
    return drafted_at, accepted_at


def observed(chances: list[float], n: int, steps: int, seed: int = 0, window: float = 400) -> Acceptance:
    acceptance, rng = Acceptance(window), random.Random(seed)
    for _ in range(steps):
        acceptance.observe(*drafts(chances, [n] * 4, rng))
    return acceptance


def test_rates_are_conditional_and_lengths_their_products() -> None:
    acceptance = Acceptance(1e6)
    acceptance.observe([10000, 10000, 10000], [8000, 4000, 1000])
    assert acceptance.rates(3) == pytest.approx([0.8, 0.5, 0.25], abs=0.01)
    a, b, c = acceptance.rates(3)
    assert acceptance.lengths(3) == pytest.approx([1, 1 + a, 1 + a + a * b, 1 + a + a * b + a * b * c])
    assert acceptance.length(3) == acceptance.lengths(3)[3]


def test_a_response_that_ends_takes_the_drafts_behind_with_it() -> None:
    acceptance = Acceptance(1e6)
    acceptance.observe([10000, 10000], [10000, 10000])
    assert acceptance.lengths(2, survival=0.9) == pytest.approx([1, 1.9, 1.9 + 0.81], abs=0.001)


@pytest.mark.parametrize("seed", range(3))
def test_drafts_of_different_lengths_are_counted_right(seed: int) -> None:
    chances, rng, acceptance = [0.9, 0.7, 0.8, 0.6], random.Random(seed), Acceptance(1e5)
    for _ in range(2000):
        acceptance.observe(*drafts(chances, [rng.choice((1, 2, 4)) for _ in range(6)], rng))
    assert acceptance.rates(4) == pytest.approx(chances, abs=0.03)


def test_positions_never_drafted_take_after_the_ones_before() -> None:
    acceptance = observed([0.95, 0.9], 2, 500)
    rates = acceptance.rates(6)
    assert rates[1] == pytest.approx(0.9, abs=0.04)
    assert rates[2:] == [rates[1]] * 4


def test_before_any_draft_a_try_is_worth_it_and_a_few_drafts_decide() -> None:
    acceptance = Acceptance(400)
    assert acceptance.rates(3) == [PRIOR] * 3
    assert 2.5 < acceptance.length(3) < 3.2
    acceptance.observe([40], [2])
    assert acceptance.length(3) < 1.3
    acceptance = Acceptance(400)
    acceptance.observe([40, 40, 40], [40, 40, 40])
    assert acceptance.length(3) > 3.8


def test_an_old_draft_counts_e_times_less_after_the_window() -> None:
    acceptance = Acceptance(200)
    acceptance.observe([1], [1])
    for _ in range(200):
        acceptance.observe([1], [0])
        acceptance.accepted[0] = min(acceptance.accepted[0], 2.0)
    steady = observed([0.9] * 3, 3, 1000, window=200)
    assert steady.tried[0] == pytest.approx(200, rel=0.05)  # the sum of all weights
    assert acceptance.accepted[0] == pytest.approx(1 / 2.718, rel=0.01)


def test_a_collapse_is_noticed_within_a_few_drafts() -> None:
    acceptance, rng, count = observed([0.95] * 3, 3, 500), random.Random(1), 0
    while acceptance.length(3) > 1.9:  # of 3.7; the truth is 1.39 from now on
        acceptance.observe(*drafts([0.3] * 3, [3], rng))
        count += 1
    assert count <= 60


@pytest.mark.parametrize("rate", [0.6, 0.9, 0.98])
def test_steady_acceptance_is_not_taken_for_a_change(rate: float) -> None:
    acceptance, rng, least = Acceptance(400), random.Random(2), []
    for step in range(4000):
        acceptance.observe(*drafts([rate] * 3, [3], rng))
        if step > 1200:
            least.append(acceptance.tried[0])
    assert min(least) > 300


def test_a_new_rollout_starts_from_the_last_one_and_learns_quickly() -> None:
    acceptance = observed([0.95] * 3, 3, 500)
    before = acceptance.rates(3)
    acceptance.begin_rollout()
    assert acceptance.rates(3) == pytest.approx(before, abs=0.02)
    assert acceptance.tried[0] == pytest.approx(100)
    acceptance.begin_rollout()
    assert acceptance.tried[0] == pytest.approx(100)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.floats(0, 1)), max_size=20), st.randoms())
def test_whatever_is_observed_rates_are_chances(steps: list[tuple[list[int], float]], rng: random.Random) -> None:
    acceptance = Acceptance(50)
    for lengths, rate in steps:
        acceptance.observe(*drafts([rate] * 6, lengths, rng))
        assert all(0 <= value <= 1 for value in acceptance.rates(8))
        lengths_by_n = acceptance.lengths(8)
        assert lengths_by_n == sorted(lengths_by_n) and lengths_by_n[8] <= 9
    copy = Acceptance(50)
    copy.load_state_dict(acceptance.state_dict())
    assert copy.lengths(8) == acceptance.lengths(8)


def test_damaged_counts_are_refused() -> None:
    for tried, accepted in (([1.0, 1.0], [1.0]), ([float("nan")], [0.0]), ([1.0], [-1.0])):
        with pytest.raises(ValueError, match="acceptance counts"):
            Acceptance(50).load_state_dict({"tried": tried, "accepted": accepted, "recent": [0.0, 0.0]})


def test_long_responses_may_accept_otherwise() -> None:
    known = AcceptanceByContext(200)
    for _ in range(50):
        known.observe([16] * 3, [14, 13, 12], 60.0)
        known.observe([16] * 3, [8, 4, 2], 700.0)
    assert known.at(60.0).rates(1)[0] > 0.8 > 0.6 > known.at(700.0).rates(1)[0]
    assert known.at(100_000.0).rates(3) == known.whole.rates(3)


def test_a_context_that_little_is_known_of_takes_after_all() -> None:
    known = AcceptanceByContext(200)
    known.observe([100], [90], 60.0)
    known.observe([1], [0], 700.0)
    assert known.whole.rates(1)[0] - 0.05 < known.at(700.0).rates(1)[0] < known.whole.rates(1)[0]
    assert known.at(700.0).rates(3)[1:] == known.whole.rates(3)[1:]


def test_the_state_of_all_contexts_goes_on() -> None:
    known, copy = AcceptanceByContext(100), AcceptanceByContext(100)
    known.observe([20, 20], [15, 9], 60.0)
    known.observe([20, 20], [5, 2], 700.0)
    copy.load_state_dict(json.loads(json.dumps(known.state_dict())))
    for context in (60.0, 700.0, 5.0):
        assert copy.at(context).lengths(4) == known.at(context).lengths(4)
    copy.begin_rollout()
    assert copy.parts[10].tried[0] <= 25
