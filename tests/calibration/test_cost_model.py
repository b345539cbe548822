"""Seconds of steps: the roofline against hand-computed figures, the table over it, and what live steps teach."""

import json
import random
from dataclasses import replace
from math import exp, inf, isfinite, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erollout.speculation.cost.corrections import Corrections
from erollout.speculation.cost.cost_model import CalibratedCost, PassTimes
from erollout.speculation.cost.measured_table import MOST_OF_ITS_OWN, MeasuredTable, Point
from erollout.speculation.cost.roofline import Communication, ModelSize, PassCost, Roofline
from erollout.speculation.step import OFF, Arm, Load

DRAFT = Arm("w4", 3)
SHARE = 0.4
"""Share of drafting in a step's predicted seconds."""
SIZE = ModelSize(weight_bytes=1000.0, draft_bytes={"w4": 300.0}, flops=10.0, attention_flops=0.1, kv_bytes=2.0)
COST = PassCost(bandwidth=100.0, compute=50.0, per_sequence=0.5)


def roofline(**changes: float) -> Roofline:
    cost = PassCost(**{"bandwidth": 100.0, "compute": 50.0, "per_sequence": 0.5, **changes})  # type: ignore[arg-type]
    return Roofline(SIZE, cost, cost, {"w4": cost})


def test_a_pass_takes_its_bytes_or_its_flop_and_the_overhead_of_its_sequences() -> None:
    line = roofline()
    assert line.seconds("target", "", 4, 20) == pytest.approx((1000 + 2 * 4 * 20) / 100 + 0.5 * 4)  # 11.6 beats 0.96 of FLOP
    assert line.seconds("draft", "w4", 4, 20) == pytest.approx((300 + 2 * 4 * 20) / 100 + 0.5 * 4)
    assert line.seconds("verify", "", 16, 20, 7) == pytest.approx(128 * (10 + 0.1 * 20) / 50 + 0.5 * 16)  # FLOP beat bytes
    assert line.parts("verify", "", 16, 20, 7).limit == "compute"
    assert line.parts("target", "", 4, 20).limit == "bandwidth"
    assert roofline(per_pass=99.0).parts("target", "", 4, 20).limit == "overhead"


def test_factors_scale_weights_and_cache_apart() -> None:
    line = roofline(weight_factor=1.5, kv_factor=0.25)
    assert line.seconds("target", "", 4, 20) == pytest.approx((1500 + 0.25 * 2 * 4 * 20) / 100 + 2)


def test_time_climbs_in_tiles() -> None:
    line = Roofline(SIZE, COST, PassCost(1e9, 50.0, tile=16), {"w4": PassCost(1e9, 1e9, per_sequence=1.0, sequence_tile=16)})
    verify = [line.seconds("verify", "", batch, 0, 3) for batch in (1, 4, 5, 8, 9)]
    assert verify == pytest.approx([16 * 10 / 50] * 2 + [32 * 10 / 50] * 2 + [48 * 10 / 50])
    assert [round(line.seconds("draft", "w4", batch, 0)) for batch in (1, 16, 17, 33)] == [16, 16, 32, 48]


def test_a_padded_batch_is_a_multiple_of_the_draft_and_its_bonus() -> None:
    line = Roofline(SIZE, COST, COST, {"w4": PassCost(1e9, 1e9, per_sequence=1.0, padded=True)})
    assert [round(line.seconds("draft", "w4", 16, 0, n)) for n in (3, 7, 11)] == [16, 16, 24]


def test_ranks_pay_for_their_reductions() -> None:
    size = ModelSize(500.0, {"w4": 150.0}, 5.0, 0.05, 1.0, reduces=4, reduce_bytes=8.0)
    line = Roofline(size, COST, COST, {"w4": COST}, Communication(latency=0.1, bandwidth=100.0))
    parts = line.parts("verify", "", 2, 10, 3)
    assert parts.communication == pytest.approx(4 * (0.1 + 2 * 4 * 8 / 100))
    assert parts.seconds == pytest.approx(max(parts.memory, parts.compute) + 1.0 + parts.communication)


