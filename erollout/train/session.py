"""Builds a run from its configuration, on every rank, and sees it to its end: train, supervised, rollout, compare."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from signal import Signals
from typing import TypeVar

from erollout.algorithm import build_algorithm
from erollout.calibration.sweep import SweepGrid
from erollout.calibration.sweep import sweep as measure_steps
from erollout.calibration.sweep_log import append_row, resume_rows
from erollout.checkpoint.checkpointer import KEPT, Checkpointer, RunState
from erollout.checkpoint.manifest import complete_checkpoints
from erollout.checkpoint.resume import RunKind, check_newest
from erollout.checkpoint.run_lock import RunLock
from erollout.config import Config
from erollout.environment import launcher_environment
from erollout.errors import UserError
from erollout.parallel.collectives import from_rank_zero
from erollout.parallel.groups import ParallelContext, current_rank, initialize, shut_down
from erollout.plots.rollout_figures import rollout_figures
from erollout.plots.training_curves import phase_seconds, response_lengths, reward_curve, save
from erollout.policy.actor import Actor
from erollout.policy.hf_export import export_policy
from erollout.resilience.stopping import Stop, say, stoppable
from erollout.resilience.watchdog import Watchdog, at_most
from erollout.rewards.pool import RewardPool
from erollout.rollout.compare import WHERE, compare_held_out
from erollout.rollout.rollout_worker import RolloutWorker
from erollout.tracking.console import StepReporter, print_summary, print_table
from erollout.tracking.journal import journal_path, read_history
from erollout.tracking.log import configure_logging
from erollout.tracking.tracker import RunStatus, Tracker, create_tracker
from erollout.train.evaluation import evaluation_metrics
from erollout.train.preflight import Resolved, preflight, resolved_facts
from erollout.train.sft import SupervisedTrainer
from erollout.train.step_metrics import summary_rows
from erollout.train.trainer import Trainer

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 300.0
"""All is saved then, and a start after it finds nothing left to do."""

Report = Callable[[int, Mapping[str, float]], None]
Value = TypeVar("Value")


def train(config: Config) -> None:
    """The RL run of a configuration, from its newest checkpoint if it has one, to the last step or until asked to stop."""
    with _run(config, "reinforcement learning") as (stop, resolved, context, watchdog):
        algorithm = build_algorithm(config.algorithm)
        updates = config.train.steps * (config.samples_per_step // (config.train.global_batch_size or config.samples_per_step))
        actor = Actor(config, resolved.architecture, context, updates, with_reference=algorithm.uses_reference)
        checkpointer, state = _restore(config, actor, "reinforcement learning")
        _fix_date(config, resolved, state.date)
        stop.begin()
        with (
            _rewards(config, resolved) as rewards,
            _tracked(config, resolved, context, state, config.train.steps, stop) as tracked,
        ):
            tracker, run_id, report = tracked
            worker = RolloutWorker(
                config, resolved.architecture, context, resolved.tokenizer, rewards, stop.is_asked, watchdog.alive
            )
            tracker.log_config_artifacts(config, {**resolved_facts(resolved), "decode_kernels": str(worker.engine.promise)})
            worker.load_state_dict(state.rollout)
            trainer = Trainer(
                config,
                context,
                resolved.train_data,
                resolved.test_data,
                actor,
                worker,
                algorithm,
                tracker,
                checkpointer,
                run_id,
                report,
                step=state.step,
                evaluations=list(state.history),
                kept=state.kept,
                stops=partial(stop.agree, device=context.device),
                enter=watchdog.enter,
            )
            trainer.run()
            if stop.agreed is None:
                _export(config, resolved, actor)
                _log_figures(config, context, tracker)
        if context.rank == 0 and stop.agreed is None:
            print_summary(summary_rows(_history(config), trainer.evaluations, config, run_id), title=config.train.output_dir)


def supervised(config: Config) -> None:
    """Supervised fine-tuning on the training data's written solutions."""
    with _run(config, "supervised") as (stop, resolved, context, watchdog):
        actor = Actor(config, resolved.architecture, context, config.supervised.steps)
        checkpointer, state = _restore(config, actor, "supervised")
        _fix_date(config, resolved, state.date)
        stop.begin()
        with _tracked(config, resolved, context, state, config.supervised.steps, stop) as (tracker, run_id, report):
            trainer = SupervisedTrainer(
                config,
                context,
                resolved.train_data,
                actor,
                tracker,
                checkpointer,
                run_id,
                report,
                partial(stop.agree, device=context.device),
                watchdog.enter,
                step=state.step,
            )
            trainer.run()
            if stop.agreed is None:
                _export(config, resolved, actor)


