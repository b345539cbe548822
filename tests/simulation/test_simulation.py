"""The simulator: nothing is lost, closed forms, jumps against steps, and the real toggle and state machine under it."""

import argparse
import csv
import json
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from erollout.configuration.speculation import DrafterConfig, SpeculationConfig
from erollout.errors import UserError
from erollout.simulation.commands import add_command
from erollout.simulation.draft_outcomes import SimulatedAcceptance, parse_acceptance
from erollout.simulation.experiment import Setting, SimulatedRollout, Strategy, simulate
from erollout.simulation.jumping import JumpingReplica
from erollout.simulation.plot_files import bins_of
from erollout.simulation.replica import Limits, Part, Replica
from erollout.simulation.report import Estimate, rest_of_step, summarize
from erollout.simulation.stepwise import StepwiseReplica
from erollout.simulation.truth import Oracle, Truth
from erollout.simulation.workload import Lognormal, Workload, parse_lengths, read_trace
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.roofline import ModelSize, PassCost, Roofline
from erollout.speculation.step import OFF, Arm, Load, StepOutcome

FORMAT = "w4a16"
KINDS = ("step", "jump")


def passes(draft: float = 0.35, compute: float = 20.0, kv: float = 0.0, per_sequence: float = 0.0) -> PassTimes:
    """A pass over one sequence takes 10 ms, a draft `draft` of that; from compute tokens on it takes longer with each."""
    size = ModelSize(0.01, {FORMAT: 0.01 * draft}, flops=0.01 / compute, attention_flops=0.0, kv_bytes=kv)
    cost = PassCost(bandwidth=1.0, compute=1.0, per_sequence=per_sequence)
    return PassTimes(Roofline(size, cost, cost, {FORMAT: cost}))


