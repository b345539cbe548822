"""The simulator against reality: rollouts predicted and measured on this machine, and beside figures of EfficientRollout.

    make demo-rollout                                       # makes the policy: SmolLM2-135M, taught chain sums
    python benchmarks/simulation.py measured                # needs the `modelopt` extra
    python benchmarks/simulation.py published --sweep CSV   # needs nothing but the CSV

`measured`: in each round, single steps are swept and fitted to a calibration; each mode samples the same responses; the
simulator predicts these rollouts from the calibration, the responses' lengths and the acceptance by position. One thread; all
times are CPU seconds of the process, so that others on the machine distort them less (`--clock wall`: by the wall clock).

`published`: 8 A100 decode 128 prompts x 8 samples of at most 8192 tokens (arXiv 2606.18967). Steps cost what the CSV says: the
sweep of Qwen2.5-7B on one A100 in the repository furiosa-ai/EfficientRollout; for Qwen2.5-14B a roofline with the coefficients
that its sweep there gives. Lengths are not published: they are lognormal, cut at 8192, with the median that gives 14B its AR
seconds. Only the figure marked `published` stands in the paper's abstract; `reported` ones are quoted from its text by others.
"""

import argparse
import logging
import statistics
import time
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from erollout.calibration.file import REFERENCE_FORMAT, Identity
from erollout.calibration.fit import fit, measured_passes
from erollout.calibration.model_size import describe_shape, model_size
from erollout.calibration.sweep_file import read_sweep
from erollout.configuration.speculation import DrafterConfig, SpeculationConfig, ToggleConfig
from erollout.drafter.registry import draft_weights
from erollout.policy.families import published_architecture
from erollout.simulation.draft_outcomes import SimulatedAcceptance
from erollout.simulation.experiment import Setting, SimulatedRollout, Strategy, simulate
from erollout.simulation.replica import Limits
from erollout.simulation.report import Estimate
from erollout.simulation.workload import LengthTrace, Lognormal
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.roofline import PassCost, Roofline

MODES = ("off", "always", "adaptive")

SURE, RATE = 0.72, 0.73
"""Acceptance of the k-th draft, SURE + (1 - SURE) RATE^k: gives 3.62, 5.20 and 6.71 tokens a cycle for n = 3, 5 and 7, where
3.59, 5.18 and 6.70 are reported of Qwen2.5-7B with INT4 drafts at temperature 1."""
AR_14B = 126.6
"""Seconds of a rollout of Qwen2.5-14B without speculation (reported)."""
A100_14B = {"bandwidth": 1.564e12, "compute": 233.5e12}
"""Effective bytes/s and FLOP/s of the published 14B sweep; below, its other coefficients."""


@dataclass(slots=True)
class Measured:
    """Measurements of one mode, by round."""

    seconds: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


