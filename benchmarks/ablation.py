"""Regret of the toggle with each of its mechanisms off in turn, under scenarios that go wrong in different ways.

    python benchmarks/ablation.py                                # everything: about 50 minutes of CPU time
    python benchmarks/ablation.py --scenarios stationary tenant --without probes corrections
    python benchmarks/ablation.py --calibration FILE --lengths rollouts.jsonl --scenarios stationary errors

Rollouts are those of erollout/simulation: scheduler, toggle, probes, acceptance estimates and corrections of a real run under a
virtual clock, on one replica of 16 slots. The truth is known, so the seconds that each step loses against the best arm are too.
Regret is their sum over the rollouts' seconds: the first four rollouts of a run, the very first included. A mechanism is
switched off in the running code; differences are taken between runs of the same seed. Times and lengths may be recorded:
`--calibration` is a file of `erollout calibrate fit`, `--lengths` one of `erollout rollout --out`.
"""

import argparse
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import repeat
from math import comb, exp, inf, log2
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from erollout.calibration.file import load_calibration
from erollout.config import CoordinatorConfig
from erollout.configuration.speculation import SpeculationConfig
from erollout.coordinator.state_machine import StateMachine
from erollout.engine.scheduler import ScheduledSequence
from erollout.simulation.cluster import Cluster
from erollout.simulation.draft_outcomes import SimulatedAcceptance
from erollout.simulation.replica import Limits
from erollout.simulation.stepwise import StepwiseReplica
from erollout.simulation.truth import Truth
from erollout.simulation.workload import LengthSource, Lognormal, parse_lengths
from erollout.speculation.cost.corrections import Corrections
from erollout.speculation.cost.cost_model import CalibratedCost, PassTimes
from erollout.speculation.cost.roofline import ModelSize, Pass, PassCost, Roofline
from erollout.speculation.statistics import SpeculationStatistics
from erollout.speculation.step import Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle

FORMATS = ("w4", "w8")
SIZE = ModelSize(270e6, {"w4": 105e6, "w8": 140e6}, 270e6, 2e4, 46e3)
MACHINES = {
    "amx": PassTimes(
        Roofline(
            SIZE,
            PassCost(22.5e9, 900e9, per_pass=1e-3, per_sequence=1.5e-4),
            PassCost(22.5e9, 900e9, per_pass=1e-3, per_sequence=2.5e-4, per_token=1e-4),
            {f: PassCost(22.5e9, 900e9, per_pass=0.6e-3, per_sequence=1.5e-4, weight_factor=0.85) for f in FORMATS},
        )
    ),
    "avx512": PassTimes(
        Roofline(
            SIZE,
            PassCost(22.5e9, 230e9, per_sequence=2e-4),
            PassCost(22.5e9, 210e9, per_sequence=2e-4, per_token=5e-5),
            {f: PassCost(22.5e9, 250e9, per_pass=1e-3, per_sequence=1.5e-4) for f in FORMATS},
        )
    ),
}
"""Steps about those of SmolLM2-135M on one core. With an acceptance of 0.92 the best arms at 1, 4, 8 and 16 sequences are 1.7,
1.5, 1.3 and 1.1 times as fast as off on `amx`; 1.4, 1.2, 1 and 1 times on `avx512`."""
SLOTS, PROMPTS, MAX_TOKENS, ROLLOUTS = 16, 16, 512, 4
NOISE, OUTLIERS = 0.05, 0.01
"""Standard deviation of a step's log time, and share of steps that take up to ten times as long."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens, and what is assumed at the start."""

    acceptance: Callable[[float, float], float] = lambda progress, context: 0.93
    """Acceptance of a draft token, by progress (rollouts so far, with fractions) and context."""
    slow: Callable[[float, Pass], float] = lambda seconds, kind: 1.0
    """Factor on the seconds of a kind of pass, by time."""
    errors: float = 0.0
    """Standard deviation of the logarithms of the calibration's errors, per kind, batch octave and draft length."""
    bias: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Factor of the calibration's seconds on the true ones, by kind of pass and drafter."""
    noise: float = NOISE
    outliers: float = OUTLIERS
    prompts: int = PROMPTS
    sigma: float = 1.0
    formats: Sequence[str] = FORMATS[:1]
    times_drafting: bool = True
    """Whether the host's clock tells how long drafting takes."""
    coverage: float = 1.0
    """Probability that the proposer has a draft for a sequence, as an n-gram proposer's; drawn for each sequence and step."""


