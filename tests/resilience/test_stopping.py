"""Runs that are asked to stop: all ranks leave at the same step, saved, and the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT
from launched import Launched
from ranks import RankPool
from tiny_runs import sft_here, steps_recorded, tiny_tree, write_config

from erollout.checkpoint.manifest import complete_checkpoints
from erollout.errors import UserError
from erollout.resilience.stopping import Stop, stoppable

FOREVER = 300


def asked_sft(tree: dict[str, Any], asked: signal.Signals) -> int | str | None:
    """A supervised run, with a signal to rank 1 alone once a step is done. Returns the exit status it asks for."""
    import torch.distributed as dist

    def ask() -> None:
        while not steps_recorded(Path(tree["train"]["output_dir"]).parent):
            time.sleep(0.01)
        os.kill(os.getpid(), asked)

    if dist.get_rank() == 1:
        threading.Thread(target=ask, daemon=True).start()
    try:
        sft_here(tree)
    except SystemExit as ended:
        return ended.code
    return 0


def _verdict(folder: Path) -> str:
    return (folder / "run" / "verdict").read_text().strip()


@pytest.mark.distributed
def test_sigterm_stops_a_supervised_run_for_good(rank_pool: RankPool, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, checkpoint={"interval": FOREVER}, supervised={"steps": FOREVER, "batch_size": 8})
    assert rank_pool.run(2, asked_sft, tree, signal.SIGTERM) == [143, 143]
    assert _verdict(tmp_path) == "stopped"
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.parametrize(
    ("asked", "saves", "verdict"),
    [
        ((), True, "done"),
        ((signal.SIGUSR1,), True, "requeue"),
        ((signal.SIGUSR1,), False, "stopped"),
        ((signal.SIGUSR1, signal.SIGTERM), True, "stopped"),
        ((signal.SIGTERM, signal.SIGTERM), True, "stopped"),  # the second by a launcher, at once
        ((signal.SIGINT,), True, "stopped"),
        ((signal.SIGINT, signal.SIGINT), True, "stopped"),
        ((signal.SIGUSR1, signal.SIGINT), True, "stopped"),
    ],
)
def test_verdict(asked: tuple[signal.Signals, ...], saves: bool, verdict: str, rank_pool: RankPool, tmp_path: Path) -> None:
    assert rank_pool.run(1, stop_here, str(tmp_path), asked, saves) == [verdict]
    assert (tmp_path / "verdict").read_text() == f"{verdict}\n"


def stop_here(folder: str, asked: tuple[signal.Signals, ...], saves: bool) -> str:
    import torch

    before = signal.getsignal(signal.SIGUSR1)
    try:
        with stoppable(folder, saves) as stop:
            for number in asked:
                os.kill(os.getpid(), number)
            assert stop.agree(3, torch.device("cpu")) == bool(asked)
            verdict = stop.verdict
    except SystemExit as ended:
        assert ended.code == 128 + max(asked, key=[signal.SIGUSR1, signal.SIGINT, signal.SIGTERM].index)
    assert signal.getsignal(signal.SIGUSR1) == before
    return verdict


def test_a_run_that_fails_leaves_no_verdict_not_even_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "verdict").write_text("done\n")
    with pytest.raises(ZeroDivisionError), stoppable(str(tmp_path), saves=True) as stop:
        stop.begin()
        raise ZeroDivisionError
    assert not (tmp_path / "verdict").exists()


def test_a_run_that_is_refused_leaves_the_verdict_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "verdict").write_text("done\n")
    with pytest.raises(UserError), stoppable(str(tmp_path), saves=True):
        raise UserError("something is wrong")
    assert (tmp_path / "verdict").read_text() == "done\n"


def test_a_request_counts_though_nobody_reads_what_is_said_of_it(tmp_path: Path) -> None:
    """A whole pipeline has the signal, and who reads this process's output ends first."""
    process = os.fork()
    if not process:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as in any Python, whatever the test runner does
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        stop = Stop(saves=True, file=tmp_path / "verdict")
        stop.note(signal.SIGUSR1, None)
        os._exit(0 if stop.is_requested() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_rank_that_is_through_is_not_ended_by_a_late_signal(tmp_path: Path) -> None:
    """Others may still write the verdict, and the launcher would take it for a crash."""
    text = (
        "import os, signal; from erollout.resilience.stopping import stoppable\n"
        f"with stoppable({str(tmp_path)!r}, saves=True): pass\n"
        "for number in (signal.SIGUSR1, signal.SIGTERM): os.kill(os.getpid(), number)\n"
    )
    rank = ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", text], env=rank, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "verdict").read_text() == "done\n"


def test_a_later_second_sigterm_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = os.fork()
    if not process:
        stop = Stop(saves=True, file=tmp_path / "verdict")
        stop.note(signal.SIGTERM, None)
        monkeypatch.setattr("erollout.resilience.stopping._REPEAT_SECONDS", -1.0)
        stop.note(signal.SIGTERM, None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM


HANGS = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from erollout.resilience.stopping import stoppable
def interrupt():
    for pause in (0.2, 1.0):
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
with stoppable(sys.argv[1], saves=True):
    threading.Thread(target=interrupt, daemon=True).start()
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)  # as a collective does, it waits on after a signal and gives Python no time
"""


def test_a_second_interrupt_ends_a_rank_that_waits_for_ever(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130 and done.stderr.splitlines()[-1].startswith("erollout: SIGINT again: aborted")
    assert not (tmp_path / "verdict").exists()


PASSES_ON = """
import os, signal, subprocess, sys, time
from erollout.launch.local import _passing_on
rank = "import signal, sys; print(1, flush=True); signal.signal(signal.SIGINT, lambda *_: print(2, flush=True)); \
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\\nfor _ in range(600): signal.sigtimedwait([], 0.1)"
def wait(seconds):  # as torch's agent, which leaves the main thread time for its handlers
    for _ in range(round(seconds / 0.05)):
        time.sleep(0.05)
with _passing_on() as passed:
    child = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    for pause in map(float, sys.argv[1:]):
        wait(pause)
        os.kill(os.getpid(), signal.SIGINT)
    wait(1.5)
    ended = child.poll()
    child.kill()
print(ended, child.stdout.read().split(), signal.SIGKILL in passed)
"""


@pytest.mark.parametrize(
    ("pauses", "outcome"),
    [
        pytest.param(["1", "0.1"], "None ['2'] False", marks=pytest.mark.full),
        (["1", "0.1", "1"], "-9 ['2'] True"),
        pytest.param(["1", "1"], "-9 ['2'] True", marks=pytest.mark.full),
    ],
    ids=["at once", "at once and later", "later"],
)
def test_a_launcher_takes_a_second_interrupt_at_once_for_the_first(pauses: list[str], outcome: str) -> None:
    """A wrapper passes on what the terminal has sent to all: the ranks have time to save all the same."""
    program = [sys.executable, "-c", PASSES_ON, *pauses]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == outcome, done.stderr


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("ranks", "again"), [(1, False), *(pytest.param(2, again, marks=pytest.mark.full) for again in (False, True))]
)
def test_ctrl_c_saves_and_says_how_to_go_on_and_a_second_one_ends_at_once(ranks: int, again: bool, tmp_path: Path) -> None:
    """A first one reaches every process, as from a terminal; the launcher alone gets the second."""
    tree = tiny_tree(tmp_path)
    config = write_config(
        tmp_path,
        train=tree["train"] | {"steps": FOREVER},
        checkpoint={"interval": FOREVER},
        parallel={"world_size": ranks},
        rewards={"function": "unhurried_scorer:a_second"},
    )
    with Launched("train", "--config", str(config), output=tmp_path / "output") as run:
        run.wait_until(lambda: steps_recorded(tmp_path))
        if again:
            run.ranks()[1].suspend()  # the ranks can't agree to stop: nothing but a second interrupt ends the run
        if again:
            run.process.send_signal(signal.SIGINT)
        else:
            os.killpg(run.process.pid, signal.SIGINT)
        run.wait_until(lambda: "a second one aborts the run" in run.text())
        if again:
            time.sleep(0.5)
            run.process.send_signal(signal.SIGINT)
        assert run.process.wait(60) == 130, run.text()
        run.wait_until_gone(20)
    assert "Traceback" not in run.text()
    last = run.text().splitlines()[-1]
    if again:
        assert last.startswith("erollout: SIGINT again: aborted")
        assert not (tmp_path / "run" / "verdict").exists() and not complete_checkpoints(tmp_path / "run" / "checkpoints")
    else:
        (saved,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
        assert last.startswith(f"erollout: SIGINT: stopped, saved in {saved}") and "run the same command to resume" in last
        assert _verdict(tmp_path) == "stopped"