def setting(**changes: object) -> Setting:
    times = passes()
    speculation = SpeculationConfig(num_speculative_tokens=3, drafter=DrafterConfig(format=FORMAT), trace_interval=0)
    given = Setting(
        times,
        times,
        SimulatedAcceptance.constant(0.9),
        Lognormal(60, 1.0, prompt_tokens=10),
        2,
        16,
        4,
        400,
        Limits(16, 64),
        speculation,
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def only(setting: Setting, mode: str, policy: str = "replica", dispatch: str = "static", seed: int = 0) -> SimulatedRollout:
    (outcome,) = simulate(setting, Strategy(mode, policy, dispatch), seed)  # type: ignore[arg-type]
    return outcome


class Always:
    """Another arm at each step, in turn."""

    def __init__(self, *arms: Arm) -> None:
        self.arms = tuple(dict.fromkeys((OFF, *arms)))
        self.turn = arms
        self.outcomes: list[StepOutcome] = []

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm:
        return imposed or self.turn[len(self.outcomes) % len(self.turn)]

    def observe(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        return (1.0,) * len(self.arms)


def make(
    kind: str,
    workload: Workload,
    chooser: Always | Oracle,
    limits: Limits,
    times: PassTimes | None = None,
    acceptance: float = 0.9,
) -> Replica:
    truth = Truth(times or passes(), SimulatedAcceptance.constant(acceptance), [Arm(FORMAT, n) for n in range(1, 9)])
    generator = np.random.default_rng(7)
    if kind == "jump":
        return JumpingReplica(workload, truth, chooser, limits, generator)
    return StepwiseReplica(workload, truth, chooser, limits, generator, int(workload.response_tokens.max()) + 50)


def workload_of(*lengths: tuple[int, ...], prompt: int = 5) -> Workload:
    return Workload(np.full(len(lengths), prompt), np.array(lengths))


@pytest.mark.quick(every=7)
@pytest.mark.parametrize("stepwise", [True, False], ids=KINDS)
@pytest.mark.parametrize("dispatch", ["static", "dynamic"])
@pytest.mark.parametrize("policy", ["replica", "cluster", "makespan"])
@pytest.mark.parametrize("mode", ["off", "always", "toggle", "ladder", "adaptive", "oracle"])
def test_every_token_is_emitted_once(mode: str, policy: str, dispatch: str, stepwise: bool) -> None:
    lengths = Lognormal(30, 1.0, prompt_tokens=10)
    given = setting(stepwise=stepwise, num_prompts=10, limits=Limits(8, 64), lengths=lengths)
    outcome = only(given, mode, policy, dispatch)
    workload = given.lengths.draw(10, 4, 400, np.random.default_rng([0, 0]))
    assert outcome.tokens == workload.tokens
    assert 0 < outcome.busy <= 1 and 0 <= outcome.speculating <= 1 and outcome.batch <= 8
    assert 0 <= outcome.regret < 0.6
    # one pass emits at most its drafts and one token more, and no pass takes less than the target's at one sequence
    longest = int(workload.response_tokens.max())
    assert outcome.seconds >= (longest if mode == "off" else longest / 12) * 0.01
    assert (outcome.speculating > 0) == (mode != "off")
    assert (outcome.windows > 0) == (policy != "replica" or dispatch == "dynamic")


@pytest.mark.parametrize("kind", KINDS)
def test_autoregressive_decoding_has_a_closed_form(kind: str) -> None:
    """A pass costs 10 ms up to 20 tokens: the prompt's pass gives every response its first token."""
    replica = make(kind, workload_of((30, 50, 7), (1, 90, 2)), Always(OFF), Limits(8, 64))
    replica.take([0, 1])
    replica.run_until(inf)
    assert replica.finished_at == pytest.approx(0.9)
    assert replica.ledger.steps == 90 and replica.ledger.tokens == 180 and replica.ledger.finished == 6
    assert replica.ledger.decoding == pytest.approx(0.01 * (180 - 6))  # the first tokens are those of the prompts' pass


@pytest.mark.parametrize("kind", KINDS)
def test_context_and_prompts_cost_what_the_truth_says(kind: str) -> None:
    """1 ms per 100 tokens in the cache, and per prompt token a twentieth of a pass beyond the twentieth."""
    times = passes(kv=1e-5)
    replica = make(kind, workload_of((1000,), prompt=100), Always(OFF), Limits(8, 200), times)
    replica.take([0])
    replica.run_until(inf)
    decode = 999 * 0.01 + 1e-5 * sum(range(100, 1099))
    assert replica.finished_at == pytest.approx(0.05 + decode, rel=0.006)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_filled_in_order_of_arrival(kind: str) -> None:
    replica = make(kind, workload_of((10, 20), (30, 40)), Always(OFF), Limits(2, 64))
    replica.take([0, 1])
    replica.run_until(inf)
    # the first pass takes both prompts; the response of 10 tokens leaves its place to its sibling, that to the last
    assert replica.ledger.steps == 10 + 19 + 39 and replica.ledger.tokens == 100


@pytest.mark.parametrize("kind", KINDS)
def test_responses_move_with_their_tokens(kind: str) -> None:
    workload = workload_of((40, 60, 80))
    source, target = (make(kind, workload, Always(OFF), Limits(8, 64)) for _ in range(2))
    source.take([0])
    source.run_until(0.205)
    parts = source.release(2)
    assert parts == [Part(0, 2, 21), Part(0, 1, 21)] and source.outstanding == 1  # the last to come cost least to lose
    target.run_until(source.now)
    target.arrive(parts)
    assert target.outstanding == 2
    for replica in (source, target):
        replica.run_until(inf)
    assert source.finished_at == pytest.approx(0.4)
    prompts = 2 * (5 + 21) / 20 * 0.01  # computed in one pass, which also gives the next token
    assert target.finished_at == pytest.approx(0.21 + prompts + 0.01 * 58)
    assert source.ledger.tokens + target.ledger.tokens == 180 and target.ledger.recomputed_tokens == 42


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_others_wait_for_stays(kind: str) -> None:
    replica = make(kind, workload_of((40, 60), prompt=100), Always(OFF), Limits(8, 16))
    replica.take([0])
    replica.run_until(0.015)
    assert replica.release(5) == [] and replica.outstanding == 2


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("arms", [(OFF,), (Arm(FORMAT, 3),), (Arm(FORMAT, 7),), (OFF, Arm(FORMAT, 1), Arm(FORMAT, 4))], ids=str)
@pytest.mark.parametrize("group", [1, 8])
def test_jumps_agree_with_steps(arms: tuple[Arm, ...], group: int) -> None:
    """The same seconds, within the noise of the drawn acceptance."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    batch: dict[str, list[float]] = {kind: [] for kind in KINDS}
    times = passes(kv=1e-6)
    for seed in range(1 if arms == (OFF,) else 5):
        workload = Lognormal(300, 0.8).draw(32 // group, group, 1200, np.random.default_rng(seed))
        for kind in KINDS:
            chooser = Oracle(Truth(times, SimulatedAcceptance.constant(0.97), arms)) if len(arms) > 1 else Always(*arms)
            replica = make(kind, workload, chooser, Limits(24, 256), times, 0.97)
            replica.generator = np.random.default_rng([seed, 1])
            replica.take(range(workload.num_prompts))
            replica.run_until(inf)
            seconds[kind].append(replica.finished_at)
            batch[kind].append(replica.ledger.decoding / replica.ledger.busy)
    assert fmean(seconds["jump"]) == pytest.approx(fmean(seconds["step"]), rel=0.002 if arms == (OFF,) else 0.01)
    assert fmean(batch["jump"]) == pytest.approx(fmean(batch["step"]), rel=0.01)


def test_whole_clusters_agree_too() -> None:
    given = setting(
        lengths=Lognormal(250, 1.0, prompt_tokens=10),
        acceptance=SimulatedAcceptance.constant(0.95),
        max_tokens=1000,
        limits=Limits(32, 256),
        num_prompts=24,
        rollouts=2,
        warm_up=1,
    )
    ratios = []
    for seed in range(3):
        one, other = (only(replace(given, stepwise=each), "adaptive", "makespan", "dynamic", seed) for each in (True, False))
        ratios.append(other.seconds / one.seconds)
    assert fmean(ratios) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("stepwise", [True, False], ids=KINDS)
def test_equal_seeds_give_equal_rollouts(stepwise: bool) -> None:
    given = setting(stepwise=stepwise, noise=0.1)
    one, again, other = (only(given, "adaptive", "makespan", "dynamic", seed) for seed in (3, 3, 4))
    assert one == again and one.seconds != other.seconds


def test_noise_leaves_the_mean() -> None:
    quiet, noisy = (fmean(only(setting(noise=noise), "off", seed=s).seconds for s in range(4)) for noise in (0.0, 0.2))
    assert noisy == pytest.approx(quiet, rel=0.05) and noisy != quiet


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("slots", [2, 24])
@pytest.mark.parametrize("mode", ["toggle", "adaptive"])
def test_with_a_right_cost_model_the_toggle_is_never_worse(mode: str, slots: int) -> None:
    """By more than 2 % than the better of off and always, once it has seen a rollout."""
    given = setting(limits=Limits(slots, 64), rollouts=2, warm_up=1, replicas=1, num_prompts=8)
    seconds = {m: fmean(only(given, m, seed=s).seconds for s in range(3)) for m in ("off", "always", mode)}
    assert seconds[mode] <= 1.02 * min(seconds["off"], seconds["always"])


def test_rebalancing_shortens_an_uneven_tail() -> None:
    """One replica of four has all the long responses."""
    lengths = tuple((300,) * 8 if prompt % 4 == 0 else (20,) * 8 for prompt in range(8))
    times = passes(compute=4.0)
    given = setting(
        passes=times,
        truth=times,
        lengths=Fixed(lengths),
        replicas=4,
        num_prompts=8,
        group_size=8,
        window_seconds=0.05,
        rollouts=2,
        warm_up=1,
    )
    for mode in ("off", "adaptive"):
        alone, together = (only(given, mode, policy).seconds for policy in ("replica", "makespan"))
        assert together < 0.8 * alone


@pytest.mark.parametrize("dispatch", ["static", "dynamic"])
def test_rebalancing_never_costs_much(dispatch: str) -> None:
    times = passes(compute=4.0)
    given = setting(passes=times, truth=times, replicas=4, num_prompts=32, rollouts=2, warm_up=1, stepwise=False)
    moved = 0
    for seed in range(6):
        alone, together = (only(given, "off", policy, dispatch, seed) for policy in ("replica", "makespan"))
        assert together.seconds <= 1.01 * alone.seconds
        moved += together.sequences_moved
    assert moved > 0 or dispatch == "dynamic"  # which leaves little to move


class Fixed:
    """The same responses in each rollout."""

    def __init__(self, lengths: tuple[tuple[int, ...], ...]) -> None:
        self.lengths = lengths

    def draw(self, num_prompts: int, group_size: int, max_tokens: int, generator: np.random.Generator) -> Workload:
        return workload_of(*self.lengths)


@pytest.mark.parametrize("replicas", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
def test_thousands_of_replicas(replicas: int) -> None:
    lengths = Lognormal(15, 0.5, prompt_tokens=10)
    given = setting(replicas=replicas, num_prompts=replicas, group_size=1, stepwise=False, lengths=lengths)
    outcome = only(given, "oracle")
    assert outcome.tokens > replicas * 15 and len(outcome.spans) == 64
    assert 0 < outcome.busy < 0.5  # the longest response of all decides


def test_a_small_cache_preempts() -> None:
    given = setting(replicas=1, limits=Limits(16, 64, kv_tokens=1024), num_prompts=8)
    small, large = only(given, "off"), only(replace(given, limits=Limits(16, 64)), "off")
    assert small.preemptions > 0 == large.preemptions
    assert small.tokens == large.tokens and small.seconds > large.seconds


def test_spans_cover_the_working_time() -> None:
    outcome = only(setting(), "adaptive")
    for spans in outcome.spans:
        bins, worked = bins_of(spans, outcome.seconds), sum(span.end - span.start for span in spans)
        assert sum(each.busy for each in bins) * outcome.seconds / len(bins) == pytest.approx(worked)
        assert sum(each.speculating for each in bins) <= sum(each.busy for each in bins)
        assert all(a.end <= b.start + 1e-12 for a, b in pairwise(spans))
    assert sum(s.end - s.start for spans in outcome.spans for s in spans) == pytest.approx(outcome.busy * 2 * outcome.seconds)


def test_acceptance_has_its_moments() -> None:
    acceptance = SimulatedAcceptance((0.9, 0.7, 0.6))
    generator = np.random.default_rng(0)
    drawn = [1 + acceptance.draw(5, chance) for chance in generator.random(40_000).tolist()]
    assert acceptance.length(3) == pytest.approx(1 + 0.9 + 0.7 + 0.6)
    assert fmean(drawn) == pytest.approx(acceptance.length(5), abs=0.03)
    assert np.var(drawn) == pytest.approx(acceptance.variance(5), rel=0.02)
    assert acceptance.shares[3] == pytest.approx(0.6 * 0.6 / 0.7) and acceptance.length(0) == 1


@pytest.mark.parametrize("text", ["", "x", "1.2", "-0.1", "0.5,0.6", "0.5,0,0", "nan"])
def test_acceptance_that_can_not_be(text: str) -> None:
    with pytest.raises(UserError, match="acceptance"):
        parse_acceptance(text)


def test_groups_have_similar_lengths() -> None:
    workload = Lognormal(300, 1.0, 0.7).draw(4000, 2, 10**9, np.random.default_rng(0))
    logs = np.log(workload.response_tokens)
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(0.7, abs=0.03)
    assert np.median(workload.response_tokens) == pytest.approx(300, rel=0.05) and logs.std() == pytest.approx(1, abs=0.03)


def write_trace(path: Path, lengths: dict[int, tuple[int, ...]]) -> str:
    rows = [
        {"prompt_index": prompt, "sample_index": i, "prompt_ids": [1] * (prompt + 1), "response_ids": [2] * length}
        for prompt, responses in lengths.items()
        for i, length in enumerate(responses)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_traces_give_the_lengths_of_a_real_run(tmp_path: Path) -> None:
    trace = parse_lengths(write_trace(tmp_path / "trace.jsonl", {3: (5, 9), 7: (2, 400)}))
    same = trace.draw(2, 2, 100, np.random.default_rng(0))
    assert same.prompt_tokens.tolist() == [4, 8] and same.response_tokens.tolist() == [[5, 9], [2, 100]]
    more = trace.draw(50, 4, 1000, np.random.default_rng(0))
    assert {tuple(sorted(set(row))) for row in more.response_tokens.tolist()} <= {(5, 9), (2, 400), (5,), (9,), (2,), (400,)}


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt_index": 1}', '{"prompt_index": 0, "prompt_ids": [1], "response_ids": []}'], ids=range(4)
)
def test_a_damaged_trace_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_index": 0, "prompt_ids": [1], "response_ids": [1]}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_trace(path)


@pytest.mark.parametrize(
    "text", ["lognormal:", "lognormal:3", "lognormal:0,1", "lognormal:5,-1", "lognormal:5,1,2", "nowhere.jsonl"]
)
def test_lengths_that_can_not_be(text: str) -> None:
    with pytest.raises(UserError):
        parse_lengths(text)


def test_savings_are_paired_by_seed() -> None:
    outcomes = [only(setting(), mode, seed=seed) for seed in range(3) for mode in ("off", "adaptive")]
    assert rest_of_step(outcomes, 0.5) == pytest.approx(fmean(o.seconds for o in outcomes if o.strategy.mode == "off"))
    off, adaptive = summarize(outcomes, rest_seconds=1.0)
    assert off.saved == Estimate(0.0, 0.0) and adaptive.saved is not None and adaptive.saved.mean > 0
    pairs = [1 - b.seconds / a.seconds for a, b in zip(outcomes[::2], outcomes[1::2], strict=True)]
    assert adaptive.saved.mean == pytest.approx(fmean(pairs))
    assert adaptive.step_seconds.mean == pytest.approx(adaptive.seconds.mean + 1)


def test_estimates_have_the_intervals_of_student() -> None:
    assert Estimate.of([1.0, 2.0, 3.0]).half == pytest.approx(4.30 / 3**0.5)
    assert Estimate.of([2.0]) == Estimate(2.0, 0.0)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["simulate", *arguments])
    status: int = options.run(options, list(arguments))
    return status


SMALL = (
    "--hardware",
    "A100",
    "--model",
    "Qwen2.5-7B",
    "--replicas",
    "2",
    "--prompts",
    "4",
    "--max-tokens",
    "200",
    "--seeds",
    "2",
)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*SMALL, "--modes", "off,adaptive", "--policies", "replica,makespan", "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "adaptive" in text and "regret" in text and "step by step" in text
    with (out / "rollouts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 and {row["mode"] for row in rows} == {"off", "adaptive"}
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["strategies"]) == 4
    names = {path.name for path in out.glob("*.png")}
    assert {"rollouts.png", "utilisation.png", "occupancy-adaptive-makespan-static.png"} <= names and len(names) == 6
    means = [fmean(float(r["seconds"]) for r in rows if (r["mode"], r["policy"]) == pair) for pair in (("off", "replica"),)]
    assert summary["strategies"][0]["seconds"]["mean"] == pytest.approx(means[0])


def test_without_autoregressive_decoding_nothing_is_said_of_savings(tmp_path: Path) -> None:
    assert run(*SMALL, "--modes", "always", "--out", str(tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [strategy["saved"] for strategy in summary["strategies"]] == [None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give --calibration"),
        (("--calibration", "nowhere.json"), "can't read calibration"),
        ((*SMALL, "--modes", "fast"), "--modes 'fast'"),
        ((*SMALL, "--policies", "server"), "--policies 'server'"),
        ((*SMALL, "--warm-up", "2"), "--warm-up 2"),
        ((*SMALL, "--acceptance", "2"), "acceptance"),
        ((*SMALL, "--clock", "jump", "--kv-tokens", "9000"), "--kv-tokens"),
        ((*SMALL, "--seeds", "0"), "--seeds 0"),
        ((*SMALL, "--noise", "nan"), "--noise nan"),
        ((*SMALL, "--rest-seconds", "inf"), "--rest-seconds inf"),
        ((*SMALL, "--window-seconds", "nan"), "--window-seconds nan"),
        ((*SMALL, "--lengths", "lognormal:inf,1"), "the median"),
        ((*SMALL, "--rollout-share", "0"), "--rollout-share"),
        ((*SMALL[:4], "--gpus", "9", "--tensor-parallel", "2"), "--gpus 9"),
        (("--hardware", "abacus", "--model", "Qwen2.5-7B"), "abacus"),
        (("--hardware", "A100", "--model", "nobody/nothing"), "nobody/nothing"),
    ],
)
def test_options_that_can_not_be_simulated(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*arguments)