def rollout(config: Config, out: str) -> None:
    """Sample the held-out prompts with the model's weights, score them, and write one JSON line per response.

    The weights go straight into the decode layout: nothing of training is built.
    """
    with _world(config) as (resolved, context), _rewards(config, resolved) as rewards:
        _fix_date(config, resolved)
        if resolved.test_data is None:
            raise UserError("data.test_files is empty: `erollout rollout` samples the test prompts; name at least one file")
        worker = RolloutWorker(config, resolved.architecture, context, resolved.tokenizer, rewards)
        worker.load_weights()
        if worker.speculation is not None and worker.speculation.wants_rollouts:
            logger.info(
                "speculation.drafter.format = %s: this command makes one rollout only, so there is none to learn from",
                config.speculation.drafter.format,
            )
        result = worker.evaluate(resolved.test_data, step=0)
        if context.rank == 0:
            rows = [
                {"reward": s.reward, "task": s.task, "text": worker.text(s.rollout), **asdict(s.rollout)} for s in result.scored
            ]
            _write_lines(Path(out), rows)
            seconds = max(report["seconds"] for report in result.reports)
            tokens = sum(report["tokens"] for report in result.reports)
            speed = {"responses": len(rows), "tokens": int(tokens), "seconds": seconds, "tokens/s": tokens / seconds}
            print_summary(
                [
                    *evaluation_metrics(result.scored, sum(result.failures.values())).items(),
                    *speed.items(),
                    ("written to", out),
                ]
            )


def compare(config: Config) -> None:
    """Sample the held-out prompts with speculation off and on, in turns, and print what it saves.

    The drafter is made as in training: of weights that just arrived, weighed by the tokens of a rollout before.
    """
    if config.speculation.mode == "off":
        raise UserError("speculation.mode = off: there is nothing to compare with; set it to always")
    with _world(config) as (resolved, context), _rewards(config, resolved) as rewards:
        _fix_date(config, resolved)
        if resolved.test_data is None:
            raise UserError("data.test_files is empty: `erollout compare` samples the test prompts; name at least one file")
        worker = RolloutWorker(config, resolved.architecture, context, resolved.tokenizer, rewards)
        worker.load_weights()
        assert worker.speculation is not None
        first = worker.evaluate(resolved.test_data, 0, speculates=False)
        worker.engine.wake_up()
        worker.speculation.learn_from([sample.rollout for sample in first.scored])
        requantize = worker.load_weights()
        comparisons = compare_held_out(worker, resolved.test_data)
        if context.rank == 0:
            options = config.speculation
            for case, comparison in comparisons.items():
                print_summary(comparison.rows(), title=f"speculation off and {config.speculation.mode}, {case}")
                print_table(WHERE, comparison.where(), title="where the seconds of a rollout go, and where speculation was on")
            last = comparisons[case].on[-1]
            for name, figure in rollout_figures(last, worker.steering.last).items():
                save(figure, Path(config.train.output_dir) / "figures" / f"{name}.png")
            facts = {
                "drafts": f"{options.drafter.format}, {options.verification}",
                "requantise seconds": requantize.seconds if requantize is not None else 0.0,
                "why": "\n".join(last.courses[0].why),
                "pictures": f"{config.train.output_dir}/figures",
            }
            print_summary([*facts.items(), *evaluation_metrics(first.scored).items()], title="drafter and policy")