def test_prompt_tokens_cost_bytes_or_flop() -> None:
    assert roofline().prefill_seconds(1) == pytest.approx(1000 / 100)
    assert roofline().prefill_seconds(1000) == pytest.approx(1000 * (10 + 0.1 * 500) / 50)


def points(*entries: tuple[int, float, int, float]) -> list[Point]:
    return [Point(*entry) for entry in entries]


def per_sequence(batch: int, num_speculative_tokens: int) -> int:
    """Rows of a pass with one token of each sequence."""
    return batch


def per_token(batch: int, num_speculative_tokens: int) -> int:
    """Rows of a verify pass."""
    return batch * (num_speculative_tokens + 1)


def test_a_table_has_what_was_measured_and_lies_between_neighbours() -> None:
    table = MeasuredTable(points((4, 100, 0, 0.1), (16, 100, 0, 0.3)), per_sequence)
    assert table.log_ratio(4, 100, 0) == pytest.approx(0.1)
    assert table.log_ratio(8, 100, 0) == pytest.approx(0.2)  # halfway in the logarithm
    assert MeasuredTable((), per_token).log_ratio(8, 100, 3) == 0.0


def test_a_table_fades_outside() -> None:
    table = MeasuredTable(points((4, 100, 0, 0.4), (16, 100, 0, 0.4)), per_sequence)
    assert table.log_ratio(64, 100, 0) == pytest.approx(0.2)  # two octaves: half
    assert abs(table.log_ratio(16 * 2**20, 100, 0)) < 0.001
    assert table.log_ratio(1, 100, 0) == pytest.approx(0.2)


def test_steps_of_a_verify_pass_stand_at_the_same_tokens_for_every_draft_length() -> None:
    measured = [(b, 100.0, n, 0.3 if b * (n + 1) > 64 else 0.0) for n in (3, 7) for b in (4, 8, 16, 32)]
    without = MeasuredTable(points(*(p for p in measured if p[:3] != (16, 100.0, 7))), per_token)
    assert without.log_ratio(16, 100, 7) == pytest.approx(0.3, abs=0.02)  # 128 tokens, as 32 sequences of 4


def test_rows_are_the_tokens_of_a_pass_and_what_a_draft_is_filled_up_to() -> None:
    line = Roofline(SIZE, COST, COST, {"w4": replace(COST, padded=True), "w8": COST})
    assert [line.rows("draft", "w4", 16, n) for n in (3, 7, 11)] == [16, 16, 24]
    assert [line.rows("draft", "w8", 16, n) for n in (3, 7, 11)] == [16, 16, 16]
    assert line.rows("verify", "", 16, 3) == 64 and line.rows("target", "", 16, 3) == 16


def test_a_point_that_no_other_resembles_counts_little() -> None:
    regular = [(b, c, n, 0.0) for n in (3, 7) for b in (8, 16, 32) for c in (100.0, 200.0, 400.0)]
    odd = [p if p[:3] != (16, 400.0, 3) else (16, 400.0, 3, -0.7) for p in regular]
    table = MeasuredTable(points(*odd), per_sequence)
    assert table.log_ratio(16, 400, 3) == pytest.approx(-MOST_OF_ITS_OWN, abs=0.001)
    assert table.log_ratio(16, 200, 3) == table.log_ratio(16, 400, 7) == pytest.approx(0.0)


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(1, 1e5), st.integers(0, 16), st.floats(-2, 2)), max_size=12))
@settings(max_examples=50)
def test_a_table_never_leaves_its_points_far(entries: list[tuple[int, float, int, float]]) -> None:
    table = MeasuredTable(points(*entries), per_token)
    most = 3 * max((abs(value) for *_, value in entries), default=0.0) + MOST_OF_ITS_OWN
    assert all(abs(table.log_ratio(b, c, n)) <= most for b in (1, 7, 64, 1000) for c in (1, 900) for n in (0, 3, 20))


def cost_model() -> CalibratedCost:
    return CalibratedCost(PassTimes(roofline()))


