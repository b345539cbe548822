"""A scorer that does what the response says. By itself, because scoring processes import it: it must be light."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from erollout.types import Prompt


def scripted(prompt: Prompt, response: str) -> float:
    """A scorer that does what the response says; run in scoring processes."""
    command, _, argument = response.partition(" ")
    if command == "sleep":
        time.sleep(float(argument))
    if command == "ignore_sigterm_and_sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if command == "raise":
        raise RuntimeError(argument)
    if command == "sys_exit":
        sys.exit(3)
    if command == "exit":
        os._exit(3)
    if command == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(argument).write_text(str(child.pid))
        time.sleep(600)
    if command == "child_of_its_own":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        Path(argument).write_text(str(child.pid))
        time.sleep(600)
    if command == "fork" and not os.fork():
        return 99.0
    if command == "terminate_children":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        forked.start()
        child.terminate()
        forked.terminate()
        forked.join()
        return float(child.wait())
    if command == "allocate":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # as the site's own limit would
        return float(len(bytearray(2**40)))
    if command == "pid":
        return float(os.getpid())
    if command == "touch":
        Path(argument).touch()
        return 0.5
    if command == "print":
        print("a scorer's own output")
    return float(argument or 0.5)


def wrong_signature(prompt: Prompt) -> float:
    return 0.0