def sweep(config: Config, out: str, grid: Mapping[str, tuple[int, ...]], minutes: float) -> None:
    """Time single steps of the configured model and drafters on this device, and append each to a CSV file.

    Args:
        grid: `batches`, `contexts` and `drafts` (values of num_speculative_tokens); empty: chosen for the configuration.

    Raises UserError for a file that is something else than a sweep, or can't be written.
    """
    if config.speculation.mode == "off":
        raise UserError("speculation.mode = off has no drafter to measure; set speculation.mode=adaptive")
    with _world(config) as (resolved, context), _rewards(config, resolved) as rewards:
        worker = RolloutWorker(config, resolved.architecture, context, resolved.tokenizer, rewards)
        worker.load_weights()
        leads = context.rank == 0
        done = _on_rank_zero(lambda: resume_rows(out))
        engine, drafting = worker.engine, worker.steering.formats
        longest = min(engine.max_model_len, config.rollout.max_prompt_tokens + config.rollout.max_tokens)
        places = SweepGrid(
            grid["batches"] or tuple(2**i for i in range(config.rollout.max_num_seqs.bit_length())),
            grid["contexts"] or tuple(sorted({max(2, longest // 8), max(2, longest // 2)})),
            grid["drafts"] or tuple(n for n in (1, 3, 5, 8) if n <= config.speculation.toggle.max_speculative_tokens),
        )
        engine.wake_up()
        write = partial(append_row, out) if leads else _drop
        rows = measure_steps(engine, drafting, places, 60 * minutes, done, write, Path(config.model.path or "random").name)
        if leads:
            print_summary([("rows", len(done) + len(rows)), ("measured now", len(rows)), ("written to", out)], title="sweep")


@contextmanager
def _run(config: Config, kind: RunKind) -> Iterator[tuple[Stop, Resolved, ParallelContext, Watchdog]]:
    """A run that writes to its directory: checked, joined to its world, watched for hangs, and ended by signals.

    Its directories are released last: who waits for them must not begin before the verdict is written.
    """
    with ExitStack() as held, _stoppable(config) as stop, _world(config, kind) as (resolved, context):
        _on_rank_zero(lambda: _hold(held, resolved, config, kind))
        if not config.checkpoint.interval:
            logger.info("checkpoint.interval = 0: nothing is saved before the last step; whatever ends the run loses all of it")
        with _watched(config, context) as watchdog:
            yield stop, resolved, context, watchdog
            if context.rank == 0 and stop.agreed is not None:
                say(f"{stop.agreed.name}: {_what_is_saved(config, stop.agreed)}")


def _what_is_saved(config: Config, asked: Signals) -> str:
    """The last line of a run that was asked to stop."""
    found = complete_checkpoints(config.checkpoint_directory) if config.checkpoint.interval else []
    if not found:
        none = "no step was done" if config.checkpoint.interval else "checkpoint.interval = 0"
        return f"stopped, nothing is saved ({none}); the same command begins anew"
    begun = " with the begun rollout of the next step" if (found[-1] / KEPT).exists() else ""
    requeued = ", as a scheduler does that queues it again" if asked is Signals.SIGUSR1 else ""
    return f"stopped, saved in {found[-1]}{begun}; the same command goes on from there{requeued}"


def _hold(held: ExitStack, resolved: Resolved, config: Config, kind: RunKind) -> None:
    """Until `held` is closed, no other run writes to the directories of this one. Raises UserError."""
    places = {Path(config.train.output_dir).resolve(): "train.output_dir"}
    if config.checkpoint.interval:
        places.setdefault(config.checkpoint_directory.resolve(), "checkpoint.directory")
    for directory, key in places.items():
        held.enter_context(RunLock(directory, key).held())
    check_newest(resolved.architecture, config, kind)  # the owner before may have saved since the preflight


@contextmanager
def _world(config: Config, kind: RunKind | None = None) -> Iterator[tuple[Resolved, ParallelContext]]:
    """Check everything, join the world, leave it at the end."""
    configure_logging(current_rank())
    resolved = preflight(config, kind, scores=launcher_environment() is not None)  # else the command has done it
    context = initialize(config)
    with ExitStack() as failed:
        # An exchange between replicas may still be waiting for one that is gone, and would hold the end of its group up: the
        # process ends without (cli._leave).
        if context.coordination_group is None or not context.owns_world:
            failed.callback(shut_down, context)
        yield resolved, context
        failed.pop_all()
    with at_most(_LEAVE_SECONDS, "leaving the process groups"):
        shut_down(context)


def _stoppable(config: Config) -> AbstractContextManager[Stop]:
    return stoppable(config.train.output_dir, saves=config.checkpoint.interval > 0)


def _watched(config: Config, context: ParallelContext) -> AbstractContextManager[Watchdog]:
    """Loading and building are its first phase."""
    options = config.fault_tolerance
    watchdog = Watchdog(
        config.train.output_dir, context.rank, context.world_size, options.heartbeat_seconds, options.hang_seconds
    )
    return watchdog.watching()


def _rewards(config: Config, resolved: Resolved) -> RewardPool:
    options = config.rewards
    if options.pool == "ray" and resolved.decode.tensor_rank(current_rank()) == 0:  # the other ranks score nothing
        from erollout.rewards.ray_pool import RayRewardPool

        return RayRewardPool(resolved.scorer, options.num_workers, options.timeout_seconds, options.error_value)
    return RewardPool(resolved.scorer, options.num_workers, options.timeout_seconds, options.error_value)


@contextmanager
def _tracked(
    config: Config, resolved: Resolved, context: ParallelContext, state: RunState, total_steps: int, stop: Stop
) -> Iterator[tuple[Tracker, str, Report]]:
    """A started tracker, its run id and the console's reporter; the run's status follows from how the block ends."""
    tracker = create_tracker(context.rank)
    facts = resolved_facts(resolved)
    run_id = _started(tracker, config, facts, state)
    tracker.log_config_artifacts(config, facts)
    data = json.dumps(config.to_dict()["data"], sort_keys=True)
    source = ", ".join(config.data.train_files) or f"{config.data.kind}, seeds from {config.data.train_seed}"
    tracker.log_dataset(config.data.kind, source, hashlib.sha256(data.encode()).hexdigest()[:32])
    status: RunStatus = "FAILED"
    try:
        if context.rank == 0:
            with StepReporter(total_steps, state.step) as reporter:
                yield tracker, run_id, reporter.update
        else:
            yield tracker, run_id, _silent
        status = "FINISHED" if stop.agreed is None else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _started(tracker: Tracker, config: Config, facts: Mapping[str, str | int | float], state: RunState) -> str:
    """Start the tracker. What rank 0 can't honour is every rank's error: none is left behind in a collective."""
    return _on_rank_zero(lambda: tracker.start(config, facts, state.run_id, config.train.output_dir, state.step))


def _on_rank_zero(action: Callable[[], Value]) -> Value:
    """Rank 0's value on every rank, or its UserError."""
    value: Value | None = None
    failure = None
    if current_rank() == 0:
        try:
            value = action()
        except UserError as error:
            failure = str(error)
    failure, value = from_rank_zero((failure, value))
    if failure:
        raise UserError(failure)
    return value  # type: ignore[return-value]


def _drop(row: object) -> None:
    """What every rank but the first does with a measured row."""


def _silent(step: int, values: Mapping[str, float]) -> None:
    """The console of every rank but the first."""


def _restore(config: Config, actor: Actor, kind: RunKind) -> tuple[Checkpointer, RunState]:
    options = config.checkpoint
    checkpointer = Checkpointer(config.checkpoint_directory, options.keep_last, actor, kind, options.asynchronous)
    return checkpointer, checkpointer.restore() or RunState(0, None)


def _fix_date(config: Config, resolved: Resolved, begun: str | None = None) -> None:
    """The chat template's clock stands still, on the same day on all ranks and in all attempts at a run. Collective."""
    renderer = resolved.train_data.renderer
    day = from_rank_zero(config.data.date or begun or renderer.date.isoformat())
    renderer.date = date.fromisoformat(day)
    if renderer.tells_date:
        logger.info("the chat template asks for the date: it is told %s throughout (data.date)", day)


def _export(config: Config, resolved: Resolved, actor: Actor) -> None:
    path = config.checkpoint.export_path
    if path is None:
        return
    export_policy(path, resolved.architecture, resolved.train, actor.local_tensors(), config.model.dtype, config.tokenizer_path)
    logger.info("exported the policy to %s", path)


def _log_figures(config: Config, context: ParallelContext, tracker: Tracker) -> None:
    if context.rank:
        return
    history = _history(config)
    for name, draw in (("reward", reward_curve), ("response_lengths", response_lengths), ("phase_seconds", phase_seconds)):
        tracker.log_figure(name, draw(history))


def _history(config: Config) -> list[dict[str, float]]:
    return read_history(journal_path(config.train.output_dir))


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
