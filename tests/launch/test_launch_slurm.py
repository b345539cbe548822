"""What `erollout launch slurm` composes and refuses, without a cluster; tests/slurm submits to a real one."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import invoke
from fake_slurm import FakeSlurm, fake, folder, submit_tiny

from erollout.config import load_config
from erollout.launch import plan
from erollout.launch.plan import seconds_of
from erollout.launch.run_directory import RunDirectory
from erollout.schedulers import slurm_jobs

__all__ = ["fake", "folder"]

ROOT = Path(__file__).parents[2]


def _site(folder: Path, **values: Any) -> str:
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(values))
    return f"--site={path}"


def _command(folder: Path) -> list[str]:
    """Command of the newest job."""
    return list(RunDirectory(folder / "run").submissions()[-1].command)


def _variables(folder: Path) -> dict[str, str]:
    """What a shell makes of job.env."""
    shell = subprocess.run(
        ["env", "-i", "bash", "-c", f". {folder}/run/job.env; env -0"], capture_output=True, text=True, timeout=20, check=True
    )
    return dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if entry)


def test_a_submission(folder: Path, fake: FakeSlurm) -> None:
    outcome = submit_tiny(folder, "--time=02:00:00", "--", "train.steps=7")
    assert outcome.status == 0 and "job 101 of" in outcome.stdout, outcome.stderr
    run = folder / "run"
    (called,) = fake.calls("sbatch")
    assert shlex.split(called) == _command(folder)[1:]
    wanted = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=02:00:00", "--signal=B:USR1@300"]
    wanted += ["--requeue", "--open-mode=append", f"--chdir={run}", f"--output={run}/slurm-%j.out", "--job-name=erollout-run"]
    assert set(wanted) < set(_command(folder))
    assert _command(folder)[-4:] == [str(run / "train.sbatch"), str(run), "--config", str(run / "config.yaml")]
    assert not [option for option in _command(folder) if option.startswith(("--dependency", "--exclude", "--cpus"))]
    assert load_config(run / "config.yaml").train.steps == 7
    assert (run / "train.sbatch").read_text() == plan.batch_script().read_text()
    (entry,) = RunDirectory(run).submissions()
    assert entry.job == 101 and Path(entry.code, "erollout", "cli.py").is_file() and set(entry.source) == {"commit", "dirty"}
    variables = _variables(folder)
    assert variables["EROLLOUT_PYTHON"] == sys.executable and variables["EROLLOUT_CODE"] == entry.code
    assert variables["PYTHONSAFEPATH"] == "1", "the code must not be that of the directory where the job happens to be"
    assert [variables[f"EROLLOUT_{name}"] for name in ("RANKS_PER_NODE", "GPUS_PER_NODE", "REQUEUE", "PREFLIGHT")] == list(
        "4411"
    )
    assert variables["EROLLOUT_CHECKPOINTS"] == str(run / "checkpoints")


def test_the_batch_script_is_a_script(folder: Path) -> None:
    subprocess.run(["bash", "-n", str(plan.batch_script())], check=True, timeout=20)


def test_what_a_site_changes(folder: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"mine{os.pathsep}/theirs")
    site = _site(
        folder,
        partition="p q",
        gpus={"how": "gres", "type": "h100"},
        cpus_per_task=9,
        mem=0,
        exclusive=True,
        interface="ib0",
        setup="module load x\n",
        container={"kind": "pyxis", "image": "a.sqsh", "mounts": ["/a:/b", "/c"]},
        options=["--switches=1"],
        env={"NCCL_DEBUG": "it's", "N": 1},
    )
    assert submit_tiny(folder, site).status == 0
    options = {"--partition=p q", "--gres=gpu:h100:4", "--cpus-per-task=9", "--mem=0", "--exclusive", "--switches=1"}
    assert options < set(_command(folder))
    variables = _variables(folder)
    assert variables["EROLLOUT_PYTHON"] == "python3", "the image's, not this machine's"
    assert variables["EROLLOUT_CONTAINER_MOUNTS"] == "/a:/b,/c"
    assert [variables[f"EROLLOUT_{name}"] for name in ("CONTAINER", "CONTAINER_KIND", "INTERFACE")] == [
        "a.sqsh",
        "pyxis",
        "ib0",
    ]
    assert Path(variables["EROLLOUT_SETUP"]).read_text() == "module load x\n"
    assert (variables["NCCL_DEBUG"], variables["N"]) == ("it's", "1")
    assert variables["PYTHONPATH"] == f"{folder}/mine:/theirs", "the job runs in another directory"


@pytest.mark.parametrize(
    ("site", "size", "there", "not_there"),
    [
        ({"gpus": {"how": "none"}}, "--gpus-per-node=4", [], ["--gpus", "--gres", "--cpus"]),
        ({}, "--ranks-per-node=3", ["--cpus-per-task=3"], ["--gpus", "--gres"]),
        ({"exclusive": True}, "--ranks-per-node=3", ["--exclusive"], ["--cpus"]),
        ({"requeue": False}, "--gpus-per-node=4", ["--no-requeue"], ["--dependency"]),
    ],
)
def test_how_resources_are_asked_for(
    folder: Path, fake: FakeSlurm, site: dict[str, Any], size: str, there: list[str], not_there: list[str]
) -> None:
    assert submit_tiny(folder, _site(folder, **site), size=size).status == 0
    assert set(there) < set(_command(folder))
    assert not [option for option in _command(folder) if option.startswith(tuple(not_there))]
    variables = _variables(folder)
    assert variables["EROLLOUT_GPUS_PER_NODE"] == ("4" if "gpus" in size else "0")
    assert variables["EROLLOUT_REQUEUE"] == ("0" if "requeue" in site else "1")


def test_a_chain(folder: Path, fake: FakeSlurm) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "verdict").write_text("stopped\n")
    (folder / "run" / "bad_nodes").write_text("n7\nn3\nn7\n")
    assert submit_tiny(folder, "--chain=3").status == 0
    calls = fake.calls("sbatch")
    dependencies = [[word for word in call.split() if "dependency" in word] for call in calls]
    assert dependencies == [[], ["--dependency=afterany:101"], ["--dependency=afterany:102"]]
    assert all("--no-requeue" in call and "--exclude=n3,n7" in call for call in calls)
    assert [entry.job for entry in RunDirectory(folder / "run").submissions()] == [101, 102, 103]
    assert _variables(folder)["EROLLOUT_REQUEUE"] == "0"
    assert RunDirectory(folder / "run").verdict() is None, "the jobs would take it for theirs, and end at once"


def test_spare_nodes(folder: Path, fake: FakeSlurm) -> None:
    assert submit_tiny(folder, "--spare-nodes=1").status == 0
    assert "--nodes=3" in _command(folder) and _variables(folder)["EROLLOUT_SPARES"] == "1"


def test_a_run_without_checkpoints_is_started_once(folder: Path, fake: FakeSlurm) -> None:
    assert submit_tiny(folder, "--", "checkpoint.interval=0").status == 0
    assert {"--no-requeue", "--signal=B:USR1@0"} < set(_command(folder)), "without it, the script's own signal ends the run"


@pytest.mark.parametrize(("time", "grace"), [(None, 300), ("1:00:00", 300), ("4", 60), ("2-0", 300)])
def test_default_grace(folder: Path, fake: FakeSlurm, time: str | None, grace: int) -> None:
    assert submit_tiny(folder, *([f"--time={time}"] if time else [])).status == 0
    assert f"--signal=B:USR1@{grace}" in _command(folder)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:05", 3605), ("2-3", 183600), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


REFUSED = [
    (["--", "parallel.world_size=4"], "parallel.world_size = 4, but 2 nodes of 4 ranks are 8"),
    (["--", "parallel.tensor_model_parallel_size=3"], "does not divide the world of 8 ranks"),
    (["--", "rollout.tensor_model_parallel_size=16"], "rollout.tensor_model_parallel_size = 16 does not divide"),
    (["--nodes=0"], "--nodes = 0"),
    (["--chain=0"], "--chain = 0"),
    (["--spare-nodes=-1"], "--spare-nodes = -1"),
    (["--max-requeues=-1"], "--max-requeues = -1"),
    (["--spare-nodes=1", "--no-preflight"], "--spare-nodes = 1"),
    (["--time=5", "--grace=241"], "--time = 5 is too short for --grace = 241 s"),
    (["--time=1"], "--time = 1 is too short"),
    (["--time=soon"], "--time = soon"),
    (["--grace=60", "--", "checkpoint.interval=0"], "--grace = 60"),
    (["--chain=2", "--", "checkpoint.interval=0"], "--chain = 2"),
    (["--", "data.kind=file", "data.train_files=[nowhere.jsonl]"], "nowhere.jsonl does not exist"),
    (["--", "rewards.function=no_such_module:f"], "no module no_such_module"),
    (["--site=/nowhere.yaml"], "--site = /nowhere.yaml"),
    (["--run-dir=/dev/null/x"], "/dev/null/x can't be a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_refused_before_anything_is_written(folder: Path, fake: FakeSlurm, arguments: list[str], message: str) -> None:
    outcome = submit_tiny(folder, *arguments)
    assert outcome.status == 2 and message in outcome.error()
    assert not (folder / "run").exists() and not fake.calls("sbatch")


def test_a_place_that_takes_nothing(folder: Path, fake: FakeSlurm) -> None:
    assert "train.output_dir = /proc/x can't be written" in submit_tiny(folder, "--run-dir=/proc/x").error()


def test_a_dry_run_writes_nothing_and_says_all(folder: Path, fake: FakeSlurm) -> None:
    site = "--site=slurm/sites/gpus-per-node.yaml"
    outcome = submit_tiny(
        folder, "--nodes=64", "--time=24:00:00", f"--site={ROOT}/{site[7:]}", "--dry-run", size="--gpus-per-node=8"
    )
    assert outcome.status == 0, outcome.stderr
    page = outcome.stdout
    for words in (
        "64, each with 8 GPUs, a rank for each: 512 ranks",
        "12,288 at most for each start: 512 GPUs x 24:00:00",
        "data 512",
        "300 s before it the run saves and ends; requeued",
        "  --gpus-per-node=h100:8 \\\n",
        "export EROLLOUT_RANKS_PER_NODE=8\n",
        "module load cuda",
        plan.batch_script().read_text().rstrip(),
        "== scheduler\nJob 7 to start at noon",
    ):
        assert words in page, page
    assert not (folder / "run").exists()
    (asked,) = fake.calls("sbatch")
    assert asked.startswith("--test-only --parsable") and f"{plan.batch_script()} {folder}/run --config" in asked


def test_a_dry_run_that_the_scheduler_would_refuse(folder: Path, fake: FakeSlurm) -> None:
    fake.refuses("Requested node configuration is not available")
    outcome = submit_tiny(folder, "--dry-run")
    assert "the scheduler would reject the job: allocation failure: Requested node" in outcome.error()
    assert "== command" in outcome.stdout


def test_a_dry_run_without_a_scheduler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = submit_tiny(folder, "--dry-run")
    assert outcome.status == 0 and "not asked: scontrol is not found" in outcome.stdout, outcome.stderr


def test_no_second_job_of_a_run(folder: Path, fake: FakeSlurm) -> None:
    assert submit_tiny(folder).status == 0
    run = folder / "run"
    fake.holds((101, "RUNNING", run))
    assert f"job 101 of {run} is RUNNING on n[1-2], 0:10 of 1:00:00" in submit_tiny(folder).error()
    assert "job 101" in invoke("launch", "requeue", str(run)).error()
    fake.holds((101, "COMPLETED", run), (7, "PENDING", run))  # by hand, or recorded nowhere
    assert "job 7 of" in submit_tiny(folder).error()
    fake.holds((101, "COMPLETED", run), (7, "PENDING", Path("/elsewhere")))
    assert submit_tiny(folder).status == 0


def test_a_busy_controller_is_asked_again(folder: Path, fake: FakeSlurm) -> None:
    fake.fails(1, "Batch job submission failed: Unable to contact slurm controller (connect failure)")
    fake.fails(2, "Batch job submission failed: Resource temporarily unavailable")
    assert "job 103 of" in submit_tiny(folder).stdout


def test_a_controller_that_stays_busy(folder: Path, fake: FakeSlurm) -> None:
    for number in range(1, 9):
        fake.fails(number, "Unable to contact slurm controller")
    assert "sbatch: Unable to contact" in submit_tiny(folder).error()
    assert len(fake.calls("sbatch")) == 4 and RunDirectory(folder / "run").submissions() == []


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(folder: Path, fake: FakeSlurm) -> None:
    fake.fails(1, "Batch job submission failed: Socket timed out on send/recv operation")
    (fake.folder / "squeue").write_text(  # it appears when the answer is lost
        f'#!/bin/bash\n[ "$(cat {fake.folder}/count)" = 0 ] || echo "55|PENDING|0|None||0:00|1:00|N/A|{folder}/run"\n'
    )
    outcome = submit_tiny(folder)
    assert "job 55 of" in outcome.stdout, outcome.stderr
    assert len(fake.calls("sbatch")) == 1


def test_what_sbatch_says_beside_the_id(folder: Path, fake: FakeSlurm) -> None:
    """A site's own sbatch may greet, and a federation adds its name."""
    text = (fake.folder / "sbatch").read_text().replace("echo $((100", "echo 'Welcome to 7 nodes'; echo $((100")
    (fake.folder / "sbatch").write_text(text.replace("+ count))", "+ count))';here'"))
    assert "job 101 of" in submit_tiny(folder).stdout
    assert [entry.job for entry in RunDirectory(folder / "run").submissions()] == [101]


