"""Rollouts by speculation mode on two replicas of one thread each: seconds, tokens per second, seconds of a whole RL step.

    make demo-rollout                       # makes the policy: SmolLM2-135M, taught chain sums
    python benchmarks/rollout_modes.py      # needs the `benchmark` and `modelopt` extras; overrides may follow (key=value)

All arms are rollouts of the trainer's own RolloutWorker in one pair of processes: one engine per replica, only the toggle is
another one (two engines in a process differ by up to 15 %). A draw is a set of prompts with its own noise; every arm rolls out
every draw, in an order that rotates from draw to draw. Each arm learns from its own rollouts alone, as a run in its mode would:
what steps cost is measured before its first one, on a draw of its own that is not counted. Tokens must be the same in all arms.

Seconds of a rollout are those of the slowest replica. Figures are medians over the draws; a saving is 1 minus the median of the
ratios within the draws, with a bootstrap confidence interval of 95 % over the draws. A step adds what the other phases take,
measured in the same run: refit (with requantisation, except in `off`), log-probs and update of as many samples. CPU seconds, of
the replica that computed most, stand beside: other processes on the machine distort them less.

The mode `oracle` takes, at each step, the arm with the most tokens per second by a table measured just before: rollouts of the
same load with every draft length fixed (`--table-draws`, `--longest`). Adaptive and toggle are compared with it.

Sections:
  tail      long-tailed lengths: prompts with a lognormal number of terms, natural stops, by number of sequences and by group
  base      SmolLM2-135M-Instruct before it was taught, asked about the same sums: high entropy
  forced    the same with lognormal lengths that are forced: a tail without teaching, for machines where that takes an hour
  batches   equal lengths, so that the batch is constant: 1 to 64 sequences at once
  policies  the coordinator's policies on even and on uneven replicas, mode adaptive
"""

import argparse
import hashlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from decode import machine
from table_oracle import Steps, TableOracle, steps_of, table_of

from erollout.algorithm import build_algorithm
from erollout.config import Config, load_config
from erollout.data.chain_sum import TASK_NAME, question, solution
from erollout.data.cursor import DataCursor
from erollout.data.items import TaskItem
from erollout.data.prompts import PromptDataset, PromptRenderer
from erollout.environment import set_default, stay_on_loopback
from erollout.parallel.collectives import all_gather
from erollout.parallel.groups import ParallelContext, initialize, shut_down
from erollout.policy.actor import Actor
from erollout.rewards.pool import RewardPool
from erollout.rollout.coordination import Coordination
from erollout.rollout.decode_replica import DecodeReplica
from erollout.rollout.rollout_worker import TRAINING_STREAM, RolloutResult, RolloutWorker
from erollout.speculation.statistics import SpeculationStatistics, merge
from erollout.speculation.trace import DecisionTrace
from erollout.training.groups import GroupCollector
from erollout.training.loop import Phases
from erollout.training.preflight import preflight, prompt_limits
from erollout.training.trainer import Trainer
from erollout.types import Prompt, RolloutRequest

CONFIG = Path(__file__).parent.parent / "configs" / "demo-rollout.yaml"
BASE_POLICY = "~/.cache/erollout/smollm2-135m-instruct"
BASE_SETTINGS = ("data.chat_template=true", "data.instruction=What is {prompt} Explain.", "rollout.max_tokens=256")
REPLICAS = 2
MODES = ("off", "always", "toggle", "adaptive", "oracle", "ladder")
POLICIES = ("replica", "cluster", "makespan")
SETTINGS = (
    f"parallel.world_size={REPLICAS}",
    "model.max_position_embeddings=1024",
    "rollout.max_prompt_tokens=192",
    "rollout.max_tokens=512",
    "rollout.kv_cache_gib=0.6",
    "rollout.max_num_batched_tokens=4096",
    "speculation.trace_interval=0",
    "model.dtype=bfloat16",
    "optimizer.lr=1e-30",  # an update takes its time and leaves the policy as it is
    "train.max_tokens_per_micro_batch=1024",
)
TRACED = (("1", 1, 1), ("2", 2, 2), ("3-4", 3, 4), ("5-8", 5, 8), ("9-16", 9, 16), ("17-", 17, 1 << 30))
"""Batch sizes that the time of a rollout is divided by."""
RESAMPLES = 4000
MOVED = "coordinator/sequences_out"


