"""Ends a rank together with its launcher. Light at import: a rank does this before anything that takes seconds."""

import ctypes
import os
import signal
import sys

from erollout.environment import set_variable, tasks_beside, variable
from erollout.errors import UserError

_LAUNCHER = "EROLLOUT_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def name_launcher() -> None:
    """Tell the ranks that this process is their launcher."""
    set_variable(_LAUNCHER, str(os.getpid()))


def end_with_parent() -> None:
    """Let the kernel end this rank when the launcher dies: orphaned ranks would write to the same checkpoints as the next start
    of the run. Linux only; elsewhere they end at the next collective with a missing rank.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        launcher = variable(_LAUNCHER)
        if launcher is not None and launcher != str(os.getppid()):  # the launcher died before the call above
            os.write(2, f"erollout: the launcher of this rank, process {launcher}, is gone\n".encode())
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def require_one_task(config: str) -> None:
    """Raise UserError if srun has started this command several times: each would be a separate run in one directory."""
    tasks, nodes = tasks_beside()
    if tasks == 1:
        return
    ranks = max(1, tasks // nodes)
    several = f"--nodes {nodes} --head $(scontrol show hostnames | head -n 1) " if nodes > 1 else ""
    raise UserError(
        f"SLURM_STEP_NUM_TASKS = {tasks}: srun starts this command {tasks} times, and no launcher makes one run of them; give "
        f"one task on each node: srun --nodes={nodes} --ntasks-per-node=1 erollout launch torchrun {several}--nproc-per-node "
        f"{ranks} --config {config}, or submit it by `erollout launch slurm`"
    )