def test_a_step_is_its_drafts_and_the_verify_pass() -> None:
    cost, load = cost_model(), Load(8, 100.0)
    passes = cost.passes
    assert cost.step_seconds(OFF, load) == pytest.approx(passes.target_seconds(8, 100), rel=0.02)
    whole = 3 * passes.draft_seconds("w4", 8, 100, 3) + passes.verify_seconds(8, 100, 3)
    assert cost.step_seconds(DRAFT, load) == pytest.approx(whole, rel=0.02)
    assert passes.speed_up(DRAFT, 8, 100, 3.0) == pytest.approx(3.0 * passes.target_seconds(8, 100) / whole)
    assert passes.parts("verify", "", 8, 100, 3).seconds == pytest.approx(passes.verify_seconds(8, 100, 3))


def test_a_measured_ratio_wins_over_the_roofline() -> None:
    table = MeasuredTable(points((8, 100, 0, log(2))), per_sequence)
    passes = PassTimes(roofline(), {("target", ""): table})
    assert passes.target_seconds(8, 100) == pytest.approx(2 * roofline().seconds("target", "", 8, 100))
    assert passes.parts("target", "", 8, 100, 0).seconds == pytest.approx(passes.target_seconds(8, 100))
    assert passes.verify_seconds(8, 100, 3) == roofline().seconds("verify", "", 8, 100, 3)


def test_prompt_tokens_beside_decoding_add_what_they_add() -> None:
    cost = cost_model()
    alone, mixed = cost.step_seconds(OFF, Load(4, 100.0)), cost.step_seconds(OFF, Load(4, 100.0, 1000))
    assert mixed - alone == pytest.approx(1004 * (10 + 0.1 * 100) / 50 - (1000 + 2 * 4 * 100) / 100, rel=0.05)
    assert cost.step_seconds(OFF, Load(0, 0.0)) == pytest.approx(0.0, abs=20)
    assert cost.step_seconds(OFF, Load(0, 0.0, 64)) == cost.prefill_seconds(64)


def fed(steps: int, ratio: float = 1.0, noise: float = 0.03, seed: int = 0) -> Corrections:
    """After steps of both arms at 16 sequences."""
    corrections, rng = Corrections(), random.Random(seed)
    feed(corrections, steps, ratio, noise, rng)
    return corrections


def feed(corrections: Corrections, steps: int, ratio: float, noise: float, rng: random.Random) -> None:
    for step in range(steps):
        corrections.observe(DRAFT if step % 2 else OFF, 16, SHARE, ratio * exp(rng.gauss(0.0, noise)))


def test_an_outlier_moves_little() -> None:
    corrections = fed(100)
    before, without = (corrections.factor(arm, 16, SHARE) for arm in (DRAFT, OFF))
    corrections.observe(DRAFT, 16, SHARE, 30.0)
    after, then = (corrections.factor(arm, 16, SHARE) for arm in (DRAFT, OFF))
    assert after == pytest.approx(before, rel=0.1) and then == pytest.approx(without, rel=0.1)
    assert after / then == pytest.approx(before / without, rel=0.03), "what decides between the arms"


def test_scattered_outliers_do_not_accumulate() -> None:
    corrections, rng = Corrections(), random.Random(3)
    for step in range(600):
        slow = 8.0 if rng.random() < 0.1 else 1.0
        corrections.observe(DRAFT if step % 2 else OFF, 16, SHARE, slow * exp(rng.gauss(0.0, 0.03)))
    assert corrections.factor(DRAFT, 16, SHARE) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("ratio", "steps"), [(2.0, 15), (0.5, 15), (1.25, 60)])
def test_a_lasting_change_is_followed_by_all_arms_and_batches(ratio: float, steps: int) -> None:
    corrections = fed(200)
    for _ in range(steps):
        corrections.observe(OFF, 16, SHARE, ratio)
    assert corrections.factor(OFF, 16, SHARE) == pytest.approx(ratio, rel=0.06)
    assert corrections.factor(DRAFT, 16, SHARE) == pytest.approx(ratio, rel=0.12)
    assert corrections.factor(Arm("w4", 5), 2, SHARE) == pytest.approx(ratio, rel=0.15)


def test_what_one_arm_shows_at_first_stays_mostly_its_own_once_the_others_are_known() -> None:
    corrections = fed(200)
    for _ in range(40):
        corrections.observe(Arm("w8", 3), 16, SHARE, 1.5)
        corrections.observe(OFF, 16, SHARE, 1.0)
    assert corrections.factor(Arm("w8", 3), 16, SHARE) == pytest.approx(1.5, rel=0.05)
    assert corrections.factor(OFF, 16, SHARE) == pytest.approx(1.0, rel=0.05)


