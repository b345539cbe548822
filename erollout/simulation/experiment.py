"""Simulated rollouts of one cluster: every strategy over the same lengths, with several seeds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from erollout.config import CoordinatorConfig
from erollout.configuration.speculation import SpeculationConfig
from erollout.coordinator.state_machine import StateMachine
from erollout.resilience.unattended import ignore
from erollout.simulation.cluster import Cluster, Traffic
from erollout.simulation.draft_outcomes import SimulatedAcceptance
from erollout.simulation.jumping import JumpingReplica
from erollout.simulation.replica import BusySpan, Chooser, Ledger, Limits, Replica
from erollout.simulation.stepwise import StepwiseReplica
from erollout.simulation.truth import Oracle, Truth
from erollout.simulation.workload import LengthSource, Workload
from erollout.speculation.cost.cost_model import CalibratedCost, PassTimes
from erollout.speculation.step import Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle

Mode = Literal["off", "always", "toggle", "adaptive", "ladder", "oracle"]
MODES: tuple[Mode, ...] = ("off", "always", "toggle", "ladder", "adaptive", "oracle")
"""`oracle` is not in the configuration: it knows what the simulated hardware will do."""

INTRODUCED = 400
"""Number of drafts that a toggle observes before its first rollout if it will not probe."""
SHOWN_REPLICAS = 64
"""Number of replicas whose spans are kept for plots."""


@dataclass(frozen=True, slots=True)
class Strategy:
    mode: Mode
    policy: Literal["replica", "cluster", "makespan"] = "replica"
    dispatch: Literal["dynamic", "static"] = "static"

    def __str__(self) -> str:
        return f"{self.mode}, {self.policy}, {self.dispatch}"


@dataclass(frozen=True, slots=True)
class Setting:
    """The settings that all strategies share."""

    passes: PassTimes
    """Pass times that the replicas assume at the start: their calibration."""
    truth: PassTimes
    """True pass times."""
    acceptance: SimulatedAcceptance
    lengths: LengthSource
    replicas: int
    num_prompts: int
    group_size: int
    max_tokens: int
    limits: Limits = field(default_factory=Limits)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    """Options of speculation, but for the mode, which the strategy sets."""
    window_seconds: float = 0.05
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's time."""
    rollouts: int = 1
    """Consecutive rollouts with new lengths; each starts with what the ones before have learnt."""
    warm_up: int = 0
    """Initial rollouts to discard."""
    stepwise: bool = True
    """True: every step of every replica, by the engine's scheduler; False: jumps between events."""


@dataclass(frozen=True, slots=True)
class SimulatedRollout:
    """Result of one simulated rollout. Shares are between 0 and 1."""

    strategy: Strategy
    seed: int
    rollout: int
    seconds: float
    """Seconds until the last response is complete."""
    tokens: int
    busy: float
    """Share of all replicas' seconds spent in steps."""
    batch: float
    """Mean number of decoding sequences during steps."""
    speculating: float
    """Share of the busy seconds in steps that speculate."""
    acceptance_length: float
    regret: float
    """Share of the busy seconds that the best arm of each step would have saved."""
    windows: int
    moves: int
    sequences_moved: int
    recomputed_tokens: int
    preemptions: int
    spans: tuple[tuple[BusySpan, ...], ...] = ()
    """Busy spans of the first SHOWN_REPLICAS replicas."""


def simulate(setting: Setting, strategy: Strategy, seed: int) -> Iterator[SimulatedRollout]:
    """The rollouts of one strategy after the warm-up. Equal seeds give all strategies the same lengths."""
    truth = Truth(setting.truth, setting.acceptance, _considered(setting), setting.noise)
    choosers = [_chooser(setting, strategy.mode, truth, cost) for cost in _costs(setting)]
    if not setting.stepwise:
        for toggle in _toggles(choosers):
            _introduce(toggle, truth)
    last: Sequence[int] = ()
    for index in range(setting.rollouts):
        lengths = np.random.default_rng([seed, index])
        workload = setting.lengths.draw(setting.num_prompts, setting.group_size, setting.max_tokens, lengths)
        outcome = _rollout(setting, strategy, workload, truth, choosers, (seed, index), last)
        last = workload.response_tokens.ravel().tolist()
        if index >= setting.warm_up:
            yield outcome


def compare(
    setting: Setting, strategies: Sequence[Strategy], seeds: int, progress: Callable[[SimulatedRollout], None] = ignore
) -> list[SimulatedRollout]:
    """Simulate all strategies over the same lengths."""
    outcomes = []
    for seed in range(seeds):
        for strategy in strategies:
            for outcome in simulate(setting, strategy, seed):
                progress(outcome)
                outcomes.append(outcome)
    return outcomes


