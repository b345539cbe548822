"""The toggle in closed loops with a machine whose truth is known: how much it loses against the best arm of every step."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_machine import FORMATS, Learner, Machine, long_tailed, passes

from erollout.configuration.speculation import LadderConfig, SpeculationConfig, ToggleConfig
from erollout.speculation.cost.cost_model import CalibratedCost, PassTimes
from erollout.speculation.cost.roofline import PassCost
from erollout.speculation.ladder import Ladder
from erollout.speculation.probes import AT_ONCE, SHARE, Probes
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.toggle import REFRESH, Toggle
from erollout.speculation.trace import Reason

N3 = Arm("w4", 3)
RIGHT = (1.0, 1.0, 1.0)
ALL_FACTORS = [
    (2.0, 1.0, 1.0),
    (0.5, 1.0, 1.0),
    (1.0, 2.0, 1.0),
    (1.0, 0.5, 1.0),
    (1.0, 1.0, 2.0),
    (1.0, 1.0, 0.5),
]


def toggle_of(machine: Machine, mode: str, bias: tuple[float, float, float] = RIGHT, **options: object) -> Toggle:
    """With a cost model that takes the machine's passes for slower or quicker than they are."""
    config = SpeculationConfig(mode=mode, **options)  # type: ignore[arg-type]
    return Toggle(config, FORMATS[:1], Learner(passes(*bias)), machine.clock)


def losses(machine: Machine, toggle: Toggle, rollouts: int, lengths: Callable[[int], list[int]] | None = None) -> list[float]:
    """Share of each rollout's true seconds that was lost against the best of the toggle's arms at every step."""
    shares = []
    for rollout in range(rollouts):
        seconds, lost = machine.seconds, machine.lost
        machine.rollout(toggle, long_tailed(32, rollout) if lengths is None else lengths(rollout), toggle.arms)
        shares.append((machine.lost - lost) / (machine.seconds - seconds))
    return shares


def speculates_at(machine: Machine, toggle: Toggle, batch: int) -> bool:
    toggle.begin_rollout(True)
    return toggle.decide(Load(batch, 200.0)).speculates


def test_the_machine_is_worth_a_toggle() -> None:
    machine = Machine(passes())

    def gain(n: int, batch: int) -> float:
        load = Load(batch, 200.0)
        return machine.step_seconds(OFF, load) * machine.length(n) / machine.step_seconds(Arm("w4", n), load)

    assert gain(5, 1) > gain(3, 1) > 1.5 and gain(3, 2) > gain(5, 2) > 1.3 and gain(3, 8) < 0.8 and gain(3, 32) < 0.5


@pytest.mark.parametrize("mode", ["toggle", "adaptive", "ladder"])
def test_right_predictions_lose_next_to_nothing(mode: str) -> None:
    machine = Machine(passes())
    first, *rest = losses(machine, toggle_of(machine, mode), 5)
    assert first < 0.03  # the acceptance is learnt, each side measured
    assert sum(rest) / 4 < 0.008
    assert {arm.speculates for arm in machine.arms} == {True, False}


@pytest.mark.quick(every=5)
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("bias", ALL_FACTORS)
@pytest.mark.parametrize("mode", ["toggle", "adaptive"])
def test_predictions_wrong_by_two_are_put_right(mode: str, bias: tuple[float, float, float], timed: bool) -> None:
    machine = Machine(passes(), times_drafting=timed)
    toggle = Toggle(SpeculationConfig(mode=mode), FORMATS[:1], CalibratedCost(passes(*bias)), machine.clock)
    shares = losses(machine, toggle, 4)
    assert shares[0] < 0.12
    assert sum(shares[2:]) / 2 < (0.025 if timed else 0.035)


@pytest.mark.parametrize("mode", ["toggle", "adaptive"])
def test_noise_and_outliers_cost_little(mode: str) -> None:
    machine = Machine(passes(), noise=0.15, outliers=0.03)
    assert sum(losses(machine, toggle_of(machine, mode), 5)[1:]) / 4 < 0.02


def test_the_cost_model_of_the_runs_in_the_same_loop() -> None:
    machine = Machine(passes())
    toggle = Toggle(SpeculationConfig(mode="adaptive"), FORMATS, CalibratedCost(passes(1.0, 1.5, 1.0)), machine.clock)
    assert sum(losses(machine, toggle, 4)[2:]) / 2 < 0.03


