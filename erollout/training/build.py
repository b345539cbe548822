"""Builders of the parts of a run, on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from erollout.checkpoint.checkpointer import Checkpointer, RunState, load_policy
from erollout.checkpoint.saved_policy import SavedPolicy
from erollout.config import Config, RewardsConfig
from erollout.data.description import describe_datasets
from erollout.parallel.collectives import on_rank_zero
from erollout.parallel.groups import current_rank
from erollout.policy.actor import Actor
from erollout.resilience.unattended import ignore
from erollout.rewards.pool import RewardPool
from erollout.rollout.decode_replica import DecodeReplica
from erollout.rollout.rollout_worker import RolloutWorker
from erollout.tracking.console import StepReporter
from erollout.tracking.profiler import StepProfiler
from erollout.tracking.tracker import RunStatus, create_tracker
from erollout.training.loop import Cadence, RunServices
from erollout.training.preflight import Resolved, resolved_facts
from erollout.training.world import RunningWorld, World


def reward_pool(options: RewardsConfig, resolved: Resolved) -> RewardPool:
    """Scoring processes of this rank's replica."""
    if options.pool == "ray" and resolved.decode.tensor_rank(current_rank()) == 0:  # the other ranks score nothing
        from erollout.rewards.ray_pool import RayRewardPool

        return RayRewardPool(resolved.scorer, options.num_workers, options.timeout_seconds, options.error_value)
    return RewardPool(resolved.scorer, options.num_workers, options.timeout_seconds, options.error_value)


def sampling_worker(world: World, rewards: RewardPool, saved: SavedPolicy | None = None) -> RolloutWorker:
    """A worker for sampling without training, with a checkpoint's weights, or with those of the configured model."""
    replica = DecodeReplica(world.config, world.resolved.architecture, world.context, world.resolved.tokenizer)
    worker = RolloutWorker(world.config, replica, rewards)
    if saved is None:
        worker.load_weights()
    else:
        worker.refit(*load_policy(saved, world.config, world.context))
    return worker


def training_worker(run: RunningWorld, rewards: RewardPool) -> RolloutWorker:
    """A worker that gets its weights from the actor, and stops with the run."""
    resolved = run.resolved
    stop_requested, alive = run.stop.is_requested, run.watchdog.alive
    replica = DecodeReplica(run.config, resolved.architecture, run.context, resolved.tokenizer, stop_requested, alive)
    return RolloutWorker(run.config, replica, rewards)


def restored(run: RunningWorld, actor: Actor) -> tuple[Checkpointer, RunState]:
    """The run's checkpointer, and the state to resume from: the newest checkpoint, which is loaded, or none. Collective."""
    options = run.config.checkpoint
    checkpointer = Checkpointer(run.config.checkpoint_directory, options.keep_last, actor, run.kind, options.asynchronous)
    return checkpointer, checkpointer.restore() or RunState(0, None)


def cadence(config: Config, steps: int, evaluates: bool) -> Cadence:
    """Intervals of saving, evaluating and logging in a run of `steps` steps."""
    evaluation = config.evaluation.interval if evaluates else 0
    checksum, figures = config.fault_tolerance.checksum_interval, config.tracking.figures
    return Cadence(steps, config.checkpoint.interval, checksum, evaluation, figures)


@contextmanager
def tracked(run: RunningWorld, state: RunState, total_steps: int) -> Iterator[tuple[RunServices, str]]:
    """Context with the services of a tracked run, and its run id. How it ends determines the run's status."""
    config, stop, tracker = run.config, run.stop, create_tracker(run.context.rank)
    facts = resolved_facts(run.resolved)
    datasets = on_rank_zero(lambda: describe_datasets(config.data, run.resolved.train_data, run.resolved.test_data))
    # an error of rank 0 is raised on every rank
    run_id = on_rank_zero(lambda: tracker.start(config, facts, state.run_id, config.train.output_dir, state.step))
    tracker.log_config_artifacts(config, facts)
    if run.context.rank == 0:
        for split, description in datasets.items():
            tracker.log_dataset(description, split)
    profiled = StepProfiler(config.train.profile.steps, config.train.output_dir, run.context.rank)
    stops = partial(stop.agree, device=run.context.device)
    status: RunStatus = "FAILED"
    try:
        if run.context.rank == 0:
            with StepReporter(total_steps, state.step) as reporter:
                yield RunServices(tracker, reporter.update, stops, run.watchdog.enter, profiled), run_id
        else:
            yield RunServices(tracker, ignore, stops, run.watchdog.enter, profiled), run_id
        status = "FINISHED" if stop.agreed is None else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
