"""`erollout simulate`: rollouts of a cluster under a virtual clock. Light at import; the simulator is loaded when it runs."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.errors import UserError

if TYPE_CHECKING:
    from erollout.simulation.experiment import Setting, Strategy

STEPWISE_TOKENS = 1_000_000
"""Largest rollout, in tokens, that --clock auto simulates step by step."""
WINDOW_SECONDS, WINDOW_SECONDS_PER_REPLICA = 0.05, 1e-4
"""Default --window-seconds: the configuration's default, or more with many replicas."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `simulate` to the command line."""
    parser = commands.add_parser(
        "simulate", help="predict rollouts of a cluster for each speculation mode and coordination policy"
    )
    source = parser.add_argument_group("hardware and model")
    source.add_argument("--calibration", help="calibration file from `erollout calibrate fit`")
    source.add_argument("--hardware", help="a known device instead of a calibration: A100, H100, H200, ...")
    source.add_argument("--model", help="with --hardware: name of a published model, or directory with its config.json")
    source.add_argument("--drafter", default=None, help="drafter format; default: the calibration's first, else w4a16_clip")
    source.add_argument("--tensor-parallel", type=int, default=1, help="GPUs per replica")
    cluster = parser.add_argument_group("cluster")
    size = cluster.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=int, help="GPUs of the cluster; default: those of one replica")
    size.add_argument("--replicas", type=int, help="number of replicas, instead of --gpus (default 1)")
    cluster.add_argument("--max-num-seqs", type=int, default=128, help="largest batch of a replica")
    cluster.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="largest number of tokens in one pass of a replica"
    )
    cluster.add_argument("--kv-tokens", type=int, help="KV cache of a replica, in tokens; default: large enough")
    work = parser.add_argument_group("work")
    work.add_argument("--prompts", type=int, help="prompts of the whole cluster; default: as many as fill all slots")
    work.add_argument("--group-size", type=int, default=8, help="responses per prompt")
    work.add_argument("--max-tokens", type=int, default=8192, help="longest response")
    work.add_argument("--lengths", default="lognormal:600,0.9", help="lognormal:median,sigma[,correlation] or a JSONL trace")
    work.add_argument("--prompt-tokens", type=int, default=128, help="prompt length, with lognormal lengths")
    work.add_argument("--acceptance", default="0.9", help="acceptance of a draft token, or shares by position: 0.95,0.9,0.84")
    arms = parser.add_argument_group("strategies")
    arms.add_argument(
        "--modes", default="off,always,toggle,ladder,adaptive", help="comma-separated speculation modes; also: oracle"
    )
    arms.add_argument("--policies", default="replica", help="coordination policies: replica, cluster, makespan")
    arms.add_argument(
        "--dispatch", "--hand-outs", dest="dispatches", default="static", help="dispatch of prompts: static, dynamic"
    )
    arms.add_argument("--num-speculative-tokens", type=int, default=5, help="draft length of the modes always and toggle")
    arms.add_argument("--max-speculative-tokens", type=int, default=11, help="longest draft of the mode adaptive")
    arms.add_argument(
        "--window-seconds", type=float, help="pause between two windows; default: grows with the number of replicas"
    )
    run = parser.add_argument_group("simulation")
    run.add_argument("--seeds", type=int, default=3, help="number of random draws of lengths and acceptance to average over")
    run.add_argument(
        "--rollouts", type=int, default=2, help="consecutive rollouts: each starts with what the ones before have learnt"
    )
    run.add_argument("--warm-up", type=int, default=1, help="initial rollouts to discard")
    run.add_argument("--noise", type=float, default=0.0, help="standard deviation of the logarithm of a step's time")
    run.add_argument(
        "--clock", choices=("auto", "step", "jump"), default="auto", help="step: simulate every engine step; jump: only events"
    )
    rest = run.add_mutually_exclusive_group()
    rest.add_argument("--rollout-share", type=float, default=0.65, help="rollout's share of an RL step without speculation")
    rest.add_argument("--rest-seconds", type=float, help="seconds of an RL step outside the rollout")
    run.add_argument("--out", help="directory for rollouts.csv, summary.json and plots")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from rich.console import Console

    from erollout.simulation.experiment import SimulatedRollout, compare
    from erollout.simulation.report import rest_of_step, summarize, table, write
    from erollout.tracking.terminal import print_whole

    setting, strategies = build_setting(options), build_strategies(options)
    console = Console(highlight=False)
    console.print(_describe(setting, options), soft_wrap=True)

    def tell(outcome: SimulatedRollout) -> None:
        console.print(
            f"{outcome.strategy}: seed {outcome.seed}, {outcome.seconds:.1f} s, {outcome.windows} windows",
            style="dim",
            soft_wrap=True,
        )

    with _errors_alone("erollout.speculation"):  # toggles log their losses, here for every replica
        outcomes = compare(setting, strategies, options.seeds, tell)
    rest = options.rest_seconds if options.rest_seconds is not None else rest_of_step(outcomes, options.rollout_share)
    summaries = summarize(outcomes, rest)
    print_whole(table(summaries, f"{options.seeds} seeds, rest of a step {rest:.1f} s"), console)
    if options.out:
        from erollout.simulation.plot_files import draw  # matplotlib takes a second

        write(Path(options.out), outcomes, summaries, {"arguments": arguments, "window_seconds": setting.window_seconds})
        draw(Path(options.out), outcomes, summaries)
    return 0


