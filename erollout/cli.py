"""The `erollout` command. Errors that a user can mend are one line on stderr and exit status 2."""

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from erollout.calibration.commands import add_commands
from erollout.config import Config, load_config, require_groups
from erollout.doctor.commands import add_command as add_doctor
from erollout.environment import is_elastic, is_rank, launcher_environment
from erollout.errors import UserError
from erollout.launch.commands import add_commands as add_launch_commands
from erollout.launch.parent import end_with_parent, require_one_task
from erollout.simulation.commands import add_command
from erollout.tracking.redaction import redact

if TYPE_CHECKING:
    from erollout.checkpoint.resume import RunKind

_SPEAK_AFTER_SECONDS = 5.0
"""An error of all ranks is printed by rank 0 alone: the others wait this long, and are usually ended before."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Megatron says at import which GPU libraries it does without, and torch which of its own names are deprecated.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    if is_elastic():
        end_with_parent()
    options = _parser().parse_args(arguments)
    try:
        launcher_environment()  # raises for half of it, whatever the command
        return options.run(options, arguments)
    except UserError as error:
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        print("erollout: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="erollout", description="RL post-training on Megatron-core with fast rollouts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = _command(commands, "train", _train, "train a policy by reinforcement learning")
    train.add_argument(
        "--dry-run", action="store_true", help="print layouts, sizes and memory, and check everything, then stop"
    )
    _command(commands, "sft", _sft, "fine-tune a policy on prompts with given answers")
    rollout = _command(commands, "rollout", _rollout, "sample responses to held-out prompts and score them")
    rollout.add_argument("--out", required=True, help="JSONL file to write, one line per response")
    _command(commands, "compare", _compare, "sample held-out prompts with speculation off and on, and print what it saves")
    demo = _command(commands, "demo", _demo, "the whole demo: tokenizer, warm-up, reinforcement learning, table")
    demo.add_argument("--warm-start", default="configs/demo-sft.yaml", help="config of the supervised warm-up")
    demo_rollout = _command(commands, "demo-rollout", _demo_rollout, "fetch a small model, teach it a task, compare rollouts")
    demo_rollout.add_argument("--warm-start", default="configs/demo-rollout-sft.yaml", help="config of the fine-tuning")
    add_commands(commands, _sweep)
    add_command(commands)
    add_launch_commands(commands)
    add_doctor(commands)
    plot = commands.add_parser("plot", help="draw the curves of a run")
    plot.add_argument("--run", required=True, dest="directory", help="train.output_dir of the run")
    plot.add_argument("--out", required=True, help="PNG file to write")
    plot.set_defaults(run=_plot)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="configuration values that win over the file")
    parser.set_defaults(run=run)
    return parser


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(options.config, options.overrides)  # before the imports, which take seconds
    require_groups(config)
    from erollout.preflight import describe, preflight

    if options.dry_run:
        print(describe(config, preflight(config, "reinforcement learning")))
        return 0
    return _on_ranks(config, arguments, lambda session: session.train(config), "reinforcement learning")


def _sft(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(options.config, options.overrides)
    return _on_ranks(config, arguments, lambda session: session.supervised(config), "supervised")


def _rollout(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(options.config, options.overrides)
    from erollout.preflight import require_writable

    require_writable("--out", Path(options.out).parent)
    return _on_ranks(config, arguments, lambda session: session.rollout(config, options.out))


def _compare(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(options.config, options.overrides)
    return _on_ranks(config, arguments, lambda session: session.compare(config))


def _sweep(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(options.config, options.overrides)
    from erollout.preflight import require_writable

    require_writable("--out", Path(options.out).parent)
    grid = {name: getattr(options, name) or () for name in ("batches", "contexts", "drafts")}
    return _on_ranks(config, arguments, lambda session: session.sweep(config, options.out, grid, options.minutes))


def _demo(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.demo import run_demo

    return run_demo(options.config, options.warm_start, options.overrides)


def _demo_rollout(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.demo import run_demo_rollout

    return run_demo_rollout(options.config, options.warm_start, options.overrides)


def _plot(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.tracking.plots import plot_run

    plot_run(options.directory, options.out)
    return 0


def _on_ranks(config: Config, arguments: list[str], work: Callable[[ModuleType], None], kind: "RunKind | None" = None) -> int:
    """Do the work here when this is a rank; otherwise check the configuration and start the ranks on this machine."""
    if launcher_environment() is not None:
        work(_session())
        return 0
    require_one_task("FILE ...")
    from erollout.launch.local import launch_local
    from erollout.parallel.groups import expected_world_size
    from erollout.preflight import preflight

    preflight(config, kind)
    world_size = expected_world_size(config)
    if world_size == 1:
        work(_session())
        return 0
    return launch_local(arguments, world_size)


def _session() -> ModuleType:
    """Only ranks import it: with megatron-core it takes seconds."""
    from erollout import session

    return session


def _print_error(error: UserError) -> None:
    prefix = "erollout: "
    with suppress(UserError):  # the error may be that the launcher's variables make no sense
        environment = launcher_environment()
        if environment is not None and environment.rank > 0:
            time.sleep(_SPEAK_AFTER_SECONDS)
            prefix = f"erollout (rank {environment.rank}): "
    print(f"{prefix}error: {redact(' '.join(str(error).split()))}", file=sys.stderr, flush=True)


def _leave(status: int) -> NoReturn:
    """A rank that failed ends at once: the launcher ends the others when it is gone, and Python's own end takes seconds."""
    if status and is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run() -> NoReturn:
    try:
        status = main()
    except Exception:
        if not is_rank():
            raise
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        status = 1
    _leave(status)


if __name__ == "__main__":
    _run()