@dataclass(frozen=True, slots=True)
class Tail:
    """A distribution of chain sums: the number of terms is lognormal. A response takes about 7 tokens per term."""

    median_terms: float = 8.0
    sigma: float = 1.0
    min_terms: int = 2
    max_terms: int = 64


@dataclass(frozen=True, slots=True)
class LongTailedSums:
    """As data.kind = chain_sum_cot, with other numbers of terms: those of item i are tails[i % len(tails)]'s."""

    tails: Sequence[Tail] = (Tail(),)

    def __len__(self) -> int:
        return 1_000_000

    def item(self, index: int) -> TaskItem:
        """Drawn from the index alone."""
        rng, tail = random.Random(index), self.tails[index % len(self.tails)]
        count = round(rng.lognormvariate(math.log(tail.median_terms), tail.sigma))
        count = min(max(count, tail.min_terms), tail.max_terms)
        terms = [rng.randrange(10), *(rng.choice((1, -1)) * rng.randrange(10) for _ in range(count - 1))]
        return TaskItem(question(terms), solution(terms), TASK_NAME, {"answer": sum(terms)}, f"{TASK_NAME} item {index}")


@dataclass(frozen=True, slots=True)
class ForcedLengths:
    """Lognormal lengths of responses, in tokens, whatever the policy writes."""

    median: float = 60.0
    sigma: float = 1.0
    longest: int = 400

    def of(self, index: int) -> int:
        """That of a prompt, drawn from its index alone."""
        length = round(random.Random(index).lognormvariate(math.log(self.median), self.sigma))
        return min(max(length, 8), self.longest)


class ForcedWorker(RolloutWorker):
    """Asks for responses of given lengths."""

    lengths: ForcedLengths | None = None
    """None: natural stops."""

    def requests(self, *args: Any) -> list[RolloutRequest]:
        requests = super().requests(*args)
        if self.lengths is None:
            return requests
        forced = {r.prompt_index: self.lengths.of(r.prompt_index) for r in requests}
        return [replace(r, sampling=replace(r.sampling, max_tokens=forced[r.prompt_index], ignore_eos=True)) for r in requests]


@dataclass(frozen=True, slots=True)
class Load:
    """Workload of a draw."""

    name: str
    sequences: int
    """Number of sequences per replica, all at once unless at_once is less."""
    group_size: int = 1
    at_once: int = 64
    max_tokens: int | None = None
    """Length of every response; None: natural stops."""
    lengths: ForcedLengths | None = None
    source: LongTailedSums = LongTailedSums()

    @property
    def num_prompts(self) -> int:
        return REPLICAS * self.sequences // self.group_size


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rollout."""

    seconds: float
    """Seconds of the slowest replica."""
    phase_seconds: float
    """Seconds of the trainer's whole rollout phase."""
    cpu_seconds: float
    """CPU seconds of the replica that computed most, in that phase."""
    tokens: int
    lengths: tuple[int, ...]
    digest: str
    """Digest of all tokens."""
    speculation: SpeculationStatistics
    metrics: dict[str, float]
    """Metrics of toggle and coordinator, mean over replicas."""
    seconds_at: dict[str, float]
    """Seconds of both replicas, by TRACED."""


Draws = dict[str, list[Outcome]]
"""By arm: one outcome per draw."""


