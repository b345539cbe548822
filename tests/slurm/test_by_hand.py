"""Batch files without our launcher, the launcher's other commands, and what the scheduler says to a large job."""

import json
from pathlib import Path

import pytest
from slurm_runs import ENDED, INTERVAL, SBATCH, STEPS, Cluster, Run, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]


def test_sbatch_by_hand_goes_on_when_it_is_given_again(cluster: Cluster, run: Run, unbroken: Run) -> None:
    command = [f"--output={run.folder}/%j.out", "--nodes=2", SBATCH / "train.sbatch", run.directory, "--config", run.config]
    job = cluster.submit(*command)
    cluster.reach(job, run, INTERVAL + 1)
    cluster.output("scancel", "--batch", "--signal=TERM", str(job))
    cluster.wait(job)
    assert run.verdict == "stopped" and cluster.job(job).restarts == 0
    again = cluster.submit(*command)
    assert cluster.wait(again).state == "COMPLETED" and run.verdict == "done", cluster.logs(again)()
    assert run.lost() == 0
    run.assert_equal(unbroken)


def test_stop_and_requeue(cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, "--no-preflight")
    refused = cluster.erollout("launch", "requeue", run.directory)
    assert refused.status != 0 and f"job {job}" in refused.error()
    cluster.reach(job, run, INTERVAL + 1)
    assert cluster.erollout("launch", "stop", run.directory).status == 0
    ended = cluster.wait(job)
    assert ended.restarts == 0 and run.verdict == "stopped", cluster.logs(job)()
    saved = run.checkpoints[-1]
    assert saved == max(run.steps)
    answer = cluster.erollout("launch", "requeue", run.directory)
    assert f"resumes from step_{saved:08d}" in answer.stdout, answer
    again = run.jobs[-1]
    assert cluster.wait(again).state == "COMPLETED" and run.verdict == "done", cluster.logs(again)()
    assert run.lost() == 0
    run.assert_equal(unbroken)
    refused = cluster.erollout("launch", "requeue", run.directory)
    assert refused.status != 0 and "done" in refused.error()


def test_a_chain_where_requeueing_is_forbidden(cluster: Cluster, run: Run, unbroken: Run) -> None:
    cluster.launch(run, "--no-preflight", "--chain", "3")
    first, second, third = run.jobs
    cluster.reach(first, run, INTERVAL + 1)
    cluster.output("scancel", "--batch", "--signal=USR1", str(first))
    ended = [cluster.wait(job) for job in (first, second, third)]
    assert [job.restarts for job in ended] == [0, 0, 0]
    assert ended[1].state == "COMPLETED" and run.verdict == "done", cluster.logs(second)()
    assert not list(run.directory.glob(f"logs/{third}.*/ranks/*")), "the last job had nothing to do"
    assert run.lost() == 0
    run.assert_equal(unbroken)


def test_a_job_that_waits_runs_the_code_of_its_submission(cluster: Cluster, tmp_path: Path) -> None:
    code = tmp_path / "own"
    code.mkdir()
    (code / "my_scorer.py").write_text("def score(prompt, response): return 0.25\n")
    site = tmp_path / "site.yaml"
    site.write_text(json.dumps({"options": ["--hold"]}))
    run = Run(tmp_path / "it", 1, interval=0, rewards={"function": "my_scorer:score"})
    path = f"{code}:{cluster.environment['PYTHONPATH']}"
    cluster.environment["PYTHONPATH"], before = path, cluster.environment["PYTHONPATH"]
    try:
        job = cluster.launch(run, "--no-preflight", "--site", str(site))
    finally:
        cluster.environment["PYTHONPATH"] = before
    (code / "my_scorer.py").write_text("raise RuntimeError('edited while the job waits')\n")
    cluster.output("scontrol", "release", str(job))
    assert cluster.wait(job).state == "COMPLETED", cluster.logs(job)()


def test_a_dry_run_asks_the_scheduler_about_64_nodes(cluster: Cluster, run: Run) -> None:
    site = run.folder / "site.yaml"
    site.write_text(json.dumps({"partition": "large"}))
    batch = ["--gpus-per-node", "8", "--time", "24:00:00", "--site", str(site), "--dry-run", "--config", str(run.config), "--"]
    overrides = ["rollout.prompts_per_step=512"]
    answer = cluster.erollout("launch", "slurm", "--nodes", "64", *batch, *overrides)
    assert answer.status == 0, answer.stderr
    assert "64" in answer.stdout and "on nodes big[1-64] in partition large" in answer.stdout, answer.stdout
    assert not run.directory.exists() and cluster.output("squeue", "-h", "-p", "large") == "", "something was submitted"
    refused = cluster.erollout("launch", "slurm", "--nodes", "65", *batch, *overrides)
    assert "Requested node configuration is not available" in refused.error()


