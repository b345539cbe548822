"""Heartbeats of real processes, and the end of one that waits in vain."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from erollout.resilience.watchdog import HUNG, Heartbeat, Watchdog, describe_hang, read_heartbeats

RANK = """
import os, signal, sys, time
from erollout.resilience.watchdog import Watchdog
directory, rank, phases, hang, heartbeat = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), *map(float, sys.argv[4:])
watchdog = Watchdog(directory, rank, 2, heartbeat, hang)
with watchdog.watching():
    for phase in phases:
        watchdog.enter(4, phase)
    if phases[-1] == "suspended":
        os.kill(os.getpid(), signal.SIGSTOP)
    def held_up():
        while True:
            time.sleep(0.2)
            if phases[-1] == "lively":
                watchdog.alive()
    held_up()
"""


def _rank(folder: Path, rank: int, phases: str, hang_seconds: float, heartbeat: float = 0.1) -> subprocess.Popen[str]:
    """`heartbeat`: seconds; after three of them without one a rank is silent."""
    arguments = [sys.executable, "-c", RANK, str(folder), str(rank), phases, str(hang_seconds), str(heartbeat)]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


def _wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


def test_a_rank_that_waits_names_the_one_that_is_behind_and_ends(tmp_path: Path) -> None:
    behind = _rank(tmp_path, 1, "refit", 50, heartbeat=2)
    try:
        _wait_for(lambda: [b.phase for b in read_heartbeats(tmp_path / "heartbeats", 2)] == ["refit"])
        waiting = _rank(tmp_path, 0, "refit,rollout", 1, heartbeat=2)
        message = waiting.communicate(timeout=40)[1]
    finally:
        behind.kill()
        behind.communicate()
    assert waiting.returncode == HUNG
    assert message.count("\n") == 1 and "rank 0 has been in phase rollout of step 5" in message
    assert "behind: rank 1, in refit of step 5" in message and f"pid {behind.pid}" in message
    assert " in held_up" in Path(message.strip().rpartition(" ")[2]).read_text(), "the stack shows where the main thread is"


def test_ranks_of_a_larger_world_before_are_forgotten(tmp_path: Path) -> None:
    for rank in range(4):
        with Watchdog(str(tmp_path), rank, 4, 10.0, 0.0).watching():
            _wait_for((tmp_path / "heartbeats" / f"rank_0000{rank}.json").exists)
    with Watchdog(str(tmp_path), 0, 2, 10.0, 0.0).watching():
        _wait_for(lambda: [beat.rank for beat in read_heartbeats(tmp_path / "heartbeats", 4)] == [0, 1])


def test_a_stopped_process_is_named_silent(tmp_path: Path) -> None:
    stopped = _rank(tmp_path, 1, "refit,rollout", 50)
    try:
        _wait_for(lambda: [b.phase for b in read_heartbeats(tmp_path / "heartbeats", 2)] == ["rollout"])
        stopped.send_signal(signal.SIGSTOP)
        waiting = _rank(tmp_path, 0, "refit,rollout", 1)
        message = waiting.communicate(timeout=40)[1]
    finally:
        stopped.kill()
        stopped.communicate()
    assert waiting.returncode == HUNG
    assert "silent: rank 1, in rollout of step 5" in message


def test_a_process_that_was_suspended_did_not_wait_meanwhile(tmp_path: Path) -> None:
    rank = _rank(tmp_path, 0, "suspended", 1.5)
    try:
        _wait_for(lambda: psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED)
        time.sleep(2)
        continued = time.monotonic()
        rank.send_signal(signal.SIGCONT)
        assert rank.wait(40) == HUNG
        assert time.monotonic() - continued > 1
    finally:
        rank.kill()
        rank.communicate()


def test_a_long_phase_that_gives_signs_is_no_hang(tmp_path: Path) -> None:
    lively, waiting = _rank(tmp_path, 0, "lively", 3), _rank(tmp_path, 1, "rollout", 3)
    try:
        assert waiting.wait(40) == HUNG
        time.sleep(4)
        assert lively.poll() is None
    finally:
        for rank in (lively, waiting):
            rank.kill()
            rank.communicate()


def test_a_filesystem_that_hangs_delays_no_end(tmp_path: Path) -> None:
    """Nobody reads the pipe that a heartbeat is written to, and the stacks."""
    (tmp_path / "heartbeats").mkdir()
    for name in ("rank_00000.json.partial", "stacks_rank_00000.txt"):
        os.mkfifo(tmp_path / "heartbeats" / name)
    rank = _rank(tmp_path, 0, "rollout", 1)
    try:
        assert rank.wait(60) == HUNG
    finally:
        rank.kill()
        rank.communicate()


def test_phases_that_go_on_keep_it_quiet_and_its_files_say_where_it_is(tmp_path: Path) -> None:
    watchdog = Watchdog(str(tmp_path), 0, 1, heartbeat_seconds=0.02, hang_seconds=30)
    with watchdog.watching():
        for step in range(3):
            watchdog.enter(step, "update")
            _wait_for(lambda step=step: [b.step for b in read_heartbeats(tmp_path / "heartbeats", 1)] == [step])
    (beat,) = read_heartbeats(tmp_path / "heartbeats", 1)
    assert (beat.phase, beat.phases, beat.rank) == ("update", 3, 0) and 0 <= beat.beat - beat.since < 30
    assert json.loads((tmp_path / "heartbeats" / "rank_00000.json").read_text())["host"] == beat.host


def test_a_heartbeat_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "heartbeats").write_text("in the way")
    with Watchdog(str(tmp_path), 0, 1, heartbeat_seconds=0.01, hang_seconds=30).watching():
        _wait_for(lambda: bool(caplog.records))
        time.sleep(0.1)
    assert len(caplog.records) == 1 and "can't write heartbeats" in caplog.text


def test_ranks_in_one_phase_differ_in_their_collectives() -> None:
    now = time.time()
    mine = Heartbeat(0, "a", 1, step=2, phase="update", phases=9, since=now, beat=now, collectives={"0": 12, "7": 3, "8": 5})
    other = Heartbeat(1, "b", 2, step=2, phase="update", phases=9, since=now, beat=now, collectives={"0": 12, "7": 2, "9": 1})
    message = describe_hang(mine, [other], 5, 1)
    assert "behind in collectives: rank 1" in message and "collective 2 of 3 in group 7)" in message
    assert "no other rank is behind" in describe_hang(mine, [mine], 5, 1)


def test_what_takes_too_long_ends_the_process() -> None:
    text = "import time\nfrom erollout.resilience.watchdog import at_most\n"
    text += "with at_most({}, 'waiting'): time.sleep({})\nprint('on')"
    done = subprocess.run([sys.executable, "-c", text.format(0.2, 60)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (HUNG, "") and "waiting takes more than 0.2 s" in done.stderr
    done = subprocess.run([sys.executable, "-c", text.format(60, 0)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "on\n"), done.stderr
