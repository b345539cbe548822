"""The directory of a run on a cluster: files of the launcher, the batch script and the trainer.

It is `train.output_dir`, on a filesystem shared by all nodes.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from erollout.checkpoint.manifest import complete_checkpoints
from erollout.config import LOCATIONS, Config, build_config, load_config
from erollout.errors import UserError
from erollout.resilience.watchdog import Heartbeat, read_heartbeats
from erollout.tracking.address import quote_path

_READ = LOCATIONS[:5]
VERDICT = "verdict"
_RELATIVE_STORE = re.compile(r"(?P<scheme>sqlite:///|file:)?(?P<path>(?!/|databricks)[^:]+)")


@dataclass(frozen=True, slots=True)
class Submission:
    """A line of jobs.jsonl: one job, of one `launch slurm` or `launch requeue`."""

    job: int
    submitted: str
    """Time of submission in ISO 8601."""
    chain: int
    """Number of jobs submitted with it as a chain."""
    command: tuple[str, ...]
    """sbatch with its arguments, without those that depend on other jobs."""
    code: str
    """Path of the code snapshot that it runs."""
    source: dict[str, Any] = field(default_factory=dict)
    """Source of the snapshot: commit, dirty."""


_SUBMISSION = TypeAdapter(Submission)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a job, with its logs in `directory`."""

    job: int | None
    """Slurm job id; None: a Ray run."""
    number: int
    directory: Path


@dataclass(frozen=True, slots=True)
class RunDirectory:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def script(self) -> Path:
        return self.path / "train.sbatch"

    @property
    def environment(self) -> Path:
        return self.path / "job.env"

    @property
    def setup(self) -> Path:
        return self.path / "setup.sh"

    @property
    def code(self) -> Path:
        return self.path / "code"

    def output(self, job: int | None) -> Path:
        """Path of the batch script's output; without a job, the log directory."""
        return self.path / (f"slurm-{job}.out" if job is not None else "logs")

    def verdict(self) -> str | None:
        """Verdict of the last attempt; None while it runs and after a crash."""
        text = self._text(VERDICT)
        return text.strip() if text is not None else None

    def bad_nodes(self) -> list[str]:
        return sorted(set((self._text("bad_nodes") or "").split()))

    def submissions(self) -> list[Submission]:
        """Submissions, oldest first. Raises UserError for an invalid line."""
        found = []
        for number, line in enumerate((self._text("jobs.jsonl") or "").splitlines(), start=1):
            try:
                found.append(_SUBMISSION.validate_json(line))
            except ValidationError as error:
                problem = error.errors()[0]
                words = ": ".join([*map(str, problem["loc"]), problem["msg"]])
                raise UserError(f"{self.path}/jobs.jsonl:{number} is damaged: {words}; remove that line") from None
        return found

    def _text(self, name: str) -> str | None:
        """Text of a file; None: there is none. Raises UserError if it can't be read."""
        file = self.path / name
        try:
            return file.read_text() if file.exists() else None
        except OSError as error:
            raise UserError(f"{file} can't be read: {error.strerror}; a run leaves a file there: move it away") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is damaged: it is no text ({error.reason} at byte {error.start}); remove it") from error

    def add(self, submission: Submission) -> None:
        with open(self.path / "jobs.jsonl", "a") as file:
            file.write(json.dumps(asdict(submission)) + "\n")

    def attempts(self) -> list[Attempt]:
        """Attempts, oldest first; those of Slurm before those of Ray."""
        names = sorted(path.name for path in self.path.glob("logs/*.*"))
        found = []
        for name in names:
            if match := re.fullmatch(r"(\d+|ray-[\w-]+)\.(\d+)", name):
                job = int(match[1]) if match[1].isdigit() else None
                found.append(Attempt(job, int(match[2]), self.path / "logs" / name))
        return sorted(found, key=lambda a: (a.job is None, a.job or a.directory.stem, a.number))

    def jobs(self) -> list[int]:
        """Ids of all submitted jobs, and of those submitted by hand that have started; oldest first."""
        started = {attempt.job for attempt in self.attempts() if attempt.job is not None}
        return sorted(started | {submission.job for submission in self.submissions()})

    def newest_checkpoint(self) -> Path | None:
        config = load_config(self.config) if self.config.is_file() else None
        found = complete_checkpoints(config.checkpoint_directory if config else self.path / "checkpoints")
        return found[-1] if found else None

    def heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of every rank."""
        folder = self.path / "heartbeats"
        return read_heartbeats(folder, len(list(folder.glob("rank_*.json"))))

    def require_writable(self) -> None:
        """Raise UserError unless the directory exists or can be created. Creates nothing."""
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.is_dir())
        if there != self.path and (self.path.exists() or (there / self.path.relative_to(there).parts[0]).exists()):
            raise UserError(f"train.output_dir = {self.path} can't be a directory: a file is in its way; choose another place")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"train.output_dir = {self.path} can't be written: no permission in {there}; choose another place")


def find_run(directory: str) -> RunDirectory:
    """The run in a directory given on the command line. Raises UserError if there is none."""
    path = Path(directory).expanduser().resolve()
    if not any((path / name).exists() for name in ("jobs.jsonl", "heartbeats", VERDICT, "checkpoints", "logs")):
        raise UserError(f"{path} holds no run; give the train.output_dir of one")
    return RunDirectory(path)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths, so that it can be read from any directory."""
    tree = config.to_dict()
    for key in LOCATIONS:
        section, name = key.split(".")
        tree[section][name] = _absolute(tree[section][name])
    tree["train"]["output_dir"] = str(Path(tree["train"]["output_dir"]).resolve())  # as seen by the batch script and containers
    store = _RELATIVE_STORE.fullmatch(config.tracking.uri or "")
    if store:
        here = quote_path(str(Path.cwd())) if store["scheme"] else str(Path.cwd())  # the user's part of a URI is quoted
        tree["tracking"]["uri"] = f"{store['scheme'] or ''}{here}/{store['path']}"
    return build_config(tree)


def with_scorer(config: Config, function: str | None) -> Config:
    """The configuration with another rewards.function."""
    tree = config.to_dict()
    tree["rewards"]["function"] = function
    return build_config(tree)


def dump_config(config: Config) -> str:
    """The configuration as YAML, with every key."""
    return yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False)


def require_inputs(config: Config) -> None:
    """Raise UserError, naming the key, for a missing input file."""
    for key in _READ:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        for path in [value] if isinstance(value, str) else value or ():
            if not Path(path).exists():
                raise UserError(f"{key} = {path} does not exist; it must be there before the job is submitted")


def _absolute(value: Any) -> Any:
    if isinstance(value, str):
        return str(Path(value).absolute())
    return tuple(map(_absolute, value)) if value is not None else None