def _falling(progress: float, context: float) -> float:
    return 0.95 - 0.02 * max(0.0, log2(max(1.0, context) / 64))


def _changing(progress: float, context: float) -> float:
    """0.93, but poor in the middle of the second and of the fourth rollout."""
    return 0.45 if int(progress) % 2 and 0.3 < progress % 1 < 0.7 else 0.93


def _jump(seconds: float, kind: Pass) -> float:
    """After five seconds drafting takes three times as long, and all passes are a fifth slower, for good."""
    return {"target": 1.2, "draft": 3.6, "verify": 1.2}[kind] if seconds > 5 else 1.0


def _tenant(seconds: float, kind: Pass) -> float:
    """Another process takes memory bandwidth for a second out of three."""
    return {"target": 1.6, "draft": 1.5, "verify": 1.15}[kind] if seconds % 3 < 1 else 1.0


SCENARIOS: dict[str, Scenario] = {
    "stationary": Scenario(),
    "by context": Scenario(_falling),
    "acceptance": Scenario(_changing),
    "drift": Scenario(slow=lambda seconds, kind: 1 + (0.04 if kind == "draft" else 0.02) * min(seconds, 20)),
    "jump": Scenario(slow=_jump),
    "tenant": Scenario(slow=_tenant),
    "refill": Scenario(_falling, prompts=4 * PROMPTS),
    "long tail": Scenario(_falling, sigma=1.6),
    "errors": Scenario(errors=0.15),
    "draft 0.5x": Scenario(bias={("draft", "w4"): 0.5}),
    "draft 2x": Scenario(bias={("draft", "w4"): 2.0}),
    "target 0.5x": Scenario(bias={("target", ""): 0.5}),
    "target 2x": Scenario(bias={("target", ""): 2.0}),
    "verify 0.5x": Scenario(bias={("verify", ""): 0.5}),
    "verify 2x": Scenario(bias={("verify", ""): 2.0}),
    "formats": Scenario(bias={("draft", "w4"): 1.6, ("draft", "w8"): 0.6}, formats=FORMATS),
    "noise": Scenario(noise=0.25, outliers=0.03),
    "untimed": Scenario(errors=0.15, bias={("draft", "w4"): 1.5}, times_drafting=False),
    "hopeless": Scenario(slow=lambda seconds, kind: 8.0 if kind == "draft" else 1.0, bias={("draft", "w4"): 8.0}),
    "half covered": Scenario(coverage=0.5, errors=0.15),
    "rarely covered": Scenario(coverage=0.1, errors=0.15),
}


class Mistaken(PassTimes):
    """Pass times that are wrong by given factors."""

    def __init__(self, true: PassTimes, factor: Callable[[Pass, str, int, int], float]) -> None:
        super().__init__(true.roofline, true.tables)
        self.factor = factor

    def seconds(self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: int) -> float:
        true = super().seconds(kind, format, batch, context, num_speculative_tokens)
        return true * self.factor(kind, format, batch, num_speculative_tokens)


def calibrated(true: PassTimes, scenario: Scenario, seed: int) -> PassTimes:
    """What the toggle assumes at the start: the truth with the scenario's errors."""

    def node(kind: Pass, format: str, octave: int, n: int) -> float:
        return Random(f"{seed} {kind} {format} {octave} {n}").gauss(0.0, scenario.errors)

    def factor(kind: Pass, format: str, batch: int, n: int) -> float:
        position = log2(batch)
        low = int(position)
        error = (low + 1 - position) * node(kind, format, low, n) + (position - low) * node(kind, format, low + 1, n)
        return exp(error) * scenario.bias.get((kind, format), 1.0)

    return Mistaken(true, cache(factor))


