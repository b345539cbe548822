"""The automatic choice of formats against trying everything."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erollout.speculation.format_choice import Choice, expected_length, predicted_speed_up, select

CHOICES = st.lists(
    st.builds(Choice, st.sampled_from("abcd"), st.floats(0.01, 1.0), st.floats(0.5, 1.0)), min_size=1, max_size=3
)


def test_expected_length_and_speed_up_are_the_papers() -> None:
    assert expected_length(1.0, 5) == 6
    assert expected_length(0.0, 5) == 1
    assert expected_length(0.8, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))
    assert predicted_speed_up(0.8, 3, 0.3, 1.1) == pytest.approx(expected_length(0.8, 3) / (3 * 0.3 + 1.1))


@settings(max_examples=200)
@given(st.lists(CHOICES, min_size=1, max_size=3), st.floats(0.0, 0.5))
def test_the_choice_is_the_best_of_all(choices: list[list[Choice]], other: float) -> None:
    units = {str(index): unit for index, unit in enumerate(choices)}
    target = other + sum(max(choice.seconds for choice in unit) for unit in choices)
    selected = select(units, other, target)

    def speed_up(combination: tuple[Choice, ...]) -> float:
        acceptance = math.prod(choice.acceptance for choice in combination)
        r = (other + sum(choice.seconds for choice in combination)) / target
        return max(predicted_speed_up(acceptance, n, r, 1.0) for n in range(1, 9))

    best = max(speed_up(combination) for combination in itertools.product(*choices))
    assert selected.speed_up == pytest.approx(best)


def test_a_slow_accurate_format_goes_where_the_fast_one_costs_acceptance() -> None:
    cheap, careful = 0.1, 0.2
    units = {
        "sensitive": [Choice("w4a16", cheap, 0.6), Choice("w8a8", careful, 0.99)],
        "robust": [Choice("w4a16", cheap, 0.985), Choice("w8a8", careful, 0.99)],
    }
    selected = select(units, 0.05, 1.0)
    assert selected.formats == {"sensitive": "w8a8", "robust": "w4a16"}
    assert selected.acceptance == pytest.approx(0.99 * 0.985)


def test_a_whole_model_is_chosen_for_in_no_time() -> None:
    choices = [[Choice(f, 1 + 0.1 * (u * b % 7), 1 - 0.01 * (u + b) % 3) for b, f in enumerate("abc")] for u in range(13)]
    assert len(select({str(u): unit for u, unit in enumerate(choices)}, 1.0, 50.0).formats) == 13


def test_nothing_is_gained_by_bits_that_cost_no_time() -> None:
    units = {"all": [Choice("w4a16", 0.5, 0.9), Choice("w8a8", 0.5, 0.99)]}
    assert select(units, 0.0, 1.0).formats == {"all": "w8a8"}
