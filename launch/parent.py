"""Ties a rank's life to its launcher's. Light at import: a rank does this before anything that takes seconds."""

import ctypes
import os
import signal
import sys

from erollout.environment import set_variable, variable

_LAUNCHER = "EROLLOUT_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def name_launcher() -> None:
    """Tell the ranks that this process starts who their launcher is."""
    set_variable(_LAUNCHER, str(os.getpid()))


def end_with_parent() -> None:
    """Let the kernel end this rank when the launcher dies, however it dies: ranks that go on alone would write to the same
    checkpoints as the run that is started next. Linux only; elsewhere they end at the next collective that misses someone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        launcher = variable(_LAUNCHER)
        if launcher is not None and launcher != str(os.getppid()):  # it died before the call above
            os.write(2, f"erollout: the launcher of this rank, process {launcher}, is gone\n".encode())
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
