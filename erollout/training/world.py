"""The world of a command: a checked configuration and its ranks, and for a run also its directories."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from signal import Signals

from erollout.checkpoint.checkpointer import PARTIAL_ROLLOUTS
from erollout.checkpoint.manifest import complete_checkpoints
from erollout.checkpoint.resume import RunKind, check_newest
from erollout.checkpoint.run_lock import RunLock
from erollout.config import Config
from erollout.environment import launcher_environment
from erollout.parallel.collectives import from_rank_zero, on_rank_zero
from erollout.parallel.groups import ParallelContext, current_rank, initialize, shut_down
from erollout.resilience.stopping import Stop, say, stoppable
from erollout.resilience.watchdog import Watchdog, at_most
from erollout.tracking.log import configure_logging
from erollout.training.preflight import Resolved, preflight

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 300.0
"""Time limit for leaving the process groups: everything is saved by then."""


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a command, and what the configuration resolves to on them."""

    config: Config
    resolved: Resolved
    context: ParallelContext

    def fix_date(self, begun: str | None = None) -> None:
        """Fix the date for chat templates, equal on all ranks and in all attempts at a run. Collective.

        `begun`: day on which the run began; None: today.
        """
        renderer = self.resolved.train_data.renderer
        day = from_rank_zero(self.config.data.date or begun or renderer.date.isoformat())
        renderer.date = date.fromisoformat(day)
        if renderer.tells_date:
            logger.info("the chat template uses the date: fixed to %s for the run (data.date)", day)


@dataclass(frozen=True, slots=True)
class RunningWorld(World):
    """The world of a run with an output directory."""

    kind: RunKind
    stop: Stop
    watchdog: Watchdog


@contextmanager
def joined(config: Config, kind: RunKind | None = None) -> Iterator[World]:
    """Context that checks everything and joins the world."""
    configure_logging(current_rank())
    resolved = preflight(config, kind, scores=launcher_environment() is not None)  # otherwise the command has done it
    context = initialize(config)
    with ExitStack() as failed:
        # An exchange between replicas may still be waiting for one that is gone, and would hold the end of its group up: the
        # process ends without (cli._leave).
        if context.coordination_group is None or not context.owns_world:
            failed.callback(shut_down, context)
        yield World(config, resolved, context)
        failed.pop_all()
    with at_most(_LEAVE_SECONDS, "leaving the process groups"):
        shut_down(context)


@contextmanager
def running(config: Config, kind: RunKind) -> Iterator[RunningWorld]:
    """Context of a run with an output directory: checks everything, joins the world, starts the watchdog and handles signals.

    The directories are released last, because a waiting run must not start before the verdict is written.
    """
    output, saves = config.train.output_dir, config.checkpoint.interval > 0
    limits = config.fault_tolerance
    with ExitStack() as held, stoppable(output, saves) as stop, joined(config, kind) as world:
        context = world.context
        on_rank_zero(lambda: _hold(held, world, kind))
        if not saves:
            logger.info("checkpoint.interval = 0: nothing is saved before the last step; if the run ends early, all is lost")
        watchdog = Watchdog(output, context.rank, context.world_size, limits.heartbeat_seconds, limits.hang_seconds)
        with watchdog.watching():  # loading and building are its first phase
            yield RunningWorld(config, world.resolved, context, kind, stop, watchdog)
            if context.rank == 0 and stop.agreed is not None:
                say(f"{stop.agreed.name}: {_what_is_saved(config, stop.agreed)}")


def _hold(held: ExitStack, world: World, kind: RunKind) -> None:
    """Lock the run's directories until `held` is closed. Raises UserError."""
    config = world.config
    places = {Path(config.train.output_dir).resolve(): "train.output_dir"}
    if config.checkpoint.interval:
        places.setdefault(config.checkpoint_directory.resolve(), "checkpoint.directory")
    for directory, key in places.items():
        held.enter_context(RunLock(directory, key).held())
    check_newest(world.resolved.architecture, config, kind)  # the previous owner may have saved since the preflight


def _what_is_saved(config: Config, requested: Signals) -> str:
    """The last line of a run that was stopped on request."""
    found = complete_checkpoints(config.checkpoint_directory) if config.checkpoint.interval else []
    if not found:
        none = "no step was completed" if config.checkpoint.interval else "checkpoint.interval = 0"
        return f"stopped, nothing is saved ({none}); run the same command to start again"
    begun = " with the partial rollouts of the next step" if (found[-1] / PARTIAL_ROLLOUTS).exists() else ""
    requeued = " (a scheduler requeues it)" if requested is Signals.SIGUSR1 else ""
    return f"stopped, saved in {found[-1]}{begun}; run the same command to resume{requeued}"
