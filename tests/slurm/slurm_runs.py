"""The test cluster and the runs on it, as tests see them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from commands import ENVIRONMENT, Outcome
from tiny_runs import history, tiny_tree

from erollout.checkpoint.manifest import complete_checkpoints
from erollout.tracking.journal import Journal, journal_path

HERE = Path(__file__).parent
SBATCH = HERE.parents[1] / "slurm"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}
SECONDS = 280
"""Bound of waiting for a run: a start takes about ten seconds on a free machine, and tests share two cores with others."""
COMMAND_SECONDS = 120
NOT_INSTALLED = 3
"""Exit status of `cluster up`."""
STEPS, INTERVAL = 16, 4
"""Steps and checkpoint interval of most runs here, and of the undisturbed reference run: eight seconds to disturb them."""
UNCHECKED = "--no-preflight"
AT_ONCE = {"function": "toy_scorer:share_of_digits"}
"""The same scores as the unhurried ones."""


@dataclass(frozen=True, slots=True)
class Job:
    """What Slurm says of a job."""

    state: str
    restarts: int
    exit_status: int
    nodes: tuple[str, ...]
    fields: dict[str, str]
    """All that `scontrol show job` prints."""


class Cluster:
    """A running cluster; commands are run on its login node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = ENVIRONMENT | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")])),
            "EROLLOUT_PYTHON": sys.executable,
        }
        self.is_flat, self.keeper = False, 0

    def up(self, *options: str) -> None:
        """Raises Unavailable where Slurm is not installed."""
        done = self._cluster("up", f"--owner={os.getpid()}", *options)
        if done.status == NOT_INSTALLED:
            raise Unavailable(done.stderr)
        assert done.status == 0, done.stderr
        kept = json.loads((self.directory / "run" / "keeper.json").read_text())
        self.is_flat, self.keeper = kept["flat"], int(kept["pid"])

    def down(self) -> None:
        self.change("down")

    def change(self, name: str, *words: str) -> None:
        """`crash`, `heal`, `cut`, ...: see `cluster`."""
        done = self._cluster(name, *words)
        assert done.status == 0, done.stderr

    def run(self, *command: str, node: str | None = None) -> Outcome:
        """A command on the login node, or on another."""
        return self._cluster("enter", *([node] if node else []), "--", *command)

    @contextmanager
    def started(self, *command: str, node: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A command on a node, running in the block. The process has entered the node, and the command is its child."""
        with open(output, "a") as file:
            arguments = self._command("enter", node, "--", *command)
            process = subprocess.Popen(arguments, env=self.environment, stdout=file, stderr=file)
        try:
            yield process
        finally:
            if process.poll() is None:
                for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                    left.kill()
            process.wait()

    def output(self, *command: str) -> str:
        """Output of a command that must succeed."""
        done = self.run(*command)
        assert done.status == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def erollout(self, *arguments: str | Path) -> Outcome:
        return self.run(sys.executable, "-m", "erollout.cli", *map(str, arguments))

    def submit(self, *arguments: str | Path, **environment: str) -> int:
        """`sbatch ARGUMENTS`; the job's id."""
        variables = [f"{name}={value}" for name, value in environment.items()]
        return int(self.output("env", *variables, "sbatch", "--parsable", *map(str, arguments)))

    def launch(self, run: "Run", *options: str) -> int:
        """`erollout launch slurm` on two nodes of one rank; the job's id."""
        where = ["--nodes", "2", "--ranks-per-node", "1", "--config", str(run.config)]
        done = self.erollout("launch", "slurm", *where, *options)
        assert done.status == 0, done.stdout + done.stderr
        return run.jobs[-1]

    def job(self, job: int) -> Job:
        words = self.output("scontrol", "show", "job", str(job), "--oneliner").split(" ")
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        nodes = fields.get("NodeList", "(null)")
        names = () if nodes in ("(null)", "") else tuple(self.output("scontrol", "show", "hostnames", nodes).split())
        return Job(fields["JobState"], int(fields["Restarts"]), int(fields["ExitCode"].partition(":")[0]), names, fields)

    def wait(self, job: int, *states: str, seconds: float = SECONDS) -> Job:
        """Until the job is in one of the states; none given: until it has ended for good."""
        wanted = set(states) or ENDED
        wait_for(lambda: self.job(job).state in wanted, f"job {job} is not {'/'.join(sorted(wanted))}", seconds, self.logs(job))
        return self.job(job)

    def reach(self, job: int, run: "Run", step: int) -> None:
        """Until the run has done so many steps. Fails when the job ends without."""

        def done() -> bool:
            reached = max(run.steps, default=0) >= step
            assert reached or self.job(job).state not in ENDED, f"job {job} ends before step {step}\n{self.logs(job)()}"
            return reached

        wait_for(done, f"step {step} is not done", SECONDS, self.logs(job))

    def processes(self, job: int, *words: str, node: str | None = None) -> list[psutil.Process]:
        """Processes of a job, on all nodes or one, whose command line contains the words."""
        found = []
        for process in psutil.process_iter():
            try:
                variables, line = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            ours = variables.get("SLURM_CONF") == str(self.directory / "run" / "slurm.conf")
            if ours and variables.get("SLURM_JOB_ID") == str(job) and all(word in line for word in words):
                found += [process] if node in (None, variables.get("SLURMD_NODENAME")) else []
        return found

    def ranks(self, job: int, node: str | None = None) -> list[psutil.Process]:
        """The trainers of a job, by rank."""
        found = [process for process in self.processes(job, "train", node=node) if "RANK" in process.environ()]
        ranks = {int(process.environ()["RANK"]): process for process in found if process.parent() not in found}
        return [ranks[rank] for rank in sorted(ranks)]

    def logs(self, job: int) -> Callable[[], str]:
        """Reads the end of what the job has printed."""

        def read() -> str:
            file = Path(self.job(job).fields["StdOut"])
            texts = [file, *sorted(file.parent.glob(f"logs/{job}.*/*.out"))]
            return "\n".join(f"== {text}\n{text.read_text(errors='replace')[-3000:]}" for text in texts if text.is_file())

        return read

    def restore(self) -> None:
        """No jobs, all nodes up and idle."""
        self.run("scancel", "--full", "--user", str(os.getuid()))
        for name in self.output("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split():
            if not (self.directory / "run" / f"{name}.pid").exists():
                self.change("heal", name)
        wait_for(self._is_idle, "nodes do not become idle", 90)

    def _is_idle(self) -> bool:
        for line in self.output("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
            name, state = line.split()
            if state.startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume")
            if state != "idle":
                return False
        return True

    def _cluster(self, name: str, *words: str) -> Outcome:
        command = self._command(name, *words)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def _command(self, name: str, *words: str) -> list[str]:
        return [sys.executable, str(HERE / "cluster"), name, f"--dir={self.directory}", *words]


class Unavailable(Exception):
    """What is missing on this machine, and how to install it."""


class Run:
    """A run of the tiny model in a folder of the test."""

    def __init__(self, folder: Path, steps: int, interval: int = 4, **sections: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.directory = folder, folder / "run"
        ours: dict[str, dict[str, Any]] = {
            "train": {"steps": steps},
            "checkpoint": {"interval": interval, "export_path": str(folder / "exported")},
            "rewards": {"function": "unhurried_scorer:half_a_second"},
        }
        sections = {name: ours.get(name, {}) | sections.get(name, {}) for name in ours | sections}
        self.tree = tiny_tree(folder, **sections)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(self.tree))

    @property
    def verdict(self) -> str | None:
        file = self.directory / "verdict"
        return file.read_text().strip() if file.exists() else None

    @property
    def jobs(self) -> list[int]:
        """Submitted by the launcher, oldest first."""
        return [json.loads(line)["job"] for line in (self.directory / "jobs.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the complete ones."""
        return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(self.directory / "checkpoints")]

    @property
    def steps(self) -> list[int]:
        """In the order in which they were done: those that were lost are there twice."""
        if not journal_path(self.directory).exists():
            return []
        journal = Journal(journal_path(self.directory))
        records = journal.records()
        journal.close()
        return [record["step"] for record in records if "reward/mean" in record.get("values", {}) | record.get("repeated", {})]

    def wait_for_step(self, step: int, seconds: float = SECONDS, why: Callable[[], str] = str) -> None:
        wait_for(lambda: max(self.steps, default=0) >= step, f"step {step} is not done", seconds, why)

    def assert_equal(self, unbroken: "Run") -> None:
        """Parameters bit for bit, and the same steps."""
        ours, theirs = ((run.folder / "exported" / "model.safetensors").read_bytes() for run in (self, unbroken))
        assert ours == theirs, "the parameters differ"
        mine, wanted = history(self.folder), history(unbroken.folder)
        for name in ("step", "train/loss", "train/grad_norm", "reward/mean", "response_length/mean"):
            assert [row[name] for row in mine] == [row[name] for row in wanted], name

    def lost(self) -> int:
        """Steps that were done more than once."""
        return len(self.steps) - len(set(self.steps))


def wait_for(condition: Callable[[], bool], message: str, seconds: float = SECONDS, why: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{message} after {seconds} s\n{why()}"
        time.sleep(0.25)


def assert_went_on(cluster: Cluster, job: int, run: Run, unbroken: Run, lost: int = INTERVAL) -> None:
    """The job was queued again once, lost at most so many steps, and ended well."""
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts, run.verdict) == ("COMPLETED", 1, "done"), cluster.logs(job)()
    assert run.lost() <= lost
    run.assert_equal(unbroken)
