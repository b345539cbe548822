"""Everything read from the process environment, and nothing else: no other module of the project reads it."""

import os
from dataclasses import dataclass

_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER")
_OF_USERS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE"}


@dataclass(frozen=True, slots=True)
class LauncherEnvironment:
    """What torchrun (or srun, or Ray) tells a rank."""

    rank: int
    local_rank: int
    world_size: int
    restart_count: int
    is_elastic: bool
    """torchrun, or our own local launcher: an agent process is this one's parent."""


def launcher_environment() -> LauncherEnvironment | None:
    """The launcher's variables, or None in a process that no launcher started."""
    if "RANK" not in os.environ:
        return None
    return LauncherEnvironment(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ["WORLD_SIZE"]),
        restart_count=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        is_elastic="TORCHELASTIC_RUN_ID" in os.environ,
    )


def set_default(name: str, value: str) -> None:
    """Set a variable for this process and its children unless the user has set it."""
    os.environ.setdefault(name, value)


def set_variable(name: str, value: str) -> None:
    """Set a variable for this process and its children, whatever it was."""
    os.environ[name] = value


def variable(name: str) -> str | None:
    """A variable as the user has set it; None where it is not, or is empty."""
    return os.environ.get(name) or None


def outside_of_jobs() -> dict[str, str]:
    """The environment without what Slurm has put into it, for a job that is submitted from within another one."""
    return {name: value for name, value in os.environ.items() if name in _OF_USERS or not name.startswith(_OF_JOBS)}


def job_name() -> str | None:
    """What Slurm, Ray or torchrun call the job that this process is of; None in one that none of them started."""
    if job := variable("SLURM_JOB_ID"):
        return f"slurm {job}, restart {variable('SLURM_RESTART_COUNT') or 0}"
    if job := variable("RAY_JOB_ID"):
        return f"ray {job}"
    run = variable("TORCHELASTIC_RUN_ID")
    return None if run in (None, "none") else f"torchrun {run}"
