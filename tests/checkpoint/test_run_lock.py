"""One run at a time in a directory: who is alive is named, who is dead is succeeded, and only one of many gets it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, invoke
from fake_slurm import FakeSlurm, fake  # noqa: F401
from ranks import RankPool
from test_resume_changes import refused_train
from tiny_runs import tiny_tree, train_here, write_config

from erollout.checkpoint import run_lock
from erollout.checkpoint.run_lock import LOCK, LOST, Owner, RunLock, read_owner, this_process
from erollout.config import build_config
from erollout.errors import UserError
from erollout.launch.parent import require_one_task

HOLDS = """
import sys, time
from pathlib import Path
from erollout.checkpoint.run_lock import RunLock
with RunLock(Path(sys.argv[1]), "train.output_dir").held():
    print("has it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_ENDING_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the directory."""
    program = [sys.executable, "-c", HOLDS, str(tmp_path), "200"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.wait()


def _lock(folder: Path) -> RunLock:
    return RunLock(folder, "train.output_dir")


def _leave(folder: Path, owner: Owner, age: float = 0.0) -> None:
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    at = time.time() - age
    os.utime(folder / LOCK, (at, at))


def _refused(folder: Path, beats: bool = True) -> str:
    """`beats`: the owner gives signs meanwhile."""
    ended = threading.Event()

    def beat() -> None:
        while beats and not ended.wait(0.1):
            os.utime(folder / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError) as refusal:
            _lock(folder).take()
    finally:
        ended.set()
        thread.join()
    return str(refusal.value)


def test_a_live_owner_is_named_and_a_dead_one_is_succeeded(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    message = _refused(tmp_path)
    assert f"train.output_dir = {tmp_path} is in use by process {holder.pid} on {socket.gethostname()}" in message
    assert "erollout launch stop" in message and [path.name for path in tmp_path.iterdir()] == [LOCK]
    holder.kill()
    holder.wait()
    with _lock(tmp_path).held():
        assert read_owner(tmp_path / LOCK) is not None and read_owner(tmp_path / LOCK).pid == os.getpid()  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_of_the_same_id_is_another_one(tmp_path: Path) -> None:
    other = this_process()
    _leave(tmp_path, replace(other, pid=os.getppid(), started=-1.0))
    _lock(tmp_path).take()


def test_an_owner_elsewhere_lives_as_long_as_it_gives_signs(tmp_path: Path) -> None:
    elsewhere = replace(this_process(), host="far", machine="another", pid=1)
    _leave(tmp_path, elsewhere, age=60)
    message = _refused(tmp_path)
    assert "process 1 on far" in message and f"remove {tmp_path}/{LOCK} if you are sure that it is gone" in message
    _leave(tmp_path, elsewhere, age=200)
    _lock(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_restart_on_another_machine_waits_until_the_owner_is_dead_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine is lost, and the run is started again at once elsewhere."""
    monkeypatch.setattr(run_lock, "_DEAD_SECONDS", 4.0)
    _leave(tmp_path, replace(this_process(), host="far", machine="another", pid=1))
    with caplog.at_level("INFO"):
        _lock(tmp_path).take()
    assert [line for line in caplog.messages if f"{tmp_path} is held by process 1 on far: waiting up to 4 s" in line]


def test_what_others_left_beside_the_lock_is_removed(tmp_path: Path) -> None:
    left = [f"lock.{'a' * 32}", f"lock.{'b' * 32}.now", "lock.4711.0"]
    kept = ["lock.txt", "lock.of.mine", f"lock.{'c' * 32}"]
    for name in [*left, *kept]:
        (tmp_path / name).touch()
        at = time.time() - (0 if name == kept[2] else 1000)  # another one takes part just now
        os.utime(tmp_path / name, (at, at))
    with _lock(tmp_path).held():
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LOCK, *kept])


def test_a_container_of_the_same_name_is_another_machine(tmp_path: Path) -> None:
    _leave(tmp_path, replace(this_process(), machine="same host, other process ids", pid=2**22 + 1))
    assert "is in use" in _refused(tmp_path)


@pytest.mark.parametrize(("state", "free"), [("RUNNING", False), ("PENDING", False), ("FAILED", True)])
def test_slurm_says_whether_a_job_lives(
    state: str,
    free: bool,
    tmp_path: Path,
    fake: FakeSlurm,  # noqa: F811
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fake.holds((7, state, folder))
    _leave(folder, replace(this_process(), host="n1", machine="another", pid=1, job="7"), age=0 if free else 9000)
    if free:
        _lock(folder).take()
    else:
        assert "(Slurm job 7)" in _refused(folder)


@pytest.mark.parametrize("pid", [1, 0], ids=["ranks", "batch script"])
def test_a_job_that_this_slurm_does_not_know_may_be_another_clusters(
    pid: int,
    tmp_path: Path,
    fake: FakeSlurm,  # noqa: F811
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    theirs = replace(this_process(), host="n1", machine="another", pid=pid, job="7")
    _leave(folder, theirs)
    message = _refused(folder, beats=pid > 0)
    assert "(Slurm job 7)" in message and f"remove {folder}/{LOCK} if you are sure that it is gone" in message
    assert fake.calls("squeue")
    _leave(folder, theirs, age=9000)
    _lock(folder).take()


@pytest.mark.parametrize("state", ["FAILED", "RUNNING"])
@pytest.mark.parametrize("job", ["7", "8", ""], ids=["same number", "other number", "no job"])
def test_a_job_of_another_cluster_is_not_the_one_of_its_number_here(
    job: str,
    state: str,
    tmp_path: Path,
    fake: FakeSlurm,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither dead because that one is, nor alive because that one is, nor an earlier start of this one."""
    folder = tmp_path / "run"
    folder.mkdir()
    fake.holds((7, state, folder))
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    theirs = replace(this_process(), host="n1", machine="another", pid=1, job="7", attempt=0, cluster="there")
    _leave(folder, theirs)
    assert "(Slurm job 7 of cluster there)" in _refused(folder)
    _leave(folder, theirs, age=9000)
    _lock(folder).take()
    assert not fake.calls("squeue")


def test_slurm_is_asked_of_a_job_of_its_own_cluster_and_of_one_whose_cluster_is_not_known(
    tmp_path: Path,
    fake: FakeSlurm,  # noqa: F811
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fake.holds((7, "FAILED", folder))
    for cluster in ("here", ""):
        _leave(folder, replace(this_process(), host="n1", machine="another", pid=1, job="7", cluster=cluster))
        _lock(folder).take()
    assert len(fake.calls("squeue")) == 4


def test_the_next_start_of_a_job_takes_over_at_once_and_a_second_step_of_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    there = replace(this_process(), host="n2", machine="another", pid=1)
    _leave(tmp_path, there)
    assert "process 1 on n2 (Slurm job 7)" in _refused(tmp_path)
    _leave(tmp_path, replace(there, pid=0))  # its batch script
    _lock(tmp_path).take()
    _leave(tmp_path, there)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _lock(tmp_path).take()


def test_the_next_start_of_a_job_on_ray_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ray-1130-1200.1")
    there = replace(this_process(), host="far", machine="another", pid=1)
    _leave(tmp_path, there)
    assert "process 1 on far (job ray-1130-1200)" in _refused(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ray-1130-1200.2")
    _lock(tmp_path).take()


def test_a_half_written_file_is_waited_for_and_then_replaced(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": ')
    os.utime(tmp_path / LOCK, (time.time() - 100,) * 2)
    _lock(tmp_path).take()
    assert read_owner(tmp_path / LOCK) is not None


@pytest.mark.parametrize("left", [False, True], ids=["free", "left by a dead one"])
def test_of_many_at_once_one_gets_it(left: bool, tmp_path: Path) -> None:
    if left:
        _leave(tmp_path, replace(this_process(), pid=os.getppid(), started=-1.0))
    program = [
        sys.executable,
        "-c",
        f"import erollout.checkpoint.run_lock as r; r._ENDING_SECONDS = 1\n{HOLDS}",
        str(tmp_path),
        "200",
    ]
    all_ = [
        subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(4)
    ]
    deadline = time.monotonic() + 100
    while sum(process.poll() is not None for process in all_) < len(all_) - 1:
        assert time.monotonic() < deadline, "several have it, or wait for it"
        time.sleep(0.05)
    for process in all_:
        process.terminate()  # the one that has it
    outputs = [process.communicate(timeout=100) for process in all_]
    assert sorted(out for out, _ in outputs) == ["", "", "", "has it\n"]
    assert sum("is in use by" in error for _, error in outputs) == 3


def test_who_was_succeeded_ends(tmp_path: Path) -> None:
    program = [
        sys.executable,
        "-c",
        f"import erollout.checkpoint.run_lock as r; r._BEAT_SECONDS = 0.1\n{HOLDS}",
        str(tmp_path),
        "100",
    ]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    _leave(tmp_path, replace(this_process(), host="far"))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == LOST and f"{tmp_path} is now held by process {os.getpid()} on far" in error


@pytest.mark.distributed
def test_a_second_run_is_refused_on_all_ranks_and_writes_nothing(
    rank_pool: RankPool, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    tree = tiny_tree(tmp_path, checkpoint={"interval": 1}, rollout={"dtype": "float32"})
    tree["train"]["output_dir"] = str(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    messages = rank_pool.run(2, refused_train, tree)
    assert messages[0] == messages[1] and f"is in use by process {holder.pid}" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [["train"], ["sft"], ["launch", "torchrun", "--nproc-per-node", "2"]], ids=" ".join)
def test_several_tasks_without_a_launcher_are_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NUM_NODES": 2}.items():
        monkeypatch.setenv(name, str(value))
    line = invoke(*command, "--config", str(write_config(tmp_path))).error()
    assert "SLURM_STEP_NUM_TASKS = 8" in line and not (tmp_path / "run").exists()
    assert "srun --nodes=2 --ntasks-per-node=1 erollout launch torchrun --nodes 2" in line and "--nproc-per-node 4" in line


def test_a_batch_script_is_one_process_whatever_its_job_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Slurm 22.05 tells the script of `#SBATCH --ntasks=8 --nodes=2`, which is no task of a step."""
    for name, value in {"SLURM_PROCID": 0, "SLURM_NTASKS": 8, "SLURM_NPROCS": 8, "SLURM_NNODES": 2}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    require_one_task("config.yaml")


def locked_places(tree: dict[str, Any]) -> list[str]:
    """The locks of a run that trains, and whether they are there when its verdict is written."""
    from erollout.resilience import stopping
    from erollout.training import session
    from erollout.training.loop import RunLoop

    found: list[str] = []
    output = Path(tree["train"]["output_dir"])

    def look(*_: Any) -> None:
        found.extend(str(path) for path in sorted(output.parent.rglob(LOCK)))

    def write(path: Path, verdict: str) -> None:
        look()
        before(path, verdict)

    before = stopping._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "_BEAT_SECONDS", 0.01)
        patch.setattr(stopping, "_write", write)
        patch.setattr(RunLoop, "run", lambda self: time.sleep(0.2))
        session.train(build_config(tree))
    look()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("directory", "places"),
    [(None, ["run", "run/checkpoints"]), ("run", ["run"]), ("run/../run/.", ["run"]), ("other", ["other", "run"])],
    ids=str,
)
def test_each_directory_of_a_run_is_locked_once_until_its_verdict_is_written(
    directory: str | None, places: list[str], rank_pool: RankPool, tmp_path: Path
) -> None:
    own = {"directory": str(tmp_path / directory)} if directory else {}
    tree = tiny_tree(tmp_path, checkpoint={"interval": 1, **own}, rollout={"dtype": "float32"})
    (found,) = rank_pool.run(1, locked_places, tree)
    assert found == sorted(str(tmp_path / place / LOCK) for place in places)
    assert (tmp_path / "run" / "verdict").read_text() == "done\n"


def saved_meanwhile(tree: dict[str, Any], checkpoint: str) -> str:
    """Refusal of a run whose directory's owner publishes a checkpoint while it is waited for."""
    take = RunLock.take

    def wait(self: RunLock) -> None:
        destination = Path(tree["train"]["output_dir"]) / "checkpoints" / Path(checkpoint).name
        if not destination.exists():
            shutil.copytree(checkpoint, destination)
        take(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLock, "take", wait)
        return refused_train(tree)


@pytest.mark.distributed
def test_a_checkpoint_that_the_owner_before_saves_at_its_end_is_not_gone_on_from_unasked(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    tree = tiny_tree(tmp_path, checkpoint={"interval": 1}, rollout={"dtype": "float32"})
    tree["train"] |= {"steps": 1}
    rank_pool.run(1, train_here, tree)
    moved = shutil.move(tmp_path / "run" / "checkpoints" / "step_00000001", tmp_path / "kept")
    step = Path(moved).rename(tmp_path / "step_00000001")
    tree["checkpoint"]["resume"] = False
    tree["train"]["output_dir"] = str(tmp_path / "another")
    messages = rank_pool.run(2, saved_meanwhile, tree, str(step))
    assert messages[0] == messages[1] and "checkpoint.resume = false but" in messages[0]
    assert not list(tmp_path.glob(f"another/**/{LOCK}"))


@pytest.mark.parametrize("kind", ["a link to nothing", "a pipe", "half a file of the future"])
def test_what_is_no_lock_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    if kind == "a link to nothing":
        lock.symlink_to(tmp_path / "nothing")
    elif kind == "a pipe":
        os.mkfifo(lock)
    else:
        lock.write_text('{"host": ')
        os.utime(lock, (time.time() + 1e6, time.time() + 1e6))
    with _lock(tmp_path).held():
        assert read_owner(lock) is not None and not lock.is_symlink()
    assert not lock.exists()


def test_an_owner_of_the_future_that_is_silent_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_DEAD_SECONDS", 3.0)
    _leave(tmp_path, replace(this_process(), host="elsewhere", machine="another", pid=77, token="t"), age=-1e6)
    with _lock(tmp_path).held():
        assert read_owner(tmp_path / LOCK) != Owner("elsewhere", 77, 0.0, "another", "", 0, "t")