def measured(options: argparse.Namespace) -> None:
    import torch
    from decode import machine
    from speculation import build_engine, build_speculation, policy_subject, requantize

    from erollout.calibration.grid import SweepGrid
    from erollout.calibration.sweep import identify, sweep
    from erollout.rollout.control import ReplicaControl
    from erollout.speculation.statistics import merge
    from erollout.speculation.toggle import Toggle
    from erollout.types import Rollout

    torch.set_num_threads(1)
    if options.clock == "cpu":
        time.perf_counter = time.process_time  # what engine and sweep look at
    logging.disable(logging.WARNING)  # what toggles say about losses, in simulated rollouts too
    subject = policy_subject(options)
    engine = build_engine(subject, options)
    engine.rollout = replace(engine.rollout, max_num_seqs=options.slots)  # type: ignore[type-var]
    written = engine.generate(subject.requests[:8])  # what the drafter learns from
    speculation = build_speculation(engine, options.formats[0], options)
    speculation.learn_from(written)
    requantize(speculation)
    requests = [replace(request, group_size=options.samples) for request in subject.requests[: options.prompts]]
    size = model_size(engine.architecture, draft_weights(speculation.formats, options.group_size), 1, "bfloat16")
    grid = SweepGrid(tuple(b for b in (1, 2, 4, 8, 16, 32) if b <= options.slots), (64, 192), (1, 2, 3, 5))

    def rollout(mode: str, passes: PassTimes) -> tuple[float, list[Rollout]]:
        from erollout.speculation.cost.cost_model import CalibratedCost

        toggle = Toggle(speculation_options(mode), speculation.formats if mode != "off" else (), CalibratedCost(passes))
        toggle.begin_rollout(learns=True)
        rollouts = engine.run(ReplicaControl(requests, options.slots, toggle, None))
        toggle.end_rollout()
        return engine.stats.seconds, rollouts

    def speculation_options(mode: str) -> SpeculationConfig:
        drafter = DrafterConfig(format=speculation.formats[0])  # type: ignore[call-arg]
        return SpeculationConfig(mode=mode, num_speculative_tokens=3, drafter=drafter)  # type: ignore[call-arg]

    results = {mode: Measured() for mode in MODES}
    for index in range(options.rounds):
        rows = sweep(engine, speculation.formats, grid, options.sweep_seconds)
        passes = fit(measured_passes(rows), size, identify(engine, speculation.formats)).passes()
        taken: list = []
        rollouts: list[Rollout] = []
        for mode in MODES[index % 3 :] + MODES[: index % 3]:
            seconds, rollouts = rollout(mode, passes)
            results[mode].seconds.append(seconds)
            taken.append(engine.stats.speculation)
        shares = merge(taken).acceptance_by_position
        setting = Setting(
            passes,
            passes,
            SimulatedAcceptance(shares),
            trace_of(rollouts),
            replicas=1,
            num_prompts=len(requests),
            group_size=options.samples,
            max_tokens=requests[0].sampling.max_tokens,
            limits=Limits(options.slots, engine.rollout.max_num_batched_tokens),
        )
        for mode in MODES:
            given = replace(setting, speculation=speculation_options(mode))
            results[mode].predicted.append(
                statistics.fmean(o.seconds for s in range(5) for o in simulate(given, Strategy(mode), s))
            )
        print(
            f"round {index + 1}: "
            + ", ".join(f"{m} {results[m].seconds[-1]:.2f} s, predicted {results[m].predicted[-1]:.2f}" for m in MODES),
            flush=True,
        )
        print("acceptance by position " + " ".join(f"{share:.3f}" for share in shares), flush=True)
    table = Table(title="; ".join(machine()), title_justify="left")
    for column in ("mode", "measured s", "predicted s", "predicted / measured", "range"):
        table.add_column(column, justify="right")
    for mode, result in results.items():
        ratios = [p / s for p, s in zip(result.predicted, result.seconds, strict=True)]
        table.add_row(
            mode,
            *(f"{statistics.median(values):.2f}" for values in (result.seconds, result.predicted, ratios)),
            f"{min(ratios):.2f}-{max(ratios):.2f}",
        )
    Console(highlight=False).print(table)


def trace_of(rollouts: list) -> LengthTrace:
    """Lengths, by prompt."""
    groups: dict[int, tuple[int, list[int]]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_index, (len(rollout.prompt_ids), []))[1].append(len(rollout.response_ids))
    return LengthTrace(tuple((prompt, tuple(lengths)) for prompt, lengths in groups.values()))


def passes_7b(sweep_csv: str) -> PassTimes:
    architecture = published_architecture("Qwen2.5-7B")
    assert architecture is not None
    size = model_size(architecture, draft_weights([REFERENCE_FORMAT]))
    identity = Identity(describe_shape(architecture), "A100", 1, (REFERENCE_FORMAT,))
    return fit(measured_passes(read_sweep(sweep_csv)), size, identity).passes()


def passes_14b() -> PassTimes:
    architecture = published_architecture("Qwen2.5-14B")
    assert architecture is not None
    common = A100_14B | {"kv_factor": 0.24}
    roofline = Roofline(
        model_size(architecture, draft_weights([REFERENCE_FORMAT])),
        PassCost(**common, per_sequence=50e-6),
        PassCost(**common, per_sequence=232e-6),
        {REFERENCE_FORMAT: PassCost(**common, per_sequence=154e-6, weight_factor=1.271)},
    )
    return PassTimes(roofline)


def reference_setting(passes: PassTimes, median: float, sigma: float, n: int) -> Setting:
    drafter = DrafterConfig(format=REFERENCE_FORMAT)  # type: ignore[call-arg]  # mypy does not see through section
    toggle = ToggleConfig(max_speculative_tokens=15, probe_interval=0)  # type: ignore[call-arg]
    return Setting(
        passes,
        passes,
        SimulatedAcceptance([SURE + (1 - SURE) * RATE**k for k in range(1, 16)]),
        Lognormal(median, sigma, prompt_tokens=128),
        replicas=8,
        num_prompts=128,
        group_size=8,
        max_tokens=8192,
        limits=Limits(max_num_seqs=128, max_num_batched_tokens=8192),
        speculation=SpeculationConfig(num_speculative_tokens=n, drafter=drafter, toggle=toggle),  # type: ignore[call-arg]
        rollouts=2,
        warm_up=1,
        stepwise=False,
    )


def run(setting: Setting, strategy: Strategy, seeds: int) -> list[SimulatedRollout]:
    return [outcome for seed in range(seeds) for outcome in simulate(setting, strategy, seed)]