def test_neighbouring_batches_share_what_was_learnt() -> None:
    corrections = Corrections()
    for _ in range(50):
        corrections.observe(DRAFT, 16, SHARE, 1.3)
        corrections.observe(OFF, 16, SHARE, 1.0)
    near, far = corrections.factor(DRAFT, 14, SHARE), corrections.factor(DRAFT, 2, SHARE)
    assert corrections.factor(DRAFT, 16, SHARE) > near > far > 1.0


def test_the_state_goes_through_json() -> None:
    cost = cost_model()
    for step in range(50):
        cost.observe(DRAFT if step % 3 else OFF, Load(3 + step % 7, 50.0 + step), 9.0 + step % 5)
        cost.observe(OFF, Load(0, 0.0, 500), 40.0)
    other = cost_model()
    other.load_state_dict(json.loads(json.dumps(cost.state_dict())))
    for model in (cost, other):
        model.observe(DRAFT, Load(4, 60.0), 12.0)
    for load in (Load(3, 60.0), Load(9, 500.0), Load(5, 60.0, 300)):
        for arm in (OFF, DRAFT):
            assert other.step_seconds(arm, load) == cost.step_seconds(arm, load)
            assert cost.step_seconds(arm, load) != cost_model().step_seconds(arm, load)


def test_a_drafter_that_is_quicker_than_calibrated_shows_in_all_draft_lengths() -> None:
    """Only n = 1 is taken; its drafting is timed, or n = 2 is probed now and then."""
    for timed in (True, False):
        cost, true = cost_model(), 0.5
        for step in range(200):
            arm = OFF if step % 4 == 0 else Arm("w4", 2 if step % 10 == 1 else 1)
            load = Load(8, 100.0)
            whole, share = cost._decode_seconds(arm, load)
            drafting = true * share * whole
            cost.observe(arm, load, (1 - share) * whole + drafting, drafting if timed else 0.0)
        for n in (3, 6):
            whole, share = cost._decode_seconds(Arm("w4", n), Load(8, 100.0))
            right = (1 - share) * whole + true * share * whole
            assert cost.step_seconds(Arm("w4", n), Load(8, 100.0)) == pytest.approx(right, rel=0.05 if timed else 0.2)


@pytest.mark.parametrize(("draft", "verify", "within"), [(0.5, 1.0, 0.2), (2.0, 1.0, 0.1), (1.0, 0.5, 0.08)])
def test_a_few_steps_of_another_length_tell_a_wrong_drafter_from_a_wrong_verify_pass(
    draft: float, verify: float, within: float
) -> None:
    """Drafting isn't timed, one step in ten has three drafts instead of one, and eight are predicted."""
    corrections, rng, shares = Corrections(), random.Random(1), {0: 0.0, 1: 0.25, 3: 0.5, 8: 0.75}

    def true(n: int) -> float:
        return shares[n] * draft + (1 - shares[n]) * verify if n else 1.0

    for step in range(300):
        n = {0: 0, 5: 3}.get(step % 10, 1)
        corrections.observe(Arm("w4", n) if n else OFF, 16, shares[n], true(n) * exp(rng.gauss(0.0, 0.03)))
    assert corrections.factor(Arm("w4", 8), 16, shares[8]) == pytest.approx(true(8), rel=within)


def test_timed_drafting_counts_once() -> None:
    """A drafter that is wrong by two says nothing about the verify pass, whose own seconds are right."""
    corrections, arm = Corrections(), Arm("w8", 3)
    for _ in range(6):
        corrections.observe(arm, 16, SHARE, 1 + SHARE, 2.0)
    assert corrections.factor(arm, 16, 1.0) == pytest.approx(2.0, rel=0.03)
    assert corrections.factor(arm, 16, 0.0) == pytest.approx(1.0, abs=0.01)