def test_a_submission_from_within_another_job(folder: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPU_BIND", "SLURM_MEM_PER_NODE", "SLURM_RESTART_COUNT", "SRUN_CPUS_PER_TASK", "PMI_RANK"):
        monkeypatch.setenv(name, "1")
    kept = ("SLURM_CONF", "SLURM_JWT", "SBATCH_ACCOUNT", "MY_TOKEN")
    for name in kept:
        monkeypatch.setenv(name, "kept")
    script = (fake.folder / "sbatch").read_text()
    (fake.folder / "sbatch").write_text(script.replace("count=", "env > environment; count=", 1))
    assert submit_tiny(folder).status == 0
    seen = (fake.folder / "environment").read_text().splitlines()
    assert {f"{name}=kept" for name in kept} < set(seen)
    assert not [line for line in seen if line.startswith(("SLURM_CPU", "SLURM_MEM", "SLURM_RES", "SRUN", "PMI"))]


def test_what_the_job_reads_is_its_own(folder: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that are not set for it are empty, whatever the shell that submits has set."""
    assert submit_tiny(folder).status == 0
    empty = {name for name, value in _variables(folder).items() if name.startswith("EROLLOUT_") and not value}
    assert {"EROLLOUT_SPARES", "EROLLOUT_CONTAINER", "EROLLOUT_SETUP", "EROLLOUT_INTERFACE"} < empty


def test_a_submission_that_fails_leaves_the_run_as_it_was(folder: Path, fake: FakeSlurm) -> None:
    assert submit_tiny(folder, "--", "train.steps=7").status == 0
    fake.holds((101, "COMPLETED", folder / "run"))
    (folder / "run" / "verdict").write_text("done\n")
    before = {path: path.read_bytes() for path in (folder / "run").glob("*") if path.is_file()}
    fake.fails(2, "invalid partition specified: x")
    assert submit_tiny(folder, "--chain=2", "--", "train.steps=9").status == 2
    assert {path: path.read_bytes() for path in (folder / "run").glob("*") if path.is_file()} == before
    fake.fails(3, "Unable to contact slurm controller")  # it may have taken the job, and then that reads what is new
    (fake.folder / "squeue").write_text("#!/bin/bash\ntrue\n")
    for number in (4, 5, 6):
        fake.fails(number, "Unable to contact slurm controller")
    assert submit_tiny(folder, "--", "train.steps=8").status == 2
    assert load_config(folder / "run" / "config.yaml").train.steps == 8
    fake.fails(8, "invalid partition specified: x")  # the second of a chain: the first one is there, and reads what is new
    assert submit_tiny(folder, "--chain=2", "--", "train.steps=9").status == 2
    assert load_config(folder / "run" / "config.yaml").train.steps == 9


def test_a_link_to_the_run_directory_is_followed(folder: Path, fake: FakeSlurm) -> None:
    """Containers have the place itself, under its own name."""
    (folder / "scratch").mkdir()
    (folder / "link").symlink_to(folder / "scratch")
    assert submit_tiny(folder, f"--run-dir={folder}/link/it").status == 0
    real = folder / "scratch" / "it"
    (entry,) = RunDirectory(real).submissions()
    assert not [word for word in (*entry.command, entry.code) if "/link/" in word] and "/link/" not in str(_environment(real))
    fake.holds((101, "RUNNING", real))
    assert "job 101 of" in invoke("launch", "requeue", f"{folder}/link/it").error()


def _environment(run: Path) -> str:
    return (run / "job.env").read_text()


@pytest.mark.parametrize("name", ["HF_TOKEN", "PGPASSWORD", "WANDB_APIKEY", "GITHUB_PAT", "AWS_SECRET_ACCESS_KEY"])
def test_secrets_of_a_site(folder: Path, fake: FakeSlurm, name: str) -> None:
    assert f"env.{name} looks like a secret" in submit_tiny(folder, _site(folder, env={name: "x"})).error()


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PATH_TO_DATA", "KEYBOARD", "NCCL_IB_PKEY"])
def test_no_secrets_of_a_site(folder: Path, fake: FakeSlurm, name: str) -> None:
    assert submit_tiny(folder, _site(folder, env={name: "x"})).status == 0


def test_a_job_whose_nodes_are_being_started_is_cancelled(folder: Path, fake: FakeSlurm) -> None:
    """No batch script hears a signal yet."""
    assert submit_tiny(folder).status == 0
    fake.holds((101, "CONFIGURING", folder / "run"))
    assert "job 101 is cancelled" in invoke("launch", "stop", str(folder / "run")).stdout
    assert fake.calls("scancel") == ["101"]


def test_a_refused_job_is_not_submitted_again(folder: Path, fake: FakeSlurm) -> None:
    fake.fails(1, "invalid partition specified: x")
    assert "sbatch: invalid partition specified: x" in submit_tiny(folder).error()
    assert len(fake.calls("sbatch")) == 1


def test_a_command_that_hangs(folder: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake.folder / "squeue").write_text("#!/bin/bash\nexec sleep 30\n")
    monkeypatch.setattr(slurm_jobs, "_ANSWER_SECONDS", 0.2)
    assert "squeue timed out after 0.2 s" in submit_tiny(folder).error()
