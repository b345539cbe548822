"""What the statistics of speculation mean."""

import pytest

from erollout.speculation.statistics import SpeculationStatistics, looks_broken, merge


def recorded(*drafts: tuple[int, int, int]) -> SpeculationStatistics:
    statistics = SpeculationStatistics()
    for drafted, accepted, emitted in drafts:
        statistics.record(drafted, accepted, emitted)
    return statistics


def test_the_figures_follow_their_definitions() -> None:
    statistics = recorded((3, 3, 3), (3, 1, 1), (3, 0, 0), (1, 1, 1), (3, 3, 1))  # the last one ended after one token
    assert (statistics.num_drafts, statistics.drafted, statistics.accepted, statistics.emitted) == (5, 13, 8, 6)
    assert statistics.acceptance_rate == 8 / 13
    assert statistics.acceptance_length == 1 + 8 / 5
    assert statistics.acceptance_by_position == [4 / 5, 2 / 4, 2 / 4]
    assert statistics.wasted == 7


def test_without_drafts_a_pass_yields_one_token() -> None:
    statistics = SpeculationStatistics()
    assert (statistics.acceptance_rate, statistics.acceptance_length, statistics.wasted) == (0.0, 1.0, 0)
    assert statistics.acceptance_by_position == []


def test_replicas_merge_as_if_they_were_one() -> None:
    drafts = [(3, 2, 2), (1, 0, 0), (2, 2, 1), (7, 5, 5)]
    parts = [recorded(*drafts[:2]), SpeculationStatistics(), recorded(*drafts[2:])]
    parts[0].seconds_drafting, parts[2].seconds_drafting, parts[2].seconds_verifying = 1.0, 2.0, 5.0
    whole = recorded(*drafts)
    whole.seconds_drafting, whole.seconds_verifying = 3.0, 5.0
    assert merge(parts) == whole
    assert parts[0] != whole  # and changes none of its parts
    assert merge([]) == SpeculationStatistics()


@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 3, 1), (2, 1, 2), (2, 1, -1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(AssertionError):
        recorded(counts)


def test_a_drafter_at_chance_looks_broken_and_a_coarse_one_does_not() -> None:
    def looks(drafted: int, accepted: int) -> bool:
        return looks_broken(SpeculationStatistics(drafted=drafted, accepted=accepted))

    assert looks(1000, 10) and not looks(1000, 600) and not looks(100, 0)