def steps_until(machine: Machine, toggle: Toggle, wanted: bool) -> tuple[int, float]:
    """Steps and lost OFF steps until a steady load of four sequences is served as it should be, for ten steps in a row."""
    toggle.begin_rollout(True)
    running, right = [[10, 100_000] for _ in range(4)], 0
    start, lost = machine.step, machine.lost
    while right < 10 and machine.step - start < 3000:
        arm = toggle.decide(machine._load(running, 0, 0))
        right = right + 1 if arm.speculates == wanted else 0
        toggle.observe(machine._step(arm, running, 0, 0, toggle.arms))
    return machine.step - start - 10, (machine.lost - lost) / machine.step_seconds(OFF, machine._load(running, 0, 0))


def test_a_model_that_despairs_of_speculation_is_convinced() -> None:
    """It predicts 0.4x where the truth is 1.2x."""
    machine = Machine(passes(), noise=0.02)
    steps, lost = steps_until(machine, toggle_of(machine, "toggle", (0.5, 1.5, 1.5)), True)
    assert 0 < steps < 250 and lost < 60


def test_a_model_that_praises_speculation_is_put_right() -> None:
    """It predicts 2x and more where the truth is 0.6x."""
    machine = Machine(passes(), acceptance=lambda step: 0.5, noise=0.02)
    toggle = toggle_of(machine, "toggle", (2.0, 0.5, 0.5))
    toggle.acceptance["w4"].observe([400] * 3, [380, 361, 343], 100.0)
    steps, lost = steps_until(machine, toggle, False)
    assert 0 < steps < 60 and lost < 60


@pytest.mark.parametrize(("slow_when", "mode"), [(True, "toggle"), (True, "adaptive"), (False, "toggle"), (False, "adaptive")])
def test_a_machine_that_changes_on_one_side_is_followed(slow_when: bool, mode: str) -> None:
    machine = Machine(passes(), slow=lambda step, arm: 2.0 if step > 600 and arm.speculates == slow_when else 1.0)
    shares = losses(machine, toggle_of(machine, mode), 5)
    assert max(shares) < 0.08 and sum(shares[3:]) / 2 < 0.02


def test_a_collapse_of_the_acceptance_in_mid_rollout_is_noticed() -> None:
    machine = Machine(passes(), acceptance=lambda step: 0.93 if step < 250 else 0.3)
    toggle = toggle_of(machine, "toggle")
    assert losses(machine, toggle, 1, lambda _: [1500] * 2)[0] < 0.05
    assert any(arm.speculates for arm in machine.arms[:250])
    assert sum(arm.speculates for arm in machine.arms[350:]) < 0.03 * len(machine.arms)


def test_a_batch_that_fills_up_again_switches_off_and_on_again() -> None:
    """Twelve slots: short responses at first, then three long ones, then new ones that waited for nothing but time."""
    machine = Machine(passes(), noise=0.02)
    toggle = toggle_of(machine, "toggle")
    losses(machine, toggle, 1)
    toggle.begin_rollout(True)
    running = [[10, 10_000] for _ in range(2)]
    phases = []
    for count in (2, 30, 2, 30):
        running = (running * 15)[:count] if count > 2 else running[:2]
        running = [list(sequence) for sequence in running]
        arms = []
        for _ in range(40):
            arm = toggle.decide(machine._load(running, 0, 0))
            toggle.observe(machine._step(arm, running, 0, 0, toggle.arms))
            arms.append(arm.speculates)
        phases.append(sum(arms) / 40)
    assert phases[0] > 0.9 and phases[1] < 0.1 and phases[2] > 0.9 and phases[3] < 0.1


def test_probes_cost_less_than_half_a_percent_when_predictions_are_right() -> None:
    machine = Machine(passes(), noise=0.03, outliers=0.0)
    toggle = toggle_of(machine, "adaptive")
    losses(machine, toggle, 2)
    seconds, lost, probes = machine.seconds, 0.0, 0
    observe = toggle.observe

    def account(outcome: StepOutcome) -> None:
        nonlocal lost, probes
        if toggle._decision.reason is Reason.PROBE:
            best = min(machine.step_seconds(a, outcome.load) / machine.length(a.num_speculative_tokens) for a in toggle.arms)
            lost += machine.step_seconds(outcome.arm, outcome.load)
            lost -= best * machine.length(outcome.arm.num_speculative_tokens)
            probes += 1
        observe(outcome)

    toggle.observe = account  # type: ignore[method-assign]
    losses(machine, toggle, 6, lambda rollout: long_tailed(32, 50 + rollout))
    assert probes > 20
    assert lost / (machine.seconds - seconds) < 0.005


