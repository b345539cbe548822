"""Access to the process environment: no other module of the project reads it."""

import os
import sys
from dataclasses import dataclass

from erollout.errors import UserError

_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER")
_OF_USERS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE"}

SECRET = "EROLLOUT_SECRET"
"""Variable with the secret by which the nodes of a run authenticate each other."""
STORE = "EROLLOUT_STORE"
"""Variable with the rendezvous file of the ranks of one machine."""


@dataclass(frozen=True, slots=True)
class LauncherEnvironment:
    """Variables that torchrun (or srun, or Ray) sets for a rank."""

    rank: int
    local_rank: int
    world_size: int
    restart_count: int
    is_elastic: bool
    """Whether torchrun or our own local launcher, an agent process, is this process's parent."""


def launcher_environment() -> LauncherEnvironment | None:
    """The launcher's variables; None: no launcher started this process. Raises UserError if they are incomplete."""
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
    """Whether a launcher started this process, even if its other variables are wrong."""
    return variable("RANK") is not None


def _number(name: str, least: int = 0) -> int | None:
    """Integer value of a variable; None: it is unset or empty. Raises UserError."""
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
    """Set a variable for this process and its children."""
    os.environ[name] = value


def variable(name: str) -> str | None:
    """Value of a variable; None: it is unset or empty."""
    return os.environ.get(name) or None


def stay_on_loopback() -> None:
    """Make gloo and NCCL in this process and its children unreachable from other machines."""
    os.environ.update(loopback_variables())


def loopback_variables() -> dict[str, str]:
    """Variables that make gloo and NCCL listen only on this machine's loopback."""
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo")


def max_cpu_isa() -> str | None:
    """Limit of the CPU kernels' instruction set (avx512, avx2 or none); None: no limit."""
    return variable("EROLLOUT_MAX_CPU_ISA")


def job_and_attempt() -> tuple[str, int]:
    """This process's job, as Slurm's number or `launch ray`'s name, and its number of earlier starts; ("", 0): no job."""
    name, _, attempt = (variable("TORCHELASTIC_RUN_ID") or "").rpartition(".")
    if name.startswith("ray-") and attempt.isdigit():  # a Slurm job may have several
        return name, int(attempt)
    return variable("SLURM_JOB_ID") or "", int(variable("SLURM_RESTART_COUNT") or "0")


def cluster_name() -> str:
    """Name of the Slurm cluster of this process's job; empty: no job, or unknown."""
    return variable("SLURM_CLUSTER_NAME") or ""


def tasks_beside() -> tuple[int, int]:
    """Number of tasks that srun started of this command, and of nodes; (1, 1) without srun.

    SLURM_NTASKS and SLURM_PROCID do not tell: a batch script, which is a single task, has them too.
    """
    return _number("SLURM_STEP_NUM_TASKS", least=1) or 1, _number("SLURM_STEP_NUM_NODES", least=1) or 1


def outside_of_jobs() -> dict[str, str]:
    """The environment without Slurm's variables, for a job submitted from within another one."""
    return {name: value for name, value in os.environ.items() if name in _OF_USERS or not name.startswith(_OF_JOBS)}


def job_name() -> str | None:
    """Name of this process's job in Slurm, Ray or torchrun; None: none of them started it."""
    if job := variable("SLURM_JOB_ID"):
        return f"slurm {job}, restart {variable('SLURM_RESTART_COUNT') or 0}"
    if job := variable("RAY_JOB_ID"):
        return f"ray {job}"
    run = variable("TORCHELASTIC_RUN_ID")
    return None if run in (None, "none") else f"torchrun {run}"