class Bench:
    """This rank's replica with one policy."""

    def __init__(self, config: Config, context: ParallelContext, decisions: Path | None) -> None:
        resolved = preflight(config)
        self.config = config
        self.context = context
        self.resolved = resolved
        self.decisions = decisions
        self._limits = prompt_limits(config.model, config.rollout, resolved.architecture)
        options = config.rewards
        self.rewards = RewardPool(resolved.scorer, options.num_workers, options.timeout_seconds, options.error_value)
        replica = DecodeReplica(config, resolved.architecture, context, resolved.tokenizer)
        self.worker = ForcedWorker(config, replica, self.rewards)
        self.worker.load_weights()

    def arm(self, mode: str, num_speculative_tokens: int | None = None, **coordinator: object) -> Coordination:
        """A run in this mode that has not begun yet."""
        config, worker = self.config, self.worker
        n = num_speculative_tokens or config.speculation.num_speculative_tokens
        speculation = replace(config.speculation, mode=mode, num_speculative_tokens=n)
        config = replace(config, speculation=speculation, coordinator=replace(config.coordinator, **coordinator))
        return Coordination(config, self.context, worker.engine, worker.speculation if mode != "off" else None)

    def oracle(self, load: Load, options: argparse.Namespace) -> Coordination:
        """An arm that knows what every arm yields on such a load. Its table is measured on draws of their own."""
        data, steps = self.data(load), list[Steps]()
        for n in range(options.longest + 1):
            fixed = self.arm("always", n) if n else self.arm("off")
            for draw in range(options.table_draws):
                number = options.draws + 1 + draw
                self._rollout(fixed, load, _prompts(data, load, number), number)
                assert fixed.toggle is not None
                steps.append(steps_of(fixed.toggle.trace))
        table = table_of(part for parts in all_gather(steps) for part in parts)
        oracle, tuning = self.arm("adaptive"), self.config.speculation.toggle
        tuning = replace(tuning, probe_interval=0, max_speculative_tokens=options.longest)
        speculation = replace(self.config.speculation, mode="adaptive", toggle=tuning)
        oracle.toggle = TableOracle(speculation, oracle.formats, fixed.toggle.cost, table)  # a cost for its metrics only
        return oracle

    def arms(self, modes: Sequence[str], load: Load, options: argparse.Namespace) -> dict[str, Coordination]:
        return {mode: self.oracle(load, options) if mode == "oracle" else self.arm(mode) for mode in modes}

    def data(self, load: Load) -> PromptDataset:
        return PromptDataset(load.source, PromptRenderer(self.config.data, self.resolved.tokenizer), self._limits)

    def measure(self, arms: dict[str, Coordination], load: Load, draws: int) -> Draws:
        """All arms on all draws. RuntimeError where tokens differ between arms."""
        data, outcomes = self.data(load), {name: list[Outcome]() for name in arms}
        for coordination in arms.values():
            self._rollout(coordination, load, _prompts(data, load, draws), draws)
        names = list(arms)
        for draw in range(draws):
            for name in names[draw % len(names) :] + names[: draw % len(names)]:
                outcomes[name].append(self._rollout(arms[name], load, _prompts(data, load, draw), draw))
                self._keep_decisions(arms[name], f"{load.name}.{name}.{draw}")
            if len({outcomes[name][draw].digest for name in names}) > 1:
                raise RuntimeError(f"{load.name}, draw {draw}: the arms' tokens differ")
        return outcomes

    def _rollout(self, coordination: Coordination, load: Load, prompts: Sequence[Prompt], draw: int) -> Outcome:
        worker = self.worker
        worker.coordination, worker.lengths = coordination, load.lengths
        worker.engine.rollout = replace(self.config.rollout, max_num_seqs=load.at_once)
        sampling = worker.sampling_params()
        if load.max_tokens is not None:
            sampling = replace(sampling, max_tokens=load.max_tokens, ignore_eos=True)
        dist.barrier()
        start, computed = time.perf_counter(), time.process_time()
        result = worker.rollout(prompts, sampling, load.group_size, TRAINING_STREAM, draw + 1)
        seconds, computed = time.perf_counter() - start, time.process_time() - computed
        assert coordination.toggle is not None
        return _outcome(result, all_gather((seconds, computed, _seconds_at(coordination.toggle.trace))))

    def _keep_decisions(self, coordination: Coordination, name: str) -> None:
        if self.decisions is not None and coordination.toggle is not None:
            name = name.replace(" ", "_").replace(",", "")
            coordination.toggle.trace.write(self.decisions / f"{name}.replica_{self.context.rank}.csv.gz")

    def other_phases(self, load: Load, steps: int) -> dict[str, float]:
        """Medians of the trainer's steps with that load: seconds of refit, requantise, logprobs, update."""
        config, options = self.config, self.config.rollout
        config = replace(config, rollout=replace(options, prompts_per_step=load.num_prompts, group_size=load.group_size))
        actor = Actor(config, self.resolved.architecture, self.context, steps)
        self.worker.coordination = self.arm("off")
        self.worker.engine.rollout = replace(options, max_num_seqs=load.at_once)
        algorithm = build_algorithm(config.algorithm)
        groups = GroupCollector(self.worker, algorithm, self.data(load), config.rollout, DataCursor())
        trainer = Trainer(config, actor, algorithm, groups)
        seen = [trainer.train_step(step, Phases(step)).metrics for step in range(steps)]
        names = {
            "refit": "seconds/refit",
            "requantise": "speculation/requantize_seconds",
            "logprobs": "seconds/logprobs",
            "update": "seconds/update",
        }
        return {name: statistics.median(step[key] for step in seen) for name, key in names.items()}


