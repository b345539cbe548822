"""`erollout launch slurm`: submits a run to a Slurm cluster, or prints what would be submitted.

slurm/train.sbatch, the same for all runs, handles a job's start, signals and failures. This module composes the sbatch options,
the variables that the script reads, the configuration and a copy of the code.
"""

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from erollout.checkpoint.resume import check_newest
from erollout.config import ParallelConfig, RolloutConfig, load_config, require_trainable
from erollout.configuration.arguments import add_run_arguments, overrides
from erollout.errors import UserError
from erollout.launch.plan import Plan, batch_script, describe, seconds_of, written
from erollout.launch.run_directory import VERDICT, RunDirectory, Submission, require_inputs, with_absolute_paths, with_scorer
from erollout.launch.scorer_files import function_in_copy
from erollout.launch.sites import Site, load_site
from erollout.launch.snapshot import take_snapshot
from erollout.parallel.layout import layouts
from erollout.policy.families import policy_architecture
from erollout.resilience.atomic_write import write_atomically
from erollout.schedulers import slurm_jobs

_GRACE_SECONDS = 300
_SLURM_EARLY_SECONDS = 60
"""Time by which Slurm may send the signal before the limit earlier than requested."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `slurm` to the commands of `erollout launch`."""
    parser = commands.add_parser("slurm", help="submit a run to a Slurm cluster")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the run")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs per node, each with one rank")
    size.add_argument("--ranks-per-node", type=int, metavar="M", help="ranks per node, without GPUs")
    parser.add_argument("--site", metavar="FILE", help="YAML file of the cluster: partition, account, container, ...")
    parser.add_argument("--time", metavar="HH:MM:SS", help="time limit of each job; default: the partition's")
    parser.add_argument(
        "--grace",
        type=int,
        metavar="SECONDS",
        help="time before the limit at which the run saves and ends (default 300, or a quarter of --time)",
    )
    parser.add_argument("--chain", type=int, metavar="K", help="submit a chain of K jobs instead of requeueing")
    parser.add_argument("--max-requeues", type=int, metavar="N", help="number of requeues after which the job fails")
    parser.add_argument(
        "--spare-nodes", type=int, default=0, metavar="S", help="spare nodes, to replace those that fail their checks"
    )
    parser.add_argument("--no-preflight", action="store_true", help="skip the node checks before each start")
    parser.add_argument("--job-name", metavar="NAME", help="Slurm job name; default: erollout- and the run directory's name")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    add_run_arguments(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    plan = make_plan(options)
    if options.dry_run:
        print(describe(plan))
        print(f"== scheduler\n{_scheduler_says(plan)}")
        return 0
    found = require_idle(plan.run)
    source = {"commit": plan.snapshot.commit, "dirty": plan.snapshot.dirty}
    code = str(plan.run.code / plan.snapshot.name)
    submission = Submission(0, "", plan.chain, tuple(plan.command()), code, source)
    with written(plan):
        submit(plan.run, submission, {job.id for job in found})
    return 0


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan of a command line. Raises UserError for an impossible one."""
    _check_numbers(options)
    site = load_site(options.site) if options.site else Site()
    config = with_absolute_paths(load_config(options.config, overrides(options)))
    require_trainable(config)
    run = RunDirectory(Path(config.train.output_dir))
    ranks = options.gpus_per_node or options.ranks_per_node
    _check_ranks(config.parallel, config.rollout, options.nodes, ranks)
    run.require_writable()
    if site.container is None:  # its content is not visible from here
        require_inputs(config)
        # the job would reject it too, hours later
        check_newest(policy_architecture(config.model), config, "reinforcement learning")
    snapshot = take_snapshot(config.rewards.function, config.rewards.import_path)
    return Plan(
        run,
        with_scorer(config, function_in_copy(config.rewards.function, run.code / snapshot.name)),
        site,
        nodes=options.nodes,
        spares=options.spare_nodes,
        ranks=ranks,
        gpus=options.gpus_per_node or 0,
        time=options.time,
        grace=_grace(options, config.checkpoint.interval > 0),
        chain=options.chain or 1,
        max_requeues=options.max_requeues,
        preflight=not options.no_preflight,
        name=options.job_name or f"erollout-{run.path.name}",
        snapshot=snapshot,
    )


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"nodes": 1, "gpus_per_node": 1, "ranks_per_node": 1, "chain": 1, "grace": 1, "spare_nodes": 0, "max_requeues": 0}
    for name, bound in least.items():
        if (value := getattr(options, name)) is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} = {value}; it must be at least {bound}")
    if options.spare_nodes and options.no_preflight:
        raise UserError(
            f"--spare-nodes = {options.spare_nodes} with --no-preflight: only checks find bad nodes; drop one of them"
        )


def _check_ranks(parallel: ParallelConfig, rollout: RolloutConfig, nodes: int, ranks: int) -> None:
    wanted, started = parallel.world_size, nodes * ranks
    if wanted not in (None, started):
        raise UserError(
            f"parallel.world_size = {wanted}, but {nodes} nodes of {ranks} ranks are {started}; unset it or start {wanted}"
        )
    layouts(parallel, rollout, started)


def _grace(options: argparse.Namespace, saves: bool) -> int | None:
    """Seconds for saving before the time limit. Raises UserError if they don't fit, or if the run saves nothing."""
    seconds = seconds_of(options.time) if options.time else None
    if not saves:
        for name in ("grace", "chain"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"checkpoint.interval = 0: a run that saves nothing can't resume in another job, so --{name} = "
                    f"{getattr(options, name)} is of no use; set the interval, or remove it"
                )
        return None
    grace: int = options.grace or min(_GRACE_SECONDS, (seconds or 4 * _GRACE_SECONDS) // 4)
    if seconds is not None and grace + _SLURM_EARLY_SECONDS > seconds:
        raise UserError(
            f"--time = {options.time} is too short for --grace = {grace} s, which Slurm begins up to {_SLURM_EARLY_SECONDS} s "
            "early: nothing would be left to train in; ask for more time or a shorter grace"
        )
    return grace


def require_idle(run: RunDirectory) -> list[slurm_jobs.SlurmJob]:
    """The jobs of the run that Slurm knows. Raises UserError if one is running or pending: two would write to one directory."""
    found = slurm_jobs.jobs(run.jobs(), run.path)
    for job in found:
        if job.is_alive:
            raise UserError(
                f"job {job.id} of {run.path} is {job.describe()}; `erollout launch stop {run.path}` ends it, "
                "or choose another --run-dir"
            )
    return found


def submit(run: RunDirectory, submission: Submission, known: set[int]) -> None:
    """Submit one job or a chain, recording each as soon as it is accepted. Raises UserError."""
    bad = run.bad_nodes()
    verdict = run.verdict()
    (run.path / VERDICT).unlink(
        missing_ok=True
    )  # the verdict of a run that resumes: jobs of a chain start only if there is none
    for number in range(1, submission.chain + 1):
        command = list(submission.command)
        extra = [f"--exclude={','.join(bad)}"] if bad else []
        extra += [f"--dependency=afterany:{submission.job}"] if number > 1 else []
        try:
            job = slurm_jobs.submit([*command[:2], *extra, *command[2:]], run.path, known)
        except slurm_jobs.Refused:
            if number == 1 and verdict is not None:
                write_atomically(run.path / VERDICT, f"{verdict}\n")
            raise
        submission = replace(submission, job=job, submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        run.add(submission)
        known.add(job)
        part = f" ({number} of {submission.chain})" if submission.chain > 1 else ""
        print(f"erollout: job {job}{part} of {run.path} is submitted", flush=True)
    print(f"erollout: `erollout launch status {shlex.quote(str(run.path))}` shows how it goes")


def _scheduler_says(plan: Plan) -> str:
    """The scheduler's answer to a test submission. Raises UserError if it would reject the job."""
    if reason := slurm_jobs.answers():
        return f"not asked: {reason}"
    command = [str(batch_script()) if word == str(plan.run.script) else word for word in plan.command()]
    return slurm_jobs.try_submission(command)