def test_a_forgotten_drafter_leaves_the_others_as_they_were() -> None:
    corrections = fed(30, 1.3)
    corrections.observe(Arm("w8", 3), 16, SHARE, 1.6)
    before = {arm: corrections.factor(arm, 16, share) for arm, share in ((OFF, 0.0), (Arm("w8", 3), SHARE))}
    corrections.forget("w4")
    assert {arm: corrections.factor(arm, 16, SHARE if arm.speculates else 0.0) for arm in before} == before
    state = corrections.state_dict()
    corrections.load_state_dict(json.loads(json.dumps(state)))
    assert corrections.state_dict() == state and "draft w4" not in str(state)


def test_a_state_without_covariances_is_taken() -> None:
    """A checkpoint of the time when covariances were neglected."""
    state = fed(30, 1.3).state_dict()
    del state["covariances"]
    corrections = Corrections()
    corrections.load_state_dict(state)
    assert corrections.factor(DRAFT, 16, SHARE) == fed(30, 1.3).factor(DRAFT, 16, SHARE)


def test_of_corrections_by_drafter_only_what_all_steps_share_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint of the time before corrections were by kind of pass."""
    caplog.set_level("INFO")
    old = {"common": [0.3, 0.01], "prefill": [0.1, 0.2], "noise": 0.001, "drafters": [["", 0.1, 0.01], ["w4", 0.5, 0.01]]}
    corrections = Corrections()
    corrections.load_state_dict(old | {"cells": [["w4", 3, 2, 0.4, 0.1]]})
    assert corrections.factor(DRAFT, 4, SHARE) == corrections.factor(OFF, 4, 0.0) == pytest.approx(exp(0.3))
    assert [record.message for record in caplog.records if "by drafter" in record.message]


@pytest.mark.parametrize(
    "damage",
    [
        {"common": [float("nan"), 0.1]},
        {"prefill": [0.1, -1.0]},
        {"kinds": [["draft w4", 0.1, float("nan")]]},
        {"cells": [["verify 3", 2, float("inf"), 0.1]]},
        {"kinds": [["verify", 0.1, 0.1]], "covariances": [[0.2]]},
        {"kinds": [["verify", 0.1, 0.1]], "covariances": [[float("nan")]]},
        {"kinds": [["verify", 0.1, 0.1]], "covariances": [[0.0], [0.0]]},
        {"kinds": [["verify", 0.1, 0.1]], "covariances": 3},
        {"kinds": [["", 0.1, 0.1]]},
        {"drafters": "garbage"},
        {"drafters": [["w4", float("nan"), 0.1]]},
        {"drafters": 3},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict[str, object]) -> None:
    corrections = fed(20, 1.5)
    before = corrections.state_dict()
    with pytest.raises(ValueError, match=r"corrections of another form|a correction of|a noise of|covariance"):
        corrections.load_state_dict({**Corrections().state_dict(), **damage})
    assert corrections.state_dict() == before


def test_prompt_passes_teach_what_prompts_cost_and_nothing_else() -> None:
    cost = cost_model()
    before = cost.step_seconds(OFF, Load(4, 100.0))
    for _ in range(20):
        cost.observe(OFF, Load(0, 0.0, 500), 5 * cost_model().prefill_seconds(500))
    assert cost.prefill_seconds(500) == pytest.approx(5 * cost_model().prefill_seconds(500), rel=0.1)
    assert cost.step_seconds(OFF, Load(4, 100.0)) == before


@given(st.lists(st.tuples(st.sampled_from([OFF, DRAFT, Arm("w8", 1)]), st.integers(1, 300), st.floats(0.0, 1e6)), max_size=60))
@settings(max_examples=60)
def test_no_times_break_the_corrections(steps: list[tuple[Arm, int, float]]) -> None:
    corrections = Corrections()
    for arm, batch, ratio in steps:
        corrections.observe(arm, batch, SHARE, ratio)
    state = json.loads(json.dumps(corrections.state_dict(), allow_nan=False))
    variances = [state["common"][1], *(row[-1] for row in state["kinds"]), *(row[-1] for row in state["cells"])]
    assert all(variance >= 0 for variance in variances)
    factors = [corrections.factor(arm, batch, SHARE) for arm in (OFF, DRAFT) for batch in (1, 17, 300)]
    assert all(isfinite(factor) and 0 < factor < inf for factor in factors)