def median_for(seconds: float, passes: PassTimes, sigma: float, seeds: int) -> float:
    """Median of the response lengths with which autoregressive rollouts take the given seconds."""
    low, high = 50.0, 6000.0
    for _ in range(9):
        middle = (low * high) ** 0.5
        mean = statistics.fmean(o.seconds for o in run(reference_setting(passes, middle, sigma, 5), Strategy("off"), seeds))
        low, high = (middle, high) if mean < seconds else (low, middle)
    return (low * high) ** 0.5


ROWS: tuple[tuple[str, str, Strategy, int, float | None, str], ...] = (
    ("14B", "always, n=5", Strategy("always"), 5, -6.7, "reported"),
    ("14B", "toggle, n=5", Strategy("toggle"), 5, None, ""),
    ("14B", "adaptive", Strategy("adaptive"), 5, None, ""),
    ("7B", "always, n=5", Strategy("always"), 5, None, ""),
    ("7B", "toggle, n=5", Strategy("toggle"), 5, 13.5, "reported"),
    ("7B", "toggle, n=11", Strategy("toggle"), 11, 11.8, "reported"),
    ("7B", "ladder (5, 7, 9, 11)", Strategy("ladder"), 5, 19.6, "published"),
    ("7B", "adaptive", Strategy("adaptive"), 5, None, ""),
    ("7B", "adaptive, makespan, dynamic", Strategy("adaptive", "makespan", "dynamic"), 5, None, ""),
)
"""Model, name, strategy, its number of drafts, what EfficientRollout saved in % of rollout seconds, and where that is said."""


def published(options: argparse.Namespace) -> None:
    passes = {"14B": passes_14b(), "7B": passes_7b(options.sweep)}
    for sigma in options.sigmas:
        median = median_for(AR_14B, passes["14B"], sigma, options.seeds)
        title = f"lognormal lengths, sigma {sigma:g}, median {median:.0f} tokens; {options.seeds} seeds"
        table = Table(title=title, title_justify="left")
        for column in (
            "model",
            "strategy",
            "rollout s",
            "saved %",
            "EfficientRollout %",
            "",
            "batch",
            "drafting %",
            "regret %",
        ):
            table.add_column(column, justify="left" if column in ("model", "strategy", "") else "right", no_wrap=True)
        off = {
            name: run(reference_setting(each, median, sigma, 5), Strategy("off"), options.seeds)
            for name, each in passes.items()
        }
        for name, outcomes in off.items():
            known = f"{AR_14B} s, fitted" if name == "14B" else ""
            table.add_row(name, "off", Estimate.of([o.seconds for o in outcomes]).show(".1f"), "", known, "", *shares(outcomes))
        for model, name, strategy, n, reference, source in ROWS:
            outcomes = run(reference_setting(passes[model], median, sigma, n), strategy, options.seeds)
            saved = Estimate.of([100 * (1 - o.seconds / base.seconds) for o, base in zip(outcomes, off[model], strict=True)])
            seconds = Estimate.of([o.seconds for o in outcomes])
            known = "" if reference is None else f"{reference:.1f}"
            table.add_row(model, name, seconds.show(".1f"), saved.show(".1f"), known, source, *shares(outcomes))
        Console(highlight=False, width=136).print(table)


def shares(outcomes: list[SimulatedRollout]) -> list[str]:
    batch, drafting, regret = (
        statistics.fmean(getattr(o, name) for o in outcomes) for name in ("batch", "speculating", "regret")
    )
    return [f"{batch:.1f}", f"{100 * drafting:.0f}", f"{100 * regret:.1f}"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    real = commands.add_parser("measured")
    real.add_argument("--policy", help="directory of the policy; default: what make demo-rollout made")
    real.add_argument("--rounds", type=int, default=3)
    real.add_argument("--sweep-seconds", type=float, default=40.0)
    real.add_argument("--prompts", type=int, default=16)
    real.add_argument("--samples", type=int, default=4, help="of each prompt")
    real.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    real.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    real.add_argument("--slots", type=int, default=16, help="sequences at once")
    real.set_defaults(work=measured, kernels="auto", verification="coupled", formats=["w4a8+head"], batches=[16], responses=1)
    paper = commands.add_parser("published")
    paper.add_argument("--sweep", required=True, help="sweep_a100_tp1_qwen257b.csv")
    paper.add_argument("--seeds", type=int, default=10)
    paper.add_argument("--sigmas", type=lambda text: [float(part) for part in text.split(",")], default=[0.6, 0.8, 1.0])
    paper.set_defaults(work=published)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    options.work(options)