def _rollout(
    setting: Setting,
    strategy: Strategy,
    workload: Workload,
    truth: Truth,
    choosers: Sequence[Chooser],
    seed: tuple[int, int],
    last: Sequence[int],
) -> SimulatedRollout:
    options = CoordinatorConfig(strategy.policy, strategy.dispatch, window_seconds=setting.window_seconds)  # type: ignore[call-arg]
    machine = StateMachine(
        options,
        setting.replicas,
        setting.num_prompts,
        setting.group_size,
        setting.limits.max_num_seqs,
        last,
        setting.max_tokens,
    )
    replicas = [
        _replica(setting, workload, truth, chooser, np.random.default_rng([*seed, 1, number]))
        for number, chooser in enumerate(choosers)
    ]
    for replica in replicas[:SHOWN_REPLICAS]:
        replica.ledger.spans = []
    for toggle in _toggles(choosers):
        toggle.begin_rollout(learns=True)
    cluster = Cluster(replicas, machine, options)
    seconds = cluster.run()
    ledgers = [replica.ledger for replica in replicas]
    drafted, accepted = sum(ledger.drafted for ledger in ledgers), sum(ledger.accepted for ledger in ledgers)
    for toggle in _toggles(choosers):
        toggle.end_rollout(accepted / drafted if drafted else None)
    return _outcome(strategy, seed, seconds, ledgers, cluster.traffic)


def _replica(setting: Setting, workload: Workload, truth: Truth, chooser: Chooser, generator: np.random.Generator) -> Replica:
    if setting.stepwise:
        return StepwiseReplica(workload, truth, chooser, setting.limits, generator, setting.max_tokens)
    return JumpingReplica(workload, truth, chooser, setting.limits, generator)


def _chooser(setting: Setting, mode: Mode, truth: Truth, cost: CalibratedCost) -> Chooser:
    if mode == "oracle":
        return Oracle(truth)
    options = replace(setting.speculation, mode=mode)  # type: ignore[type-var]  # mypy does not see through section
    return Toggle(options, _formats(setting) if mode != "off" else (), cost)


def _toggles(choosers: Sequence[Chooser]) -> list[Toggle]:
    return [chooser for chooser in choosers if isinstance(chooser, Toggle)]


def _introduce(toggle: Toggle, truth: Truth) -> None:
    """Let a toggle observe a step of each drafter's longest draft: jumping replicas do not probe, so it could not learn it."""
    longest: dict[str, Arm] = {}
    for arm in sorted(toggle.arms, key=lambda arm: arm.num_speculative_tokens):
        longest[arm.format] = arm
    for arm in longest.values():
        n, load = arm.num_speculative_tokens, Load(INTRODUCED, 1.0)
        accepted = tuple(round(share * INTRODUCED) for share in truth.acceptance.shares[:n])
        emitted = INTRODUCED + sum(accepted)
        seconds = truth.step_seconds(arm, load)
        toggle.observe(StepOutcome(arm, load, seconds, 0.0, emitted, (INTRODUCED,) * n, accepted))


def _costs(setting: Setting) -> list[CalibratedCost]:
    """One cost model per replica; jumping replicas, which may be many, share one."""
    if setting.stepwise:
        return [CalibratedCost(setting.passes) for _ in range(setting.replicas)]
    return [CalibratedCost(setting.passes)] * setting.replicas


def _formats(setting: Setting) -> tuple[str, ...]:
    drafter = setting.speculation.drafter
    return tuple(dict.fromkeys((drafter.format, *drafter.alternatives)))


def _considered(setting: Setting) -> list[Arm]:
    """All arms that any strategy may choose."""
    options = setting.speculation
    numbers = range(1, options.toggle.max_speculative_tokens + 1)
    lengths = dict.fromkeys((*numbers, options.num_speculative_tokens, *options.toggle.ladder.rungs))
    return [Arm(format, number) for format in _formats(setting) for number in lengths]


def _outcome(
    strategy: Strategy, seed: tuple[int, int], seconds: float, ledgers: Sequence[Ledger], traffic: Traffic
) -> SimulatedRollout:
    busy = sum(ledger.busy for ledger in ledgers)
    drafts = sum(ledger.num_drafts for ledger in ledgers)
    return SimulatedRollout(
        strategy,
        *seed,
        seconds=seconds,
        tokens=sum(ledger.tokens for ledger in ledgers),
        busy=busy / (seconds * len(ledgers)),
        batch=sum(ledger.decoding for ledger in ledgers) / busy,
        speculating=sum(ledger.speculating for ledger in ledgers) / busy,
        acceptance_length=1 + sum(ledger.accepted for ledger in ledgers) / drafts if drafts else 1.0,
        regret=sum(ledger.lost for ledger in ledgers) / busy,
        windows=traffic.windows,
        moves=traffic.moves,
        sequences_moved=traffic.sequences_moved,
        recomputed_tokens=sum(ledger.recomputed_tokens for ledger in ledgers),
        preemptions=sum(ledger.preemptions for ledger in ledgers),
        spans=tuple(tuple(ledger.spans) for ledger in ledgers if ledger.spans is not None),
    )