class World(Truth):
    """The truth now: `seconds` and `progress` change it."""

    def __init__(self, passes: PassTimes, scenario: Scenario, arms: Sequence[Arm], seed: int) -> None:
        super().__init__(passes, SimulatedAcceptance.constant(0.5), arms, scenario.noise)
        self.passes = passes
        self.scenario = scenario
        self.now = self.progress = self.context = 0.0
        self.random = Random(seed)
        self.known = cache(SimulatedAcceptance.constant)
        self.pass_seconds = cache(passes.seconds)

    def look(self, load: Load) -> None:
        """Before a decision: the acceptance is that of its context."""
        self.acceptance = self.known(round(self.scenario.acceptance(self.progress, load.context), 3))

    def step_seconds(self, arm: Arm, load: Load) -> float:
        if load.prefill_tokens or not load.decoding:
            return self._cost.step_seconds(arm, load)
        if not arm.speculates:
            return self._slowed("target", "", load, 0)
        batch, coverage = load.decoding, self.scenario.coverage
        if coverage == 1:
            return self.covered_seconds(arm, load, batch)
        chances = [comb(batch, k) * coverage**k * (1 - coverage) ** (batch - k) for k in range(batch + 1)]
        return sum(chance * self.covered_seconds(arm, load, k) for k, chance in enumerate(chances))

    def covered_seconds(self, arm: Arm, load: Load, drafts: int) -> float:
        """Seconds of a decode step in which so many of its sequences have a draft."""
        n = arm.num_speculative_tokens * drafts / load.decoding
        passed = self._slowed("verify", "", load, n) if drafts else self._slowed("target", "", load, 0)
        return self.drafting_seconds(arm, load) + passed

    def seconds_per_token(self, arm: Arm, load: Load) -> float:
        accepted = self.acceptance.length(arm.num_speculative_tokens) - 1
        decoding = Load(load.decoding, load.context)
        return self.step_seconds(arm, decoding) / (1 + self.scenario.coverage * accepted)

    def drafting_seconds(self, arm: Arm, load: Load) -> float:
        return arm.num_speculative_tokens * self._slowed("draft", arm.format, load, arm.num_speculative_tokens)

    def _slowed(self, kind: Pass, format: str, load: Load, n: float) -> float:
        context = 8 * round(load.context / 8) + 1.0
        return self.scenario.slow(self.now, kind) * self.pass_seconds(kind, format, load.decoding, context, n)

    def best(self, load: Load) -> Arm:
        return min(self.arms, key=lambda arm: self.seconds_per_token(arm, load))


class WorldReplica(StepwiseReplica):
    _covered: Iterator[bool] = iter(())
    """Whether the proposer has a draft, by sequence of the step that decodes."""

    def _seconds(self, arm: Arm, load: Load) -> float:
        world = self.truth
        assert isinstance(world, World)
        slow = 1 + 9 * world.random.random() if world.random.random() < world.scenario.outliers else 1.0
        seconds = slow * super()._seconds(arm, load)
        coverage = world.scenario.coverage
        if coverage == 1 or not arm.speculates or load.prefill_tokens:
            self._covered = repeat(True)
            return seconds
        covered = [world.random.random() < coverage for _ in range(load.decoding)]
        self._covered = iter(covered)
        return seconds * world.covered_seconds(arm, load, sum(covered)) / world.step_seconds(arm, load)

    def _advance(self, item: ScheduledSequence, statistics: SpeculationStatistics) -> None:
        if item.num_drafts and not next(self._covered):
            self.blocks.truncate(item.sequence.block_table, item.end)
            item = replace(item, num_drafts=0)
        super()._advance(item, statistics)