def test_few_changes_under_noise_at_a_steady_load() -> None:
    for batch in (1, 4, 6, 16):
        machine = Machine(passes(), noise=0.1, outliers=0.02, seed=batch)
        toggle = toggle_of(machine, "adaptive")
        toggle.begin_rollout(True)
        running = [[10, 100_000] for _ in range(batch)]
        for _ in range(1500):
            arm = toggle.decide(machine._load(running, 0, 0))
            toggle.observe(machine._step(arm, running, 0, 0, toggle.arms))
        assert toggle.trace.count(Reason.BETTER) < 30, batch


def test_modes_choose_from_what_they_should() -> None:
    machine = Machine(passes())
    assert Toggle(SpeculationConfig(mode="off"), (), Learner(passes())).arms == (OFF,)
    assert toggle_of(machine, "always", num_speculative_tokens=4).arms == (Arm("w4", 4),)
    assert toggle_of(machine, "toggle").arms == (OFF, N3)
    assert toggle_of(machine, "ladder").arms == (OFF, *(Arm("w4", n) for n in (5, 7, 9, 11)))
    adaptive = Toggle(SpeculationConfig(mode="adaptive"), FORMATS, Learner(passes()))
    assert adaptive.arms == (OFF, *(Arm(format, n) for format in FORMATS for n in range(1, 9)))
    for mode, arm in (("off", OFF), ("always", N3)):
        toggle = Toggle(SpeculationConfig(mode=mode), FORMATS[: mode != "off"], Learner(passes()), machine.clock)
        machine.rollout(toggle, [30] * 20, (OFF, N3))
        assert all(toggle.decide(Load(batch, 100.0)) == arm for batch in (1, 64))
        assert toggle.trace.count(Reason.FIXED) == len(toggle.trace) - 1  # but for the prompts


def test_the_best_arm_is_taken_however_close() -> None:
    learner = Learner(passes())
    toggle = Toggle(SpeculationConfig(mode="toggle"), FORMATS[:1], learner)
    toggle.begin_rollout(True)
    load = Load(4, 100.0)

    def chosen(advantage: float) -> Arm:
        """With drafts that are better by this share of the time per token."""
        learner.parts.clear()
        off, on = toggle.seconds_per_token(load)
        learner.parts["w4"] = [log(off * (1 - advantage) / on), 0]
        for _ in range(REFRESH):
            arm = toggle.decide(load)
        return arm

    assert [chosen(share) for share in (0.01, -0.01, 0.01)] == [N3, OFF, N3]
    toggle.decide(load, OFF)  # imposed: the next choice is free again
    assert chosen(0.01) == N3


def test_formats_are_chosen_between() -> None:
    """The second drafter is slower but accepted more often: where the first is poor it wins."""
    for rate, best in ((0.9, "w4"), (0.2, "w8")):
        toggle = Toggle(SpeculationConfig(mode="adaptive"), FORMATS, Learner(passes()))
        for format, accepted in (("w4", rate), ("w8", 0.95)):
            toggle.acceptance[format].observe([10_000] * 3, [int(10_000 * accepted**i) for i in (1, 2, 3)], 100.0)
        assert toggle.decide(Load(1, 100.0)).format == best


def test_prompts_in_a_pass_are_paid_once_whatever_the_arm() -> None:
    """A thousand prompt tokens take 40 steps' time: dividing that by the tokens of a draft would make drafts look good."""
    toggle = Toggle(SpeculationConfig(mode="toggle"), FORMATS[:1], Learner(passes()))
    bare, full = Load(16, 100.0), Load(16, 100.0, 1000)
    assert toggle.seconds_per_token(full) == pytest.approx(toggle.seconds_per_token(bare))
    assert toggle.decide(full) == OFF
    assert toggle.decide(Load(0, 0.0, 1000)) == OFF


def test_a_probe_stops_when_prompts_come() -> None:
    machine = Machine(passes())
    toggle = toggle_of(machine, "toggle")
    toggle.begin_rollout(True)
    running = [[10, 1000] for _ in range(8)]
    while toggle._decision.reason is not Reason.PROBE and len(toggle.trace) < 300:
        toggle.observe(machine._step(toggle.decide(machine._load(running, 0, 0)), running, 0, 0, toggle.arms))
    assert toggle.probes.arm == N3
    assert toggle.decide(Load(8, 100.0, 64)) == OFF and toggle.probes.arm is None


def test_an_imposed_arm_is_taken_observed_and_traced() -> None:
    machine = Machine(passes())
    toggle = toggle_of(machine, "toggle")
    toggle.begin_rollout(True)
    running = [[10, 1000] for _ in range(20)]
    for arm in (N3, OFF, Arm("w4", 7)):
        for _ in range(30):
            assert toggle.decide(machine._load(running, 0, 0), arm) == arm
            toggle.observe(machine._step(arm, running, 0, 0, toggle.arms))
    assert toggle.trace.count(Reason.IMPOSED) == 90
    assert toggle.acceptance["w4"].whole.tried[6] > 100
    assert toggle.decide(Load(20, 100.0)) == OFF


