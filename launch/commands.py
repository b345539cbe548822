"""`erollout launch`: start a run on this node, on a Slurm cluster or on a Ray cluster, and manage it."""

import argparse
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from erollout.errors import UserError
from erollout.launch import ray, slurm, torchrun
from erollout.launch.run_directory import Attempt, RunDirectory, find_run
from erollout.launch.status import ranks_here, status_page
from erollout.schedulers import slurm_jobs
from erollout.tracking.journal import journal_path

_LATELY_SECONDS = 60
"""Age of a heartbeat up to which its rank may be alive."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `launch` with its commands to the command line."""
    parser = commands.add_parser("launch", help="start a run with torchrun, Slurm or Ray, and manage it")
    launchers = parser.add_subparsers(dest="launcher", required=True, metavar="command")
    torchrun.add_command(launchers)
    slurm.add_command(launchers)
    ray.add_command(launchers)
    _add(launchers, "status", _status, "show a run's jobs and ranks, its newest checkpoint and its logs")
    logs = _add(launchers, "logs", _logs, "print the output of a run")
    logs.add_argument("--follow", action="store_true", help="follow the output until interrupted")
    logs.add_argument("--rank", type=int, metavar="R", help="show the output of one rank; default: of the job and its nodes")
    logs.add_argument("--attempt", metavar="JOB.A", help="attempt to show; default: the newest")
    _add(launchers, "stop", _stop, "stop a run after saving, to be resumed later")
    _add(launchers, "requeue", _requeue, "resubmit a run with the same code, to resume from its newest checkpoint")


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace, Sequence[str]], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument("directory", metavar="RUN_DIR", help="train.output_dir of the run")
    parser.set_defaults(run=run)
    return parser


def _status(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    print(status_page(find_run(options.directory)))
    return 0


def _logs(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    run = find_run(options.directory)
    attempts = run.attempts()
    if not attempts and not run.submissions():
        raise UserError(
            f"{run.path} has no logs: its ranks print to where they were started from (`launch torchrun --log-dir` also writes "
            f"files); what is there: {journal_path(run.path)}, one line a step, and `erollout launch status {run.path}`"
        )
    chosen = [attempt for attempt in attempts if options.attempt in (None, attempt.directory.name)]
    if not chosen:
        there = ", ".join(attempt.directory.name for attempt in attempts) or "none: no job of the run has started"
        raise UserError(f"{run.path} has no logs of {options.attempt or 'a start'}; there are {there}")
    files = _files(run, chosen[-1], options.rank)
    return subprocess.run(["tail", "--lines=+1", *(["-F"] if options.follow else []), "--", *map(str, files)]).returncode


def _files(run: RunDirectory, attempt: Attempt, rank: int | None) -> list[Path]:
    if rank is None:
        of_nodes = sorted(attempt.directory.glob("node-*.out")) or sorted(
            attempt.directory.glob("*.out")
        )  # at least the checks
        return [file for file in (run.output(attempt.job), *of_nodes) if file.is_file()]
    files = sorted(attempt.directory.glob(f"ranks/rank_{rank:05d}*"))
    if not files:
        raise UserError(f"--rank = {rank}: there is no output of it in {attempt.directory}/ranks")
    return files


def _stop(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    run = find_run(options.directory)
    ids = run.jobs()
    alive = [job for job in slurm_jobs.jobs(ids, run.path) if job.is_alive] if ids else []
    for job in sorted(alive, key=lambda job: not job.waits):  # pending jobs first: they would start when the others end
        if job.waits:
            slurm_jobs.cancel(job)
            print(f"erollout: job {job.id} is cancelled before its start")
        else:
            slurm_jobs.terminate(job)
            print(f"erollout: job {job.id} saves and ends; it is not requeued")
    if not alive:
        _stop_here(run)
    return 0


def _stop_here(run: RunDirectory) -> None:
    """Stop a run that is not a Slurm job. Signalling the ranks of one machine is enough, because all ranks agree to stop."""
    ranks = ranks_here(run)
    if ranks:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)
        print(f"erollout: {len(ranks)} ranks on this machine save and end")
        return
    lately = [beat for beat in run.heartbeats() if time.time() - beat.beat < _LATELY_SECONDS]
    if lately and run.verdict() is None:
        raise UserError(f"no job of {run.path}, but ranks on {lately[0].host} (pid {lately[0].pid}): give the command there")
    raise UserError(f"no job or rank of {run.path} is running or pending; its verdict is {run.verdict() or 'none'}")


def _requeue(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    run = find_run(options.directory)
    submissions = run.submissions()
    if not submissions:
        raise UserError(
            f"{run.path} was not submitted by `erollout launch slurm`; start it again with the command that started it"
        )
    known = slurm.require_idle(run)
    if run.verdict() == "done":
        raise UserError(f"the run in {run.path} is done; to continue it, submit it with a higher train.steps")
    last = submissions[-1]
    if not Path(last.code).is_dir():
        raise UserError(f"the code of the run, {last.code}, is gone; submit the run again with `erollout launch slurm`")
    checkpoint = run.newest_checkpoint()
    print(f"erollout: resumes from {checkpoint.name if checkpoint else 'step 0: there is no checkpoint'}")
    slurm.submit(run, last, {job.id for job in known})
    return 0