class Watched:
    """A toggle whose decisions and outcomes move the world on."""

    def __init__(self, toggle: Toggle, world: World, tokens: int) -> None:
        self.toggle = toggle
        self.world = world
        self.tokens = tokens
        """Number of tokens of the rollout."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        return self.toggle.arms

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm:
        self.world.look(load)
        return self.toggle.decide(load, imposed)

    def observe(self, outcome: StepOutcome) -> None:
        arm, load, world = outcome.arm, outcome.load, self.world
        if arm.speculates and load.decoding and not load.prefill_tokens and world.scenario.times_drafting:
            share = world.drafting_seconds(arm, load) / world.step_seconds(arm, load)
            outcome = replace(outcome, seconds_drafting=share * outcome.seconds)
        if world.scenario.coverage < 1:
            outcome = replace(outcome, requested=arm.num_speculative_tokens * load.decoding)
        self.world.now += outcome.seconds
        self.world.progress += outcome.emitted / self.tokens
        self.toggle.observe(outcome)

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        return self.toggle.seconds_per_token(load)


@dataclass(frozen=True, slots=True)
class Result:
    """Shares of the seconds of all rollouts, and the mean draft length."""

    regret: float
    probing: float
    mean_n: float


def rollouts(true: PassTimes, scenario: Scenario, lengths: LengthSource, options: SpeculationConfig, seed: int) -> Result:
    """A new toggle's first rollouts in a scenario."""
    toggle = Toggle(options, scenario.formats, CalibratedCost(calibrated(true, scenario, seed)))
    world = World(true, scenario, toggle.arms, seed)
    lost = busy = probing = 0.0
    drafted = []
    for index in range(ROLLOUTS):
        world.progress = float(index)
        workload = lengths.draw(scenario.prompts, 1, MAX_TOKENS, np.random.default_rng([seed, index]))
        machine = StateMachine(CoordinatorConfig(), 1, scenario.prompts, 1, SLOTS, (), MAX_TOKENS)
        chooser = Watched(toggle, world, workload.tokens)
        replica = WorldReplica(workload, world, chooser, Limits(SLOTS), np.random.default_rng([seed, index, 1]), MAX_TOKENS)
        toggle.begin_rollout(learns=True)
        Cluster([replica], machine, CoordinatorConfig()).run()
        toggle.end_rollout()
        lost, busy = lost + replica.ledger.lost, busy + replica.ledger.busy
        probing += toggle.metrics()["share_probing"]
        drafted += [n for n in toggle.trace.num_speculative_tokens if n]
    return Result(lost / busy, probing / ROLLOUTS, statistics.fmean(drafted or [0]))


def _ignored(*arguments: object, **keywords: object) -> None:
    """A mechanism that does nothing."""


_observe = Corrections.observe


def _untimed(corrections: Corrections, arm: Arm, batch: int, drafting: float, ratio: float, _: float | None = None) -> None:
    _observe(corrections, arm, batch, drafting, ratio)


TOGGLE, PROBES, ACCEPTANCE, CORRECTIONS = (
    f"erollout.speculation.{name}" for name in ("toggle", "probes", "acceptance", "cost.corrections")
)
MECHANISMS: dict[str, dict[str, Any]] = {
    "probes": {"probe_interval": 0},
    "probes: budget": {f"{PROBES}.FIRST_STEPS": inf},
    "probes: first at once": {f"{PROBES}.AT_ONCE": 50},
    "probes: two steps": {"probe_steps": 1},
    "corrections": {f"{CORRECTIONS}.Corrections.observe": _ignored},
    "corrections: common": {f"{CORRECTIONS}._COMMON": 1e-12},
    "corrections: kind of pass": {f"{CORRECTIONS}._KIND": 1e-12},
    "corrections: batch size": {f"{CORRECTIONS}._CELL": 1e-12},
    "corrections: drafting timed": {f"{CORRECTIONS}.Corrections.observe": _untimed},
    "corrections: clip": {f"{CORRECTIONS}.CLIP": inf},
    "corrections: lasting change": {f"{CORRECTIONS}.PERSISTENCE": 1 << 30},
    "corrections: blame": {f"{CORRECTIONS}.COMMON_BLAME": 1.0},
    "acceptance: by context": {f"{ACCEPTANCE}.WHOLE_DRAFTS": 1e12},
    "acceptance: contradiction": {f"{ACCEPTANCE}.CONTRADICTION": inf},
    "acceptance: carried less": {f"{ACCEPTANCE}.CARRIED": 1.0},
    "acceptance: by position": {f"{ACCEPTANCE}.NEIGHBOUR_DRAFTS": 1e9},
    "endings": {f"{TOGGLE}.FIRST_TOKENS": 1e12},
    "whole drafts only": {f"{TOGGLE}.WHOLE": 0.0},
    "cached predictions": {f"{TOGGLE}.REFRESH": 1},
}
"""By mechanism: keys of speculation.toggle and names in the code, with the values that switch it off."""


