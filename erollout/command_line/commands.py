"""The commands of `erollout`. Errors that a user can fix are one line on stderr, with exit status 2."""

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from erollout import __version__
from erollout.calibration.commands import add_commands
from erollout.command_line.export import add_command as add_export
from erollout.command_line.generate import add_command as add_generate
from erollout.command_line.metrics import add_command as add_metrics
from erollout.command_line.plot import add_command as add_plot
from erollout.command_line.policy_source import PolicySource, add_policy_arguments, read_policy
from erollout.command_line.report import add_command as add_report
from erollout.command_line.show_config import add_command as add_config
from erollout.config import Config, load_config, require_trainable, require_training_data
from erollout.configuration.arguments import Commands, Parser, add_overrides, add_run_arguments, overrides
from erollout.configuration.shipped import shipped_config
from erollout.doctor.commands import add_command as add_doctor
from erollout.environment import is_elastic, is_rank, launcher_environment
from erollout.errors import UserError
from erollout.launch.commands import add_commands as add_launch_commands
from erollout.launch.parent import end_with_parent, require_one_task
from erollout.resilience.signals import starting
from erollout.security.redaction import redact
from erollout.simulation.commands import add_command
from erollout.tracking.log import quiet_libraries

if TYPE_CHECKING:
    from erollout.checkpoint.resume import RunKind

_SPEAK_AFTER_SECONDS = 5.0
"""Time that other ranks wait before printing an error: one that all ranks have is printed by rank 0, which then ends them."""
_RANKS_AT_LEAST, _RANKS_PER_CPU = 64, 4


def run_command(arguments: Sequence[str]) -> int:
    """Run a command line. Returns the exit status."""
    # at import, Megatron warns of missing GPU libraries, and torch of its own deprecated names
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    quiet_libraries()
    if is_elastic():
        end_with_parent()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end the command
    if not arguments:
        parser().print_help(sys.stderr)
        return 2
    options = parser().parse_args(arguments)
    try:
        launcher_environment()  # raises for incomplete launcher variables, whatever the command
        status: int = options.run(options, list(arguments))
    except UserError as error:
        _print_error(error)
        return 2
    except ModuleNotFoundError as error:  # installed without an optional part, as matplotlib, or a program of the user's
        if error.name is None or error.name.partition(".")[0] == "erollout":
            raise
        package, importer = error.name.partition(".")[0], traceback.extract_tb(error.__traceback__)[-1].filename
        fix = "install it (erollout's requirements: pip install -e .[mlflow,modelopt] in its checkout)"
        _print_error(UserError(f"the Python package {package}, which {importer} imports, is missing; {fix}"))
        return 2
    return status


def parser() -> Parser:
    """Parser of the whole command line."""
    parser = Parser(prog="erollout", description="RL post-training on Megatron-core with fast rollouts.")
    parser.add_argument("--version", action="version", version=f"erollout {__version__}")
    commands: Commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _command(commands, "train", _train, "train a policy by reinforcement learning")
    _command(commands, "sft", _sft, "fine-tune a policy on prompts with given answers")
    evaluate = _policy_command(commands, "evaluate", "sample responses to held-out prompts, score them, print a table")
    evaluate.add_argument("--out", metavar="FILE", help="JSONL file to write as well, one line per response")
    rollout = _policy_command(commands, "rollout", "sample responses to held-out prompts, score them, write them")
    rollout.add_argument("--out", required=True, metavar="FILE", help="JSONL file to write, one line per response")
    _command(commands, "compare", _compare, "compare sampling of held-out prompts with speculation off and on")
    text = "run the whole demo: tokenizer, warm-up, reinforcement learning, comparison"
    _demo_command(commands, "demo", _demo, text, "config of the supervised warm-up")
    text = "fetch a small model, fine-tune it on a task, compare rollouts"
    _demo_command(commands, "demo-rollout", _demo_rollout, text, "config of the fine-tuning")
    add_generate(commands)
    add_export(commands)
    add_metrics(commands)
    add_commands(commands, _sweep)
    add_command(commands)
    add_launch_commands(commands)
    add_doctor(commands)
    add_config(commands)
    add_plot(commands)
    add_report(commands)
    return parser