def test_what_all_nodes_lack_is_not_the_nodes_fault(cluster: Cluster, run: Run) -> None:
    """What this cluster gives out as GPUs are none: no node is left out, the job ends at once, and says why."""
    done = cluster.erollout("launch", "slurm", "--nodes", "2", "--gpus-per-node", "1", "--config", run.config)
    assert done.status == 0, done.stderr
    job = run.jobs[-1]
    ended = cluster.wait(job)
    output = (run.directory / f"slurm-{job}.out").read_text()
    assert (ended.state, ended.restarts, run.steps) == ("FAILED", 0, []), output
    assert not (run.directory / "bad_nodes").exists()
    assert all(f"node {name} is bad" in output for name in ended.nodes), output


def test_an_interface_that_no_node_has_is_not_the_nodes_fault(nodes: Cluster, run: Run) -> None:
    site = run.folder / "site.yaml"
    site.write_text(json.dumps({"interface": "nowhere0"}))
    job = nodes.launch(run, "--site", str(site))
    ended = nodes.wait(job)
    output = (run.directory / f"slurm-{job}.out").read_text()
    assert (ended.state, ended.restarts, run.steps) == ("FAILED", 0, []), output
    assert "collective: on all nodes: collective: --interface = nowhere0 has no IPv4 address" in output, output
    assert not (run.directory / "bad_nodes").exists()


def test_an_array_of_benchmarks_does_what_is_missing(cluster: Cluster, tmp_path: Path) -> None:
    script, results = tmp_path / "script.py", tmp_path / "results"
    script.write_text("import sys; print('seed', sys.argv[1]); sys.exit(int(sys.argv[1]) == 2 and '--well' not in sys.argv)")
    command = [f"--output={tmp_path}/%A_%a.out", "--array=1-3%2", SBATCH / "benchmark.sbatch", results, script, "{}"]
    states = _wait_for_array(cluster, cluster.submit(*command))
    assert states == {1: "COMPLETED", 2: "FAILED", 3: "COMPLETED"}
    assert (results / "1.out").read_text() == "seed 1\n" and not (results / "2.out").exists()
    (results / "1.out").write_text("kept\n")
    assert set(_wait_for_array(cluster, cluster.submit(*command, "--well")).values()) == {"COMPLETED"}
    assert [(results / f"{number}.out").read_text() for number in (1, 2, 3)] == ["kept\n", "seed 2\n", "seed 3\n"]


def _wait_for_array(cluster: Cluster, job: int) -> dict[int, str]:
    """States of an array's elements."""

    def read() -> dict[int, str]:
        lines = cluster.output(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T"
        ).splitlines()
        return {int(element): state for element, state in map(str.split, lines)}

    wait_for(lambda: set(read().values()) <= ENDED, f"array {job} does not end")
    return read()


def test_a_run_directory_is_one_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """A second job and an array are refused, and leave what is there as it is."""
    run = Run(tmp_path / "it", STEPS, INTERVAL, rewards={"function": "unhurried_scorer:a_second"})
    command = [f"--output={run.folder}/%j.out", SBATCH / "train.sbatch", run.directory, "--config", run.config]
    job = cluster.submit("--nodes=1", *command, EROLLOUT_PREFLIGHT="0")
    cluster.reach(job, run, 1)
    others = [cluster.submit("--nodes=1", *command, EROLLOUT_PREFLIGHT="0") for _ in range(2)]
    for other in others:
        assert cluster.wait(other).state == "FAILED", cluster.logs(other)()
        assert f"is in use by job {job} (RUNNING)" in (run.folder / f"{other}.out").read_text()
    assert [path.name for path in run.directory.glob("logs/*.*")] == [f"{job}.0"]
    cluster.output("scancel", "--batch", "--signal=TERM", str(job))
    cluster.wait(job)
    assert run.verdict == "stopped" and not (run.directory / "lock").exists()


def test_of_an_array_one_element_runs(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path / "it", 6, 2, rewards={"function": "unhurried_scorer:a_second"})
    options = ["--array=0-2", "--nodes=1", f"--output={run.folder}/%a.out"]
    words = [SBATCH / "train.sbatch", run.directory, "--config", run.config]
    cluster.submit(*options, *words, EROLLOUT_PREFLIGHT="0")
    outputs = [run.folder / f"{number}.out" for number in range(3)]
    ended = ("ended: verdict done", "is in use by job")
    wait_for(lambda: all(out.exists() and any(w in out.read_text() for w in ended) for out in outputs), "they don't end")
    assert sorted(next(w for w in ended if w in out.read_text()) for out in outputs) == [ended[0], ended[1], ended[1]]
    assert run.lost() == 0 and sorted(run.steps) == list(range(1, 7))