@contextmanager
def without(mechanism: str | None) -> Iterator[dict[str, Any]]:
    """Switch a mechanism off. Yields the configuration's keys to set."""
    changes = MECHANISMS[mechanism] if mechanism else {}
    keys = {name: value for name, value in changes.items() if "." not in name}
    names = {name: value for name, value in changes.items() if "." in name}
    patches = [patch(name, value) for name, value in names.items()]
    for each in patches:
        each.start()
    try:
        yield keys
    finally:
        for each in patches:
            each.stop()


def measure(options: argparse.Namespace, true: PassTimes, scenario: Scenario, mechanism: str | None, seed: int) -> Result:
    lengths = parse_lengths(options.lengths) if options.lengths else Lognormal(60, scenario.sigma, 0.0, prompt_tokens=96)
    with without(mechanism) as keys:
        speculation = SpeculationConfig(mode=options.mode)  # type: ignore[call-arg]  # mypy does not see through section
        speculation = replace(speculation, toggle=replace(speculation.toggle, **keys))  # type: ignore[type-var]
        return rollouts(true, scenario, lengths, speculation, seed)


def spread(values: Sequence[float]) -> str:
    """Median with quartiles, in percent."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{100 * middle:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def report(options: argparse.Namespace, name: str, true: PassTimes) -> None:
    scenarios = [SCENARIOS[title] for title in options.scenarios]
    if options.calibration:
        scenarios = [replace(scenario, formats=tuple(true.formats)[:1]) for scenario in scenarios]
    if options.untimed:
        scenarios = [replace(scenario, times_drafting=False) for scenario in scenarios]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    base = [[measure(options, true, scenario, None, seed) for seed in seeds] for scenario in scenarios]
    rows = [
        ["", *options.scenarios],
        ["---"] * (1 + len(scenarios)),
        ["all on", *(spread([result.regret for result in results]) for results in base)],
        ["its mean n", *(f"{statistics.fmean(result.mean_n for result in results):.1f}" for results in base)],
        ["its probes", *(f"{100 * statistics.fmean(r.probing for r in results):.1f} % of steps" for results in base)],
    ]
    print(f"## {name}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
    for mechanism in options.without:
        cells = []
        for scenario, results in zip(scenarios, base, strict=True):
            more = [
                measure(options, true, scenario, mechanism, seed).regret - known.regret
                for seed, known in zip(seeds, results, strict=True)
            ]
            cells.append(spread(more))
        print(f"| {mechanism} | {' | '.join(cells)} |", flush=True)
    print(flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--calibration", help="take true pass times from this file")
    parser.add_argument("--lengths", help="recorded lengths, or lognormal:median,sigma")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--without", nargs="*", choices=MECHANISMS, default=list(MECHANISMS))
    parser.add_argument("--mode", choices=("toggle", "adaptive"), default="adaptive")
    parser.add_argument("--untimed", action="store_true", help="no scenario times the drafting, as on an accelerator")
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--first-seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options, began = parse(), time.process_time()
    logging.disable(logging.WARNING)  # losses of simulated rollouts
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}"
    print(f"{versions}; mode {options.mode}, {options.seeds} seeds from {options.first_seed} of {ROLLOUTS} rollouts.")
    print("Regret in % of the seconds: median (quartiles). Below `all on`: points more without the mechanism.\n", flush=True)
    if options.calibration:
        report(options, options.calibration, load_calibration(options.calibration).passes())
    else:
        for name in options.machines:
            report(options, name, MACHINES[name])
    print(f"{time.process_time() - began:.0f} CPU seconds.")


if __name__ == "__main__":
    main()