def test_a_validation_rollout_leaves_no_trace() -> None:
    machine = Machine(passes())
    toggle = toggle_of(machine, "adaptive", (1.0, 1.5, 0.7))
    losses(machine, toggle, 2)
    toggle.probes._due.clear()  # every probe is due,
    toggle.probes._budget, toggle.probes._quiet_until = 100.0, 0  # and can be paid
    before = json.dumps(toggle.state_dict())
    machine.rollout(toggle, long_tailed(16, 9), toggle.arms, learns=False)
    assert len(toggle.trace) > 100 and toggle.trace.count(Reason.PROBE) == 0
    assert json.dumps(toggle.state_dict()) == before
    ladder = toggle_of(machine, "ladder")
    for _ in range(4):
        machine.rollout(ladder, [100], ladder.arms, learns=False)
    assert ladder.ladder is not None and ladder.ladder.rung == 5


def test_a_loss_is_logged_with_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """The cluster imposes drafts at every size: that loses at sixteen sequences, and gains at one."""
    machine = Machine(passes(), noise=0.02, outliers=0.0)
    toggle = toggle_of(machine, "toggle")
    toggle.begin_rollout(True)
    for running in ([[10, 200] for _ in range(16)], [[10, 60]]):
        while running:
            toggle.decide(machine._load(running, 0, 0), N3)
            toggle.observe(machine._step(N3, running, 0, 0, toggle.arms))
            running = [s for s in running if s[0] < s[1]]
    with caplog.at_level(logging.WARNING):
        toggle.end_rollout()
    assert "speculation lost" in caplog.text and " s at 16-31 sequences" in caplog.text and len(caplog.records) == 1
    assert "1-1" not in caplog.text