@contextmanager
def _errors_alone(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_setting(options: argparse.Namespace) -> "Setting":
    """Raises UserError for options that can't be simulated."""
    import numpy as np

    from erollout.configuration.speculation import DrafterConfig, SpeculationConfig, ToggleConfig
    from erollout.simulation.draft_outcomes import parse_acceptance
    from erollout.simulation.experiment import Setting
    from erollout.simulation.replica import Limits
    from erollout.simulation.step_times import read_passes
    from erollout.simulation.workload import parse_lengths

    _check(options)
    replicas = _replicas(options)
    prompts = options.prompts or -(-replicas * options.max_num_seqs // options.group_size)
    passes, format = read_passes(options.calibration, options.hardware, options.model, options.drafter, options.tensor_parallel)
    lengths = parse_lengths(options.lengths, options.prompt_tokens)
    sample = lengths.draw(min(prompts, 1000), options.group_size, options.max_tokens, np.random.default_rng(0))
    tokens = sample.tokens / sample.num_prompts * prompts
    stepwise = options.clock == "step" or (options.clock == "auto" and (tokens <= STEPWISE_TOKENS or bool(options.kv_tokens)))
    if not stepwise and options.kv_tokens:
        raise UserError("--kv-tokens needs --clock step: jumps do not preempt")
    quiet = {} if stepwise else {"probe_interval": 0}
    drafter = DrafterConfig(format=format)  # type: ignore[call-arg]  # mypy does not see through section
    toggle = ToggleConfig(max_speculative_tokens=options.max_speculative_tokens, **quiet)  # type: ignore[call-arg]
    speculation = SpeculationConfig(  # type: ignore[call-arg]
        num_speculative_tokens=options.num_speculative_tokens, drafter=drafter, toggle=toggle
    )
    return Setting(
        passes=passes,
        truth=passes,
        acceptance=parse_acceptance(options.acceptance),
        lengths=lengths,
        replicas=replicas,
        num_prompts=prompts,
        group_size=options.group_size,
        max_tokens=options.max_tokens,
        limits=Limits(options.max_num_seqs, options.max_num_batched_tokens, options.kv_tokens),
        speculation=speculation,
        window_seconds=options.window_seconds or WINDOW_SECONDS + WINDOW_SECONDS_PER_REPLICA * replicas,
        noise=options.noise,
        rollouts=options.rollouts,
        warm_up=options.warm_up,
        stepwise=stepwise,
    )


def build_strategies(options: argparse.Namespace) -> "list[Strategy]":
    """All combinations. Raises UserError for an unknown name."""
    from erollout.simulation.experiment import MODES, Strategy

    modes = _names("--modes", options.modes, MODES)
    policies = _names("--policies", options.policies, ("replica", "cluster", "makespan"))
    dispatches = _names("--dispatch", options.dispatches, ("static", "dynamic"))
    return [Strategy(m, p, d) for p in policies for d in dispatches for m in modes]  # type: ignore[arg-type]


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name!r} is unknown; choose from {', '.join(known)}")
    return names


def _check(options: argparse.Namespace) -> None:
    least = {
        **dict.fromkeys(("group_size", "max_tokens", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel"), 1),
        **dict.fromkeys(("prompts", "gpus", "replicas", "kv_tokens"), 1),
        **dict.fromkeys(("seeds", "rollouts", "num_speculative_tokens", "max_speculative_tokens", "prompt_tokens"), 1),
        **dict.fromkeys(("warm_up", "noise", "rest_seconds"), 0),
    }
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not low <= value < inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be a number of at least {low}")
    for name, most in {"num_speculative_tokens": 64, "max_speculative_tokens": 64, "replicas": 10**6, "gpus": 10**6}.items():
        if (value := getattr(options, name)) is not None and value > most:
            raise UserError(f"--{name.replace('_', '-')} {value} must be a number of at most {most}")
    if options.warm_up >= options.rollouts:
        raise UserError(f"--warm-up {options.warm_up} discards all of --rollouts {options.rollouts}; raise --rollouts")
    if not 0 < options.rollout_share <= 1:
        raise UserError(f"--rollout-share {options.rollout_share} must be above 0 and at most 1")
    if options.window_seconds is not None and not 0 < options.window_seconds < inf:
        raise UserError(f"--window-seconds {options.window_seconds} must be above 0")


def _replicas(options: argparse.Namespace) -> int:
    if options.gpus is None:
        return int(options.replicas or 1)
    if options.gpus % options.tensor_parallel:
        raise UserError(f"--gpus {options.gpus} is no multiple of --tensor-parallel {options.tensor_parallel}")
    return int(options.gpus // options.tensor_parallel)


def _describe(setting: "Setting", options: argparse.Namespace) -> str:
    clock = "step by step" if setting.stepwise else "from event to event, without probes"
    windows = f"windows of {setting.window_seconds:.3g} s"
    return (
        f"{setting.replicas} replicas of {options.tensor_parallel} GPUs, {setting.num_prompts} prompts x {setting.group_size}, "
        f"lengths {options.lengths}, acceptance {options.acceptance}; simulated {clock}; {windows}"
    )
