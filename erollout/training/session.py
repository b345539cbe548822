"""A training run from its configuration to its end, on every rank: reinforcement learning, or supervised fine-tuning."""

import logging
from contextlib import suppress
from dataclasses import replace

from erollout.algorithm import build_algorithm
from erollout.config import Config
from erollout.data.cursor import DataCursor
from erollout.plots.run_figures import OVER_STEPS
from erollout.plots.training_curves import NoData
from erollout.policy.actor import Actor
from erollout.policy.hf_export import export_policy
from erollout.tracking.console import print_summary
from erollout.tracking.journal import journal_path, read_history
from erollout.tracking.recorded_run import read_run
from erollout.tracking.tracker import Tracker
from erollout.training.build import cadence, restored, reward_pool, tracked, training_worker
from erollout.training.groups import GroupCollector
from erollout.training.loop import RunLoop
from erollout.training.preflight import resolved_facts
from erollout.training.sft import SupervisedTrainer
from erollout.training.step_metrics import summary_rows
from erollout.training.trainer import Trainer
from erollout.training.world import RunningWorld, running

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Run RL from the newest checkpoint, if there is one, to the last step or until a stop is requested."""
    with running(config, "reinforcement learning") as run:
        resolved, context, steps = run.resolved, run.context, config.train.steps
        algorithm = build_algorithm(config.algorithm)
        updates = steps * (config.samples_per_step // (config.train.global_batch_size or config.samples_per_step))
        actor = Actor(config, resolved.architecture, context, updates, with_reference=algorithm.uses_reference)
        checkpointer, state = restored(run, actor)
        run.fix_date(state.date)
        run.stop.begin()
        with reward_pool(config.rewards, resolved) as rewards, tracked(run, state, steps) as (services, run_id):
            worker = training_worker(run, rewards)
            facts = {**resolved_facts(resolved), "decode_kernels": str(worker.engine.promise)}
            services.tracker.log_config_artifacts(config, facts)
            worker.load_state_dict(state.rollout)
            cursor = DataCursor(state.cursor)
            groups = GroupCollector(worker, algorithm, resolved.train_data, config.rollout, cursor, state.partial_rollouts)
            trainer = Trainer(config, actor, algorithm, groups, resolved.test_data)
            times = cadence(config, steps, evaluates=resolved.test_data is not None)
            loop = RunLoop(trainer, times, checkpointer, services, replace(state, run_id=run_id))
            loop.run()
            if run.stop.agreed is None:
                _export(run, actor)
                _log_figures(run, services.tracker)
        if context.rank == 0 and run.stop.agreed is None:
            output_dir = config.train.output_dir
            rows = summary_rows(_history(output_dir), loop.state.history, config.tracking, output_dir, run_id)
            print_summary(rows, title=output_dir)


def supervised(config: Config) -> None:
    """Supervised fine-tuning on the training data's written solutions."""
    with running(config, "supervised") as run:
        resolved, steps, size = run.resolved, config.supervised.steps, config.supervised.batch_size
        actor = Actor(config, resolved.architecture, run.context, steps)
        checkpointer, state = restored(run, actor)
        run.fix_date(state.date)
        run.stop.begin()
        with tracked(run, state, steps) as (services, run_id):
            limits, output_dir = config.fault_tolerance, config.train.output_dir
            cursor = DataCursor(state.cursor)
            trainer = SupervisedTrainer(actor, resolved.train_data, cursor, size, limits, output_dir)
            times = cadence(config, steps, evaluates=False)
            RunLoop(trainer, times, checkpointer, services, replace(state, run_id=run_id)).run()
            if run.stop.agreed is None:
                _export(run, actor)


def _export(run: RunningWorld, actor: Actor) -> None:
    config, resolved = run.config, run.resolved
    path = config.checkpoint.export_path
    if path is None:
        return
    export_policy(path, resolved.architecture, resolved.train, actor.local_tensors(), config.model.dtype, config.tokenizer_path)
    logger.info("exported the policy to %s", path)


def _log_figures(run: RunningWorld, tracker: Tracker) -> None:
    if run.context.rank or not run.config.tracking.figures:
        return
    recorded = [read_run(run.config.train.output_dir)]
    for name in ("reward", "curves", "response_lengths", "phase_seconds"):
        with suppress(NoData):  # a full disk may have cost the records
            tracker.log_figure(name, OVER_STEPS[name](recorded))


def _history(output_dir: str) -> list[dict[str, float]]:
    return read_history(journal_path(output_dir))