def test_the_loss_of_probes_alone_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A model on which drafts never pay, in rollouts of which the first probes are a good part."""
    machine = Machine(passes(draft=5.0))
    toggle = Toggle(SpeculationConfig(mode="adaptive"), FORMATS[:1], Learner(passes(draft=5.0)), machine.clock)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            machine.rollout(toggle, [12, 20, 30], toggle.arms)
    assert any(arm.speculates for arm in machine.arms)
    assert not caplog.records


def test_rollouts_that_gain_log_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(passes())
    toggle = toggle_of(machine, "adaptive")
    caplog.set_level(logging.INFO)
    for rollout in range(4):
        machine.rollout(toggle, long_tailed(32, rollout), toggle.arms)
        assert not caplog.records and toggle.metrics()["saved_seconds"] > 0


def test_metrics_agree_with_the_truth() -> None:
    machine = Machine(passes(), noise=0.02, outliers=0.0)
    toggle = toggle_of(machine, "adaptive")
    losses(machine, toggle, 3)
    seconds, lost = machine.seconds, machine.lost
    machine.rollout(toggle, long_tailed(32, 7), toggle.arms)
    metrics = toggle.metrics()
    off = Machine(passes(), noise=0.0, outliers=0.0)
    off.rollout(Toggle(SpeculationConfig(mode="off"), (), Learner(passes()), off.clock), long_tailed(32, 7), (OFF,))
    assert metrics["saved_seconds"] == pytest.approx(off.seconds - (machine.seconds - seconds), rel=0.15)
    assert metrics["regret_seconds"] == pytest.approx(machine.lost - lost, abs=0.01 * (machine.seconds - seconds))
    assert metrics["predicted_over_measured"] == pytest.approx(1, abs=0.05)
    assert metrics["expected_length/w4"] == pytest.approx(1 + 0.93 + 0.93**2 + 0.93**3, abs=0.15)
    assert 0.2 < metrics["share_speculating"] < 0.9 and metrics["switches"] >= 1
    assert all(isinstance(value, float) for value in metrics.values())


def test_it_says_why() -> None:
    toggle = Toggle(SpeculationConfig(mode="toggle"), FORMATS[:1], Learner(passes()))
    assert toggle.explain() == "off: no sequence decodes"
    assert toggle.explain(Load(1, 100.0)).startswith("on: at 1 sequence w4 n=3 costs ")
    words = toggle.explain(Load(32, 100.0))
    assert words.startswith("off: at 32 sequences w4 n=3 costs ") and "tokens, 0." in words
    toggle.begin_rollout(True)
    toggle.decide(Load(32, 100.0), N3)
    assert toggle.explain().startswith("on (the cluster's choice): at 32 sequences w4 n=3 costs ")
    toggle.decide(Load(1, 100.0))
    toggle.decide(Load(0, 0.0, 64))
    assert toggle.explain().startswith("on: at 1 sequence w4 n=3 costs ")  # the passes in between had none
    assert Toggle(SpeculationConfig(mode="off"), (), Learner(passes())).explain() == "off: speculation.mode is off"


LOADS = st.builds(Load, st.integers(1, 64), st.floats(0, 4000), st.sampled_from([0, 0, 0, 64]), st.integers(0, 10))


@settings(max_examples=60)
@given(st.lists(LOADS, min_size=1, max_size=60), st.sampled_from(["toggle", "adaptive", "ladder"]), st.integers(0, 5))
def test_the_choice_is_the_best_and_a_function_of_what_was_seen(loads: list[Load], mode: str, seed: int) -> None:
    machines = [Machine(passes(), seed=seed) for _ in range(2)]
    toggles = [toggle_of(machine, mode) for machine in machines]
    for toggle in toggles:
        toggle.begin_rollout(True)
    for load in loads:
        arms = []
        for toggle, machine in zip(toggles, machines, strict=True):
            arms.append(arm := toggle.decide(load))
            if toggle._decision.reason in (Reason.KEPT, Reason.BETTER):
                assert toggle._values[toggle.arms.index(arm)] == min(toggle._values)
            running = [[1 + int(load.context), 10_000] for _ in range(load.decoding)]
            toggle.observe(machine._step(arm, running, load.prefill_tokens, 0, toggle.arms))
        assert arms[0] == arms[1]


@pytest.mark.parametrize("mode", ["toggle", "adaptive", "ladder"])
def test_what_was_learnt_goes_through_a_checkpoint(mode: str) -> None:
    machine = Machine(passes())
    toggle = toggle_of(machine, mode, (1.0, 1.5, 0.7))
    losses(machine, toggle, 2)
    state = json.loads(json.dumps(toggle.state_dict()))
    again = toggle_of(machine, mode, (1.0, 1.5, 0.7))
    again.load_state_dict(state)
    assert json.loads(json.dumps(again.state_dict())) == state
    twin = replace(machine)
    twin.rng.setstate(machine.rng.getstate())
    machine.rollout(toggle, long_tailed(16, 5), toggle.arms)
    twin.rollout(again, long_tailed(16, 5), again.arms)
    assert machine.arms[-200:] == twin.arms[-200:]


def test_a_state_of_other_drafters_is_taken_as_far_as_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(passes())
    toggle = Toggle(SpeculationConfig(mode="adaptive"), FORMATS, Learner(passes()), machine.clock)
    losses(machine, toggle, 1)
    state = json.loads(json.dumps(toggle.state_dict()))
    other = toggle_of(machine, "ladder")
    with caplog.at_level(logging.INFO):
        other.load_state_dict(state)
    assert "w8" in caplog.text
    assert other.acceptance["w4"].whole.rates(3) == toggle.acceptance["w4"].whole.rates(3)
    assert other.decide(Load(1, 100.0)).speculates


@pytest.mark.parametrize("key", ["acceptance", "ladder", "probes", "endings"])
def test_a_damaged_state_is_refused(key: str) -> None:
    toggle = Toggle(SpeculationConfig(mode="ladder"), FORMATS, Learner(passes()))
    for damage in (1, "x", {"w4": 3}, [None]):
        with pytest.raises(ValueError, match="no state of a toggle"):
            toggle.load_state_dict({**toggle.state_dict(), key: damage})
    state = toggle.state_dict()
    del state[key]
    with pytest.raises(ValueError, match="no state of a toggle"):
        toggle.load_state_dict(state)


def test_of_a_drafter_that_is_replaced_nothing_is_kept() -> None:
    toggle = Toggle(SpeculationConfig(mode="adaptive"), FORMATS, CalibratedCost(passes()))
    fresh = Toggle(SpeculationConfig(mode="adaptive"), FORMATS, CalibratedCost(passes()))
    toggle.begin_rollout(True)
    load = Load(4, 100.0)
    for format in 3 * FORMATS:
        toggle.decide(load, Arm(format, 2))
        toggle.observe(StepOutcome(Arm(format, 2), load, 0.5, 0.0, 5, (4, 4), (1, 0), 0))
    toggle.forget(FORMATS[0])
    kept, dropped = (toggle.acceptance[format].state_dict() for format in (FORMATS[1], FORMATS[0]))
    assert dropped == fresh.acceptance[FORMATS[0]].state_dict() != kept
    state = toggle.cost.state_dict()
    for known in ("kinds", "cells"):
        names = {row[0] for row in state[known]}
        assert f"draft {FORMATS[1]}" in names and f"draft {FORMATS[0]}" not in names


def test_a_state_with_the_former_backoff_loads() -> None:
    machine = Machine(passes())
    learnt, fresh = toggle_of(machine, "ladder"), toggle_of(machine, "ladder")
    losses(machine, learnt, 1)
    fresh.load_state_dict({**learnt.state_dict(), "backoff": {"losses": [[5, 2]], "left": [[5, 1]]}})
    assert fresh.state_dict() == learnt.state_dict()


def test_a_damaged_state_changes_nothing() -> None:
    machine = Machine(passes())
    learnt, fresh = toggle_of(machine, "ladder"), toggle_of(machine, "ladder")
    losses(machine, learnt, 2)
    before = fresh.state_dict()
    for key in ("probes", "endings", "cost"):
        with pytest.raises(ValueError, match="no state of a toggle"):
            fresh.load_state_dict({**learnt.state_dict(), key: {}})
        assert fresh.state_dict() == before != learnt.state_dict()


def test_steps_whose_drafts_were_cut_teach_no_cost() -> None:
    toggle = Toggle(SpeculationConfig(mode="toggle"), FORMATS[:1], Learner(passes()))
    toggle.begin_rollout(True)
    load = Load(4, 100.0)
    before = toggle.cost.step_seconds(N3, load)
    for drafted in ((4, 2, 0), (2, 2, 2)):
        toggle.decide(load, N3)
        toggle.observe(StepOutcome(N3, load, 99.0, 0.0, 8, drafted, drafted))
    assert toggle.cost.step_seconds(N3, load) == before
    toggle.observe(StepOutcome(N3, load, 99.0, 0.0, 8, (4, 4, 4), (4, 4, 4)))
    assert toggle.cost.step_seconds(N3, load) > before


def test_steps_without_drafts_are_their_arms_and_their_search_is_not_the_targets() -> None:
    """300 of them, whose search takes a fifth of the pass."""
    toggle = Toggle(SpeculationConfig(mode="always"), ("ngram",), CalibratedCost(searching()))
    toggle.begin_rollout(True)
    load, before = Load(8, 200.0), toggle.acceptance["ngram"].state_dict()["whole"]
    arm, once = toggle.arms[0], toggle.cost.step_seconds(OFF, load)
    for _ in range(300):
        toggle.decide(load)
        toggle.observe(StepOutcome(arm, load, 1.2 * once, 0.2 * once, emitted=8, requested=24))
    assert toggle.cost.step_seconds(OFF, load) == pytest.approx(once, rel=0.01)
    known = toggle.acceptance["ngram"]
    assert known.state_dict()["whole"] == before and not known.parts, "no draft was rejected"
    assert known.proposed.value < 1e-3
    assert toggle.seconds_per_token(load)[0] == pytest.approx(1.2 * once, rel=0.05)
    toggle.end_rollout()
    metrics = toggle.metrics()
    assert metrics["share_without_drafts"] == metrics["share_speculating"] == 1
    assert metrics["saved_seconds"] == pytest.approx(300 * -0.2 * once, rel=0.05)


def searching(target: float = 1.0, draft: float = 1.0, verify: float = 1.0) -> PassTimes:
    """The machine of the tests with a proposer that runs no model: its search takes a little time per sequence."""
    roofline = passes(target, draft, verify).roofline
    size = replace(roofline.size, draft_bytes={"ngram": 0.0})
    return PassTimes(replace(roofline, size=size, draft={"ngram": PassCost(1.0, 1.0, per_sequence=1e-5 * draft)}))


def covered(
    coverage: float, rate: float, mode: str, batch: int, bias: tuple[float, float, float] = RIGHT
) -> tuple[Machine, Toggle]:
    """A machine on which a share of the sequences has a draft, after three rollouts of one batch size."""
    machine = Machine(searching(), acceptance=lambda step: rate, coverage=coverage, outliers=0.0, noise=0.02)
    config = SpeculationConfig(mode=mode, proposer="ngram")  # type: ignore[arg-type]
    toggle = Toggle(config, ("ngram",), CalibratedCost(searching(*bias)), machine.clock)
    choices = tuple(Arm("ngram", n) for n in range(1, 9))
    for _ in range(3):
        machine.rollout(toggle, [400] * batch, (OFF, *choices), slots=batch)
    return machine, toggle


@pytest.mark.quick(every=5)
@pytest.mark.parametrize("bias", [RIGHT, (1.0, 1.0, 1 / 1.6)], ids=["calibrated", "verify-too-cheap"])
@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("coverage", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_drafts_of_some_sequences_are_taken_where_they_pay(
    batch: int, coverage: float, rate: float, bias: tuple[float, float, float]
) -> None:
    """`adaptive` loses at most 1 % where no arm pays, and a few against the best arm of every step where one does."""
    machine, _ = covered(coverage, rate, "adaptive", batch, bias)
    lost = machine.lost / machine.seconds
    pays = any(arm.speculates for arm in machine.best_arms)
    assert lost < (0.04 if pays else 0.01), f"{lost:.1%} lost, best {machine.best_arms[-1]}"


def test_what_is_said_of_drafts_of_some_sequences_is_what_is_measured() -> None:
    """`always`, although verify passes take 1.6 times as long as calibrated and three in ten sequences have a draft."""
    machine, toggle = covered(0.3, 0.7, "always", 8, (1.0, 1.0, 1 / 1.6))
    assert toggle.metrics()["predicted_over_measured"] == pytest.approx(1.0, abs=0.03)
    load, arm = Load(8, 300.0), toggle.arms[0]
    truth = machine.length(3) * machine.step_seconds(OFF, load) / machine.step_seconds(arm, load)
    said = float(toggle.explain(load).split(", ")[-1].split("x")[0])
    assert said == pytest.approx(truth, rel=0.1)
    again = Toggle(toggle.options, ("ngram",), CalibratedCost(searching()))
    again.load_state_dict(json.loads(json.dumps(toggle.state_dict())))
    assert again.acceptance["ngram"].proposed.value == toggle.acceptance["ngram"].proposed.value == pytest.approx(0.3, abs=0.1)


def test_a_proposer_that_has_all_its_drafts_is_predicted_as_if_that_were_known() -> None:
    """To the bit: its share stays 1, in any number of steps and rollouts."""
    machine, options = Machine(passes()), SpeculationConfig(mode="adaptive")
    toggle = Toggle(options, FORMATS[:1], CalibratedCost(passes(draft=1.5)), machine.clock)
    losses(machine, toggle, 3)
    assert toggle.acceptance["w4"].proposed.value == 1.0
    state = toggle.state_dict()
    del state["acceptance"]["w4"]["proposed"]  # type: ignore[index]
    fresh, load = Toggle(options, FORMATS[:1], CalibratedCost(passes(draft=1.5))), Load(5, 120.0)
    fresh.load_state_dict(state)
    assert fresh.seconds_per_token(load) == toggle.seconds_per_token(load)


def test_responses_that_end_often_make_long_drafts_worth_less() -> None:
    toggle = Toggle(SpeculationConfig(mode="toggle"), FORMATS[:1], Learner(passes()))
    toggle.begin_rollout(True)
    load = Load(8, 100.0)
    before = toggle.seconds_per_token(load)
    for _ in range(100):
        toggle.decide(load, OFF)
        toggle.observe(StepOutcome(OFF, load, toggle.cost.step_seconds(OFF, load), 0.0, 8, finished=1))
    after = toggle.seconds_per_token(load)
    assert after[0] == pytest.approx(before[0]) and after[1] > 1.1 * before[1]


def test_a_ladder_climbs_and_descends_when_rollouts_in_a_row_ask_for_it() -> None:
    ladder = Ladder(LadderConfig(rungs=(5, 7, 9), persistence=2))
    rungs = []
    for rate in (0.95, 0.9, 0.95, 0.95, 0.99, 0.99, 0.99, 0.99, 0.8, 0.95, 0.8, 0.8, 0.8, 0.8, 0.1, 0.1):
        ladder.end_rollout(rate)
        rungs.append(ladder.rung)
    assert rungs == [5, 5, 5, 7, 7, 9, 9, 9, 9, 9, 9, 7, 7, 5, 5, 5]


def test_a_ladder_with_other_rungs_goes_on_at_the_nearest() -> None:
    ladder = Ladder(LadderConfig(rungs=(2, 4, 8)))
    ladder.load_state_dict({"rung": 7, "wish": 1})
    assert ladder.rung == 8
    assert ladder.end_rollout(0.99) is False  # the highest
    with pytest.raises(ValueError, match="rung"):
        ladder.load_state_dict({"rung": "x", "wish": 0})


def test_the_ladder_moves_with_the_acceptance_and_only_its_rung_is_used() -> None:
    machine = Machine(passes(), acceptance=lambda step: 0.99)
    toggle = toggle_of(machine, "ladder", toggle=ToggleConfig(ladder=LadderConfig(rungs=(2, 3), persistence=2)))
    for rungs in ({2}, {2}, {3}):
        start = len(machine.arms)
        machine.rollout(toggle, long_tailed(8, 1), toggle.arms)
        assert {arm.num_speculative_tokens for arm in machine.arms[start:]} == rungs | {0}
    toggle.end_rollout(acceptance_rate=0.1)  # the cluster's
    toggle.end_rollout(acceptance_rate=0.1)
    assert toggle.ladder is not None and toggle.ladder.rung == 2


def drive(probes: Probes, steps: int, seconds: float, worth: float, measured: float) -> list[int]:
    """Steps at which an arm was measured at a steady load; autoregressive steps take one second."""
    taken = []
    for step in range(steps):
        if probes.arm is None and probes.may_start():
            probes.start(N3, 4, seconds, worth, 1.0)
        if probes.arm is not None:
            taken.append(step)
            probes.measured(seconds, measured)
        else:
            probes.seen(OFF, 4)
        probes.passed(1.0)
    return taken


def test_probes_come_at_once_then_by_the_interval() -> None:
    assert drive(Probes(200, 2), 500, 1.1, 1.0, 1.1) == [AT_ONCE, AT_ONCE + 1, 205, 206, 406, 407]
    assert drive(Probes(0, 2), 500, 1.1, 1.0, 1.1) == []


def test_probes_stay_within_their_budget() -> None:
    taken = drive(Probes(100, 2), 20_000, 4.0, 1.0, 4.0)
    assert len(taken) >= 2
    assert len(taken) * 3.0 <= SHARE * 20_000 + 6


def test_plans_of_earlier_versions_load() -> None:
    """They had a fifth entry, the wait between two probes."""
    probes = Probes(200, 2)
    probes.load_state_dict({"budget": 1.0, "quiet": 3, "plans": [["w4", 3, 3, 20, 400]]})
    assert not probes.may_start() and probes.state_dict()["plans"] == [["w4", 3, 3, 20]]


def test_an_outlier_does_not_end_probing() -> None:
    probes = Probes(100, 2)
    drive(probes, 50, 1.1, 1.0, 50.0)
    assert probes._budget is not None and probes._budget > 5.0


def test_a_probe_whose_drafts_are_cut_ends_and_is_paid_for() -> None:
    """A pool that is nearly full gives 70 % of the drafts: such steps say nothing of the arm, and must not go on for ever."""
    toggle = Toggle(SpeculationConfig(mode="toggle"), FORMATS[:1], Learner(passes()))
    toggle.begin_rollout(True)
    load = Load(8, 100.0)
    probes = 0
    for _ in range(1000):
        arm = toggle.decide(load)
        drafted = (8, 8, 1) if arm.speculates else ()
        accepted = (7, 6, 1) if arm.speculates else ()
        probes += toggle.probes.arm is not None
        seconds = toggle.cost.step_seconds(arm, load)
        toggle.observe(StepOutcome(arm, load, seconds, emitted=8 + sum(accepted), drafted_at=drafted, accepted_at=accepted))
    assert 0 < probes < 30


def test_every_drafter_gets_its_chance() -> None:
    """The first one is accepted well enough never to be doubted; the second, as quick, is accepted more often."""
    config = SpeculationConfig(mode="adaptive")
    toggle = Toggle(config, ("w4", "w4b"), Learner(passes_of_two()))
    for _ in range(3):
        toggle.begin_rollout(True)
        for step in range(400):
            arm = toggle.decide(Load(1, 100.0))
            rate = {"": 0.0, "w4": 0.82, "w4b": 0.99}[arm.format]
            accepted = tuple(int((step * 7919 % 1000) / 1000 < rate ** (i + 1)) for i in range(arm.num_speculative_tokens))
            drafted = (1,) * arm.num_speculative_tokens
            seconds = toggle.cost.step_seconds(arm, Load(1, 100.0))
            toggle.observe(StepOutcome(arm, Load(1, 100.0), seconds, 0.0, 1 + sum(accepted), drafted, accepted))
    assert arm.format == "w4b"


def passes_of_two() -> PassTimes:
    """Two drafters that cost the same."""
    one = passes()
    roofline = one.roofline
    size = replace(roofline.size, draft_bytes={"w4": roofline.size.draft_bytes["w4"], "w4b": roofline.size.draft_bytes["w4"]})
    return PassTimes(replace(roofline, size=size, draft={"w4": roofline.draft["w4"], "w4b": roofline.draft["w4"]}))


def test_prompts_cost_the_same_beside_any_arm() -> None:
    cost = CalibratedCost(passes())
    added = [
        cost.step_seconds(arm, Load(8, 100.0, 512)) - cost.step_seconds(arm, Load(8, 100.0)) for arm in (OFF, N3, Arm("w4", 7))
    ]
    assert added[0] == pytest.approx(added[1]) == pytest.approx(added[2]) and added[0] > 0