def _command(commands: Commands, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    add_run_arguments(parser)
    _add_dry_run(parser)
    parser.set_defaults(run=run)
    return parser


def _policy_command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    add_policy_arguments(parser)
    _add_dry_run(parser)
    parser.set_defaults(run=_evaluate)
    return parser


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check everything, print layouts, sizes and memory, then stop")


def _demo_command(commands: Commands, name: str, run: Callable[..., int], text: str, warm_start: str) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    shipped = "(default: the one that comes with erollout)"
    parser.add_argument(
        "--config", metavar="FILE", default=shipped_config(f"{name}.yaml"), help=f"YAML file of the demo {shipped}"
    )
    parser.add_argument(
        "--warm-start", metavar="FILE", default=shipped_config(f"{name}-sft.yaml"), help=f"{warm_start} {shipped}"
    )
    add_overrides(parser)
    parser.set_defaults(run=run)


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    read = partial(_read_config, check=require_trainable)
    return _on_ranks(options, arguments, _training, lambda run, it: run.train(it.config), read, "reinforcement learning")


def _sft(options: argparse.Namespace, arguments: list[str]) -> int:
    read = partial(_read_config, check=require_training_data)
    return _on_ranks(options, arguments, _training, lambda run, it: run.supervised(it.config), read, "supervised")


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    return _on_ranks(
        options, arguments, _sampling, lambda sampling, it: sampling.report(it.config, it.saved, options.out), read_policy
    )


def _compare(options: argparse.Namespace, arguments: list[str]) -> int:
    return _on_ranks(options, arguments, _sampling, lambda sampling, it: sampling.compare_modes(it.config))


def _sweep(options: argparse.Namespace, arguments: list[str]) -> int:
    grid = {name: getattr(options, name) or () for name in ("batches", "contexts", "drafts")}
    return _on_ranks(
        options, arguments, _sampling, lambda sampling, it: sampling.sweep(it.config, options.out, grid, options.minutes)
    )


def _read_config(options: argparse.Namespace, check: Callable[[Config], None] | None = None) -> PolicySource:
    config = load_config(options.config, overrides(options))
    if check is not None:
        check(config)
    return PolicySource(config)


def _demo(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.command_line.demo import run_demo

    return run_demo(options.config, options.warm_start, options.overrides)


def _demo_rollout(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.command_line.demo import run_demo_rollout

    return run_demo_rollout(options.config, options.warm_start, options.overrides)


def _on_ranks(
    options: argparse.Namespace,
    arguments: list[str],
    load: Callable[[], ModuleType],
    work: Callable[[ModuleType, PolicySource], None],
    read: Callable[[argparse.Namespace], PolicySource] = _read_config,
    kind: "RunKind | None" = None,
) -> int:
    """Do the work here when this is a rank; otherwise check the configuration and start the ranks on this machine.

    `load` imports what does the work: with megatron-core that takes seconds, so only ranks do.
    """
    module: ModuleType | None = None
    with starting(speaks=not is_rank()):  # the whole process: a library may swallow an interrupt while loading
        source = read(options)  # before the imports, which take seconds
        config = source.config
        if not is_rank():
            print("Loading torch and transformers, checking the configuration ...", file=sys.stderr, flush=True)
        from erollout.parallel.groups import expected_world_size
        from erollout.training.preflight import preflight, require_writable

        if (out := getattr(options, "out", None)) is not None:
            require_writable("--out", Path(out).parent)
        if getattr(options, "dry_run", False):
            from erollout.command_line.dry_run import dry_run

            print(dry_run(config, kind))
            return 0
        if not is_rank():
            require_one_task("FILE ...")
            preflight(config, kind)
        if is_rank() or expected_world_size(config.parallel) == 1:
            module = load()
        else:
            from erollout.launch.local import launch_local

            world_size = _require_room(expected_world_size(config.parallel))
            print(
                f"Starting {world_size} ranks on this machine; each loads megatron-core first ...", file=sys.stderr, flush=True
            )
    if module is None:
        return launch_local(arguments, world_size)
    work(module, source)
    return 0


def _require_room(world_size: int) -> int:
    """Raise UserError for more ranks than can be meant for one machine."""
    most = max(_RANKS_AT_LEAST, _RANKS_PER_CPU * (os.cpu_count() or 1))
    if world_size > most:
        raise UserError(
            f"parallel.world_size = {world_size} is too many ranks for this machine of {os.cpu_count()} CPUs; lower it, or "
            "start them on several with `erollout launch`"
        )
    return world_size


def _training() -> ModuleType:
    from erollout.training import session

    return session


def _sampling() -> ModuleType:
    from erollout.api import sampling

    return sampling


def _print_error(error: UserError) -> None:
    prefix = "erollout: "
    with suppress(UserError):  # the error may be in the launcher's variables themselves
        environment = launcher_environment()
        if environment is not None and environment.rank > 0:
            time.sleep(_SPEAK_AFTER_SECONDS)
            prefix = f"erollout (rank {environment.rank}): "
    print(f"{prefix}error: {redact(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