def _prompts(data: PromptDataset, load: Load, draw: int) -> list[Prompt]:
    return [data.prompt(draw * load.num_prompts + i) for i in range(load.num_prompts)]


def _outcome(result: RolloutResult, replicas: list[tuple[float, float, dict[str, float]]]) -> Outcome:
    """`replicas`: of each, seconds, CPU seconds, and seconds by TRACED."""
    responses = [sample.rollout.response_ids for sample in result.scored]
    return Outcome(
        max(report["seconds"] for report in result.reports),
        max(seconds for seconds, *_ in replicas),
        max(computed for _, computed, _ in replicas),
        sum(map(len, responses)),
        tuple(map(len, responses)),
        hashlib.sha256(repr(responses).encode()).hexdigest(),
        result.speculation,
        _over_replicas([summary.metrics for summary in result.summaries], statistics.fmean),
        _over_replicas([seconds_at for *_, seconds_at in replicas], sum),
    )


def _over_replicas(parts: Sequence[dict[str, float]], combined: Callable[[list[float]], float]) -> dict[str, float]:
    return {name: combined([part[name] for part in parts]) for name in parts[0]}


def _seconds_at(trace: DecisionTrace) -> dict[str, float]:
    columns = trace.columns
    steps = list(zip(columns["decoding"], columns["seconds"], strict=True))
    return {name: sum(seconds for batch, seconds in steps if low <= batch <= high) for name, low, high in TRACED}


@dataclass(frozen=True, slots=True)
class Interval:
    """A median of ratios with its bootstrap confidence interval of 95 %."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Interval":
        logs, rng = [math.log(ratio) for ratio in ratios], random.Random(0)
        medians = sorted(statistics.median(rng.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
        ends = medians[round(0.025 * (RESAMPLES - 1))], medians[round(0.975 * (RESAMPLES - 1))]
        return cls(math.exp(statistics.median(logs)), *map(math.exp, ends))

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def saving(self) -> str:
        """Interval of 1 minus the ratio, in percent."""
        return f"{100 * (1 - self.middle):.1f} % ({100 * (1 - self.high):.1f} to {100 * (1 - self.low):.1f})"


def _ratio(draws: Draws, arm: str, to: str, seconds: Callable[[Outcome], float] = lambda outcome: outcome.seconds) -> Interval:
    return Interval.of([seconds(a) / seconds(b) for a, b in zip(draws[arm], draws[to], strict=True)])


def _median(outcomes: Iterable[Outcome], value: Callable[[Outcome], float]) -> float:
    return statistics.median(map(value, outcomes))


def _mean(outcomes: Sequence[Outcome], metric: str) -> float:
    """Over the rollouts, of the replicas' mean."""
    return statistics.fmean(outcome.metrics[metric] for outcome in outcomes)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


