"""Everything read from the process environment, and nothing else: no other module of the project reads it."""

import os
import sys
from dataclasses import dataclass

from erollout.errors import UserError

_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER")
_OF_USERS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE"}

SECRET = "EROLLOUT_SECRET"
"""Variable: what the nodes of a run know each other by."""
STORE = "EROLLOUT_STORE"
"""Variable: the file in which the ranks of one machine meet."""


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
    """The launcher's variables, or None in a process that no launcher started. Raises UserError for half of them."""
    rank = _number("RANK")
    if rank is None:
        return None
    world_size = _number("WORLD_SIZE", least=1)
    if world_size is None:
        raise UserError(
            f"RANK = {rank} is set in the environment but WORLD_SIZE is not: unset RANK to start the ranks here, or start "
            "this process with torchrun, `erollout launch` or srun, which set both"
        )
    if rank >= world_size:
        raise UserError(f"RANK = {rank} is not below WORLD_SIZE = {world_size} in the environment; unset both, or correct one")
    return LauncherEnvironment(
        rank=rank,
        local_rank=_number("LOCAL_RANK") or 0,
        world_size=world_size,
        restart_count=_number("TORCHELASTIC_RESTART_COUNT") or 0,
        is_elastic=is_elastic(),
    )


def is_elastic() -> bool:
    """Whether torchrun or our own local launcher started this process."""
    return variable("TORCHELASTIC_RUN_ID") is not None


def is_rank() -> bool:
    """Whether a launcher started this process, whatever else it said."""
    return variable("RANK") is not None


def _number(name: str, least: int = 0) -> int | None:
    """None where the variable is not set, or empty. Raises UserError."""
    text = variable(name)
    if text is None:
        return None
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < least:
        raise UserError(f"{name} = {text[:80]!r} in the environment is not an integer of at least {least}; unset or correct it")
    return int(text)


def set_default(name: str, value: str) -> None:
    """Set a variable for this process and its children unless the user has set it."""
    os.environ.setdefault(name, value)


def set_variable(name: str, value: str) -> None:
    """Set a variable for this process and its children, whatever it was."""
    os.environ[name] = value


def variable(name: str) -> str | None:
    """A variable as the user has set it; None where it is not, or is empty."""
    return os.environ.get(name) or None


def stay_on_loopback() -> None:
    """Let nothing that gloo and NCCL open in this process and its children be reached from another machine."""
    os.environ.update(loopback_variables())


def loopback_variables() -> dict[str, str]:
    """By which gloo and NCCL listen on this machine's loopback alone."""
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo")


def max_cpu_isa() -> str | None:
    """The best instructions that our CPU kernels may use (avx512, avx2 or none); None: whatever the processor has."""
    return variable("EROLLOUT_MAX_CPU_ISA")


def job_and_attempt() -> tuple[str, int]:
    """Of which job this process is, by Slurm's number or `launch ray`'s name, and in which of its starts; ("", 0) in none."""
    name, _, attempt = (variable("TORCHELASTIC_RUN_ID") or "").rpartition(".")
    if name.startswith("ray-") and attempt.isdigit():  # of which Slurm's job may have several
        return name, int(attempt)
    return variable("SLURM_JOB_ID") or "", int(variable("SLURM_RESTART_COUNT") or "0")


def cluster_name() -> str:
    """Of the Slurm whose job this process is; empty in none, and where Slurm does not say."""
    return variable("SLURM_CLUSTER_NAME") or ""


def tasks_beside() -> tuple[int, int]:
    """How many tasks srun started of this command, on how many nodes; (1, 1) where it did not.

    SLURM_NTASKS and SLURM_PROCID tell nothing: a batch script, of which there is one, has them too.
    """
    return _number("SLURM_STEP_NUM_TASKS", least=1) or 1, _number("SLURM_STEP_NUM_NODES", least=1) or 1


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