MODE_COLUMNS = (
    *("mode", "rollout s", "saved against off", "by CPU seconds", "tokens/s", "step s", "saved of the step"),
    *("acceptance length", "mean n", "steps that speculate", "probes", "sequences moved"),
)


def describe(draws: Draws) -> str:
    """Lengths, and where decoding without drafts spends its time."""
    outcomes = draws["off"]
    lengths = [n for outcome in outcomes for n in outcome.lengths]
    longest = statistics.median(max(outcome.lengths) / statistics.fmean(outcome.lengths) for outcome in outcomes)
    total = {name: sum(outcome.seconds_at[name] for outcome in outcomes) for name, _, _ in TRACED}
    shares = ", ".join(f"{100 * t / max(sum(total.values()), 1e-9):.0f} % at {name}" for name, t in total.items())
    return (
        f"{len(outcomes)} draws of {len(outcomes[0].lengths)} responses: mean {statistics.fmean(lengths):.0f} tokens, median "
        f"{statistics.median(lengths):.0f}, longest {max(lengths)}, longest over mean {longest:.1f} (median of draws). "
        f"Time of `off` by sequences in the batch: {shares}."
    )


def mode_rows(draws: Draws, phases: dict[str, float] | None) -> list[list[str]]:
    """One per arm, the first being what the others are compared with."""

    def step_seconds(arm: str) -> Callable[[Outcome], float]:
        others = sum(phases.values()) - (1 + (arm == "off")) * phases["requantise"] if phases else 0.0  # refit contains it
        return lambda outcome: outcome.phase_seconds + others

    rows = []
    for arm, outcomes in draws.items():
        spoken, step = merge(outcome.speculation for outcome in outcomes), step_seconds(arm)
        ratios = [step(a) / step_seconds("off")(b) for a, b in zip(outcomes, draws["off"], strict=True)]
        rows.append(
            [
                arm,
                f"{_median(outcomes, lambda o: o.seconds):.2f}",
                "" if arm == "off" else _ratio(draws, arm, "off").saving,
                "" if arm == "off" else _ratio(draws, arm, "off", lambda o: o.cpu_seconds).saving,
                f"{_median(outcomes, lambda o: o.tokens / o.seconds):.0f}",
                f"{_median(outcomes, step):.2f}" if phases else "-",
                "" if arm == "off" or not phases else Interval.of(ratios).saving,
                f"{spoken.acceptance_length:.2f}" if spoken.num_drafts else "",
                f"{_mean(outcomes, 'toggle/mean_num_speculative_tokens'):.1f}",
                f"{100 * _mean(outcomes, 'toggle/share_speculating'):.0f} %",
                f"{100 * _mean(outcomes, 'toggle/share_probing'):.1f} %",
                f"{REPLICAS * _mean(outcomes, MOVED):.1f}",
            ]
        )
    return rows


def behind_oracle(draws: Draws) -> list[str]:
    """Seconds of the deciding modes over the oracle's, by the wall clock and by CPU seconds."""
    if "oracle" not in draws:
        return []
    modes = [mode for mode in ("toggle", "adaptive") if mode in draws]
    by_cpu = {mode: _ratio(draws, mode, "oracle", lambda outcome: outcome.cpu_seconds) for mode in modes}
    return [f"{mode} / oracle: {_ratio(draws, mode, 'oracle')}; by CPU seconds {by_cpu[mode]}." for mode in modes] + [""]


TAILS = (
    (Load("16 per replica", 16), MODES),
    (Load("32 per replica", 32), MODES[:-1]),
    (Load("16 per replica, groups of 4", 16, group_size=4), ("off", "always", "adaptive")),
)


def tail_section(bench: Bench, options: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    phases = bench.other_phases(TAILS[0][0], options.steps) if options.steps else None
    if phases is not None:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        lines += [f"Other phases of a step of the first load, seconds (refit contains requantise): {parts}.", ""]
    for load, modes in TAILS[: options.loads]:
        modes = tuple(mode for mode in modes if mode in options.modes)
        draws = bench.measure(bench.arms(modes, load, options), load, options.draws)
        lines += [f"### {load.name}", "", describe(draws), ""]
        lines += _table(MODE_COLUMNS, mode_rows(draws, phases))
        lines += behind_oracle(draws)
        phases = None  # theirs are another load's
    return lines


def base_section(bench: Bench, options: argparse.Namespace) -> list[str]:
    return _of_one_load(bench, options, Load("base policy, 16 per replica", 16))


def forced_section(bench: Bench, options: argparse.Namespace) -> list[str]:
    return _of_one_load(bench, options, Load("base policy, forced tail, 16 per replica", 16, lengths=ForcedLengths()))


def _of_one_load(bench: Bench, options: argparse.Namespace, load: Load) -> list[str]:
    modes = tuple(mode for mode in MODES[:-1] if mode in options.modes)
    draws = bench.measure(bench.arms(modes, load, options), load, options.draws)
    lines = [f"### {load.name}", "", describe(draws), "", *_table(MODE_COLUMNS, mode_rows(draws, None))]
    return lines + behind_oracle(draws)


def batches_section(bench: Bench, options: argparse.Namespace) -> list[str]:
    """Prompts of 20 terms, so that no response ends before it is cut; one per replica, so that little is spent on them."""
    arms, rows = {mode: bench.arm(mode) for mode in ("off", "always", "toggle", "adaptive")}, []
    source = LongTailedSums((Tail(20, 0.0),))
    for batch in sorted(options.batches, reverse=True):  # the largest first: costs are measured up to it
        tokens = options.batch_tokens if batch > 4 else 2 * options.batch_tokens
        draws = bench.measure(arms, Load(f"batch {batch}", batch, batch, batch, tokens, source=source), options.batch_draws)
        better = min(("off", "always"), key=lambda arm: _ratio(draws, arm, "off").middle)
        speed = [f"{_median(draws[arm], lambda o: o.tokens / o.seconds):.0f}" for arm in arms]
        against = [str(_ratio(draws, arm, better)) for arm in ("toggle", "adaptive")]
        shares = [f"{100 * _mean(draws[arm], 'toggle/share_speculating'):.0f} %" for arm in ("toggle", "adaptive")]
        mean_n = f"{_mean(draws['adaptive'], 'toggle/mean_num_speculative_tokens'):.1f}"
        rows.append([str(batch), *speed, str(_ratio(draws, "always", "off")), better, *against, *shares, mean_n])
    columns = (
        *("sequences", *(f"{arm} tokens/s" for arm in arms), "seconds, always / off", "the better"),
        *("toggle / the better", "adaptive / the better", "toggle speculates", "adaptive speculates", "its mean n"),
    )
    return _table(columns, reversed(rows))


def policies_section(bench: Bench, options: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    uneven = LongTailedSums((Tail(14, 1.0), Tail(5, 0.6)))  # static turns: the long ones are the first replica's
    loads = Load("even tails, 16 per replica", 16), Load("uneven tails, 16 per replica", 16, source=uneven)
    for load, dispatch in zip(loads, ("dynamic", "static"), strict=True):
        arms = {policy: bench.arm("adaptive", policy=policy, dispatch=dispatch) for policy in POLICIES}
        draws = bench.measure(arms, load, options.draws)
        rows = [
            [
                policy,
                f"{_median(outcomes, lambda o: o.seconds):.2f}",
                str(_ratio(draws, policy, "replica")),
                f"{_median(outcomes, lambda o: o.tokens / o.seconds):.0f}",
                f"{_mean(outcomes, 'coordinator/idle_seconds') / statistics.fmean(o.seconds for o in outcomes):.2f}",
                f"{REPLICAS * _mean(outcomes, MOVED):.1f}",
                f"{100 * _mean(outcomes, 'coordinator/exchange_share'):.2f} %",
            ]
            for policy, outcomes in draws.items()
        ]
        columns = ("policy", "rollout s", "over replica", "tokens/s", "share idle", "sequences moved", "exchange's share")
        lines += [f"### {load.name}, dispatch {dispatch}", "", *_table(columns, rows)]
    return lines


SECTIONS: dict[str, tuple[str, Callable[[Bench, argparse.Namespace], list[str]]]] = {
    "tail": ("Long-tailed lengths", tail_section),
    "base": ("Before it was taught", base_section),
    "forced": ("Before it was taught, with long-tailed lengths", forced_section),
    "batches": ("Equal lengths", batches_section),
    "policies": ("Coordinator policies", policies_section),
}


def run(options: argparse.Namespace) -> list[str]:
    """On every rank of a world of REPLICAS: the report's lines."""
    torch.set_num_threads(1)
    started, lines = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, "speculation.mode=adaptive", f"train.output_dir={folder}", *options.overrides]
        context = initialize(load_config(options.config, settings))
        try:
            for name in options.sections:
                began, (title, section) = time.perf_counter(), SECTIONS[name]
                base = name in ("base", "forced") and options.base_policy
                policy = [f"model.path={options.base_policy}", *BASE_SETTINGS] if base else []
                bench = Bench(load_config(options.config, [*settings, *policy]), context, options.decisions)
                with bench.rewards:
                    part = [f"## {title}", "", *section(bench, options)]
                part += [f"({time.perf_counter() - began:.0f} s)", ""]
                if context.rank == 0:
                    print("\n".join(part), flush=True)
                lines += part
        finally:
            shut_down(context)
    return [*lines, f"Elapsed: {time.perf_counter() - started:.0f} s."]


def _rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    stay_on_loopback()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", REPLICAS), rank=rank, world_size=REPLICAS)
    lines = run(options)
    dist.destroy_process_group()
    if rank == 0:
        print(lines[-1])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[name for name in SECTIONS if name != "forced"])
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="of sections tail, base and forced; off must be one"
    )
    parser.add_argument("--loads", type=int, default=len(TAILS), help="of section tail: how many of its loads")
    parser.add_argument("--longest", type=int, default=6, help="longest draft of the oracle's table")
    parser.add_argument("--table-draws", type=int, default=1, help="rollouts of each draft length for the oracle's table")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument(
        "--base-policy", default=BASE_POLICY, help="policy directory of sections base and forced; empty: the same"
    )
    parser.add_argument("--draws", type=int, default=3, help="of each load with natural stops")
    parser.add_argument("--steps", type=int, default=1, help="whole RL steps for the other phases' seconds; 0: none")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--batch-tokens", type=int, default=24, help="of each response in section batches, twice that up to 4")
    parser.add_argument("--batch-draws", type=int, default=5)
    parser.add_argument("--decisions", type=Path, help="directory for the decisions of every rollout")
    parser.add_argument("overrides", nargs="*", help="of the configuration: key=value")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    options = parse()
    set_default("OMP_NUM_THREADS", "1")
    set_default("PYTHONWARNINGS", "ignore")  # of the ranks: megatron-core names each optional package that is not installed
    torch.set_num_threads(1)
    print("\n".join(machine()), f"\n{REPLICAS} replicas of one thread, gloo; {options.draws} draws.\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (options, folder), nprocs=REPLICAS)


if __name__ == "__main__":
    main()
