"""Tracking against real MLflow stores: a SQLite file, and a server process that is killed and started again."""

import getpass
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from erollout.config import Config, build_config, load_config
from erollout.errors import UserError
from erollout.launch.meeting import FIRST_PORT, NUM_PORTS
from erollout.plots.style import save
from erollout.plots.training_curves import phase_seconds, response_lengths, reward_curve
from erollout.security.redaction import redact
from erollout.tracking.address import sqlite_uri
from erollout.tracking.console import StepReporter, format_duration, print_summary, print_table
from erollout.tracking.delivery import METRICS_PER_BATCH, Delivery, group_entries
from erollout.tracking.journal import Journal, JournalEntry, journal_path, read_history
from erollout.tracking.log import configure_logging
from erollout.tracking.metrics import PhaseTimer, memory_metrics, percentiles, summarize_lengths
from erollout.tracking.provenance import checkout
from erollout.tracking.recorded_run import read_run
from erollout.tracking.store import MlflowStore
from erollout.tracking.tracker import NullTracker, Tracker, create_tracker
from erollout.types import DatasetDescription

LAYOUT: dict[str, str | int | float] = {"layout": "PP2", "rollout_replicas": 2}


def make_config(output_dir: Path, **tracking: Any) -> Config:
    tree = {
        "model": {"architecture": {"model_type": "llama"}, "tokenizer": "tok"},
        "data": {"tasks": [{"name": "chain_sum"}]},
        "train": {"output_dir": str(output_dir)},
        "tracking": {"system_metrics": False, **tracking},
    }
    return build_config(tree)


def begin(output_dir: Path, run_id: str | None = None, step: int | None = None, **tracking: Any) -> tuple[Tracker, str]:
    tracker = create_tracker(rank=0)
    return tracker, tracker.start(make_config(output_dir, **tracking), LAYOUT, run_id, output_dir, step)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def steps_of(uri: str, run_id: str, name: str = "reward/mean") -> list[int]:
    return sorted(point.step for point in client(uri).get_metric_history(run_id, name))


@pytest.fixture(scope="module")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: MLflow takes seconds to make its tables."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def output_dir(tmp_path: Path, sqlite_template: Path) -> Path:
    """An output directory whose default store has its tables already."""
    shutil.copy(sqlite_template, tmp_path / "mlflow.db")
    return tmp_path


def _free_port() -> int:
    """Below those that the kernel gives to others: it stays free while the server is away."""
    while True:
        with suppress(OSError), socket.socket() as probe:
            port = secrets.choice(range(FIRST_PORT, FIRST_PORT + NUM_PORTS))
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """`mlflow server` on a fixed free port; ended with its workers by their process group."""

    def __init__(self, directory: Path) -> None:
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.directory = directory

    def start(self) -> None:
        command = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = [
            "--backend-store-uri",
            f"sqlite:///{self.directory}/server.db",
            "--artifacts-destination",
            f"{self.directory}/files",
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.directory / "server.log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command, *stores],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while not self._answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                pytest.fail(f"mlflow server did not start: {(self.directory / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    shutil.copy(sqlite_template, directory / "server.db")
    running = Server(directory)
    running.start()
    yield running
    running.kill()


# --- a whole run in the SQLite store ---------------------------------------------------------------------------------------


HALF_MADE = """
import os, sys, threading, time
from contextlib import closing, suppress
from pathlib import Path
from erollout.tracking.store import MlflowStore
folder = Path(sys.argv[1])
def end():
    while True:
        with suppress(FileNotFoundError):  # SQLite's journal comes and goes
            if any(file.stat().st_size for file in folder.iterdir()):
                break
        time.sleep(0.0005)
    os._exit(9)
threading.Thread(target=end, daemon=True).start()
MlflowStore(f"sqlite:///{folder}/mlflow.db").check()
"""


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HALF_MADE, str(tmp_path)], timeout=200, check=False)
    assert done.returncode == 9 and not (tmp_path / "mlflow.db").exists() and list(tmp_path.iterdir())
    MlflowStore(f"sqlite:///{tmp_path}/mlflow.db").check()
    assert (tmp_path / "mlflow.db").exists()
    assert client(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()


def test_sqlite_run_holds_params_metrics_tags_samples_files_and_lineage(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from matplotlib.figure import Figure

    config = make_config(output_dir, run_name="first")
    tracker = create_tracker(0)
    run_id = tracker.start(config, LAYOUT, None, output_dir)
    tracker.log_config_artifacts(config, LAYOUT)
    tracker.log_metrics(1, {"reward/mean": 0.25, "mismatch/max_ratio": math.inf, "mismatch/kl": math.nan, "odd@name": 1})
    tracker.log_samples(1, [{"prompt": "1+1=", "response": "2", "reward": 1.0, "finish_reason": "stop"}])
    tracker.log_samples(2, [{"prompt": "1+2=", "response": "four", "reward": 0.0, "finish_reason": "length"}])
    tracker.log_figure("reward", Figure())
    columns = {"question": "string", "answer": "long", "terms": "array"}
    dataset = DatasetDescription("chain_sum", "x" * 5000, 1000, columns, "seed-20000000")  # longer than any path
    tracker.log_dataset(dataset, "training")
    tracker.finish("FINISHED")

    store = client(f"sqlite:///{output_dir}/mlflow.db")
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert run.data.params["rollout.group_size"] == "8" and run.data.params["resolved.layout"] == "PP2"
    assert run.data.metrics["reward/mean"] == 0.25 and run.data.metrics["odd_name"] == 1
    assert math.isnan(run.data.metrics["mismatch/kl"]) and run.data.metrics["mismatch/max_ratio"] > 1e300
    assert run.data.tags["erollout.attempt"] == "1" and run.data.tags["erollout.version"]
    (lineage,) = run.inputs.dataset_inputs
    assert (lineage.dataset.name, lineage.dataset.digest) == ("chain_sum", "seed-20000000")
    assert json.loads(lineage.dataset.profile) == {"num_rows": 1000}
    assert [column["type"] for column in json.loads(lineage.dataset.schema)["mlflow_colspec"]] == ["string", "long", "string"]
    assert {tag.key: tag.value for tag in lineage.tags} == {"mlflow.data.context": "training"}
    assert run.data.tags["mlflow.source.name"].startswith("erollout") and run.data.tags["mlflow.source.type"] == "LOCAL"
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    assert store.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which the next line sets
    mlflow.set_tracking_uri(f"sqlite:///{output_dir}/mlflow.db")  # load_table looks only there
    table = store.load_table(run.info.experiment_id, "samples.json", run_ids=[run_id])
    assert table.to_dict("records")[1] == {
        "step": 2,
        "split": "evaluation",
        "prompt": "1+2=",
        "response": "four",
        "reward": 0.0,
        "finish_reason": "length",
    }
    saved = load_config(store.download_artifacts(run_id, "config/config.yaml", str(output_dir)))
    assert saved == config
    assert [file.path for file in store.list_artifacts(run_id, "figures")] == ["figures/reward.png"]
    assert (output_dir / "mlartifacts").is_dir()


def test_samples_of_a_step_that_is_run_again_are_replaced(tmp_path: Path) -> None:
    tracker, _ = begin(tmp_path, enabled=False)
    tracker.log_samples(0, [{"response": "a"}])
    tracker.log_samples(5, [{"response": "b"}, {"response": "c"}])
    tracker.log_samples(5, [{"response": "e"}], "training")
    tracker.log_samples(5, [{"response": "d", "reward": 1.0}])
    tracker.log_samples(5, [], "training")
    tracker.finish("FINISHED")
    table = json.loads((tmp_path / "tracking" / "samples.json").read_text())
    assert table["columns"] == ["step", "split", "response", "reward"]
    assert table["data"] == [[0, "evaluation", "a", None], [5, "training", "e", None], [5, "evaluation", "d", 1.0]]


def test_resumed_run_goes_on_and_repeats_no_step(output_dir: Path) -> None:
    uri = f"sqlite:///{output_dir}/mlflow.db"
    tracker, run_id = begin(output_dir)
    for step in range(1, 8):
        tracker.log_metrics(step, {"reward/mean": step / 10})
    tracker.finish("KILLED")

    tracker, again = begin(output_dir, run_id, num_sample_rollouts=3)
    for step in range(5, 11):  # the checkpoint was of step 4
        tracker.log_metrics(step, {"reward/mean": step / 100})
    tracker.finish("FINISHED")

    assert again == run_id
    assert steps_of(uri, run_id) == list(range(1, 11))
    run = client(uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags["erollout.attempt"] == "2"
    assert run.data.params["tracking.num_sample_rollouts"] == "8"
    assert json.loads(run.data.tags["erollout.changed_in_attempt_2"]) == {"tracking.num_sample_rollouts": "3"}
    history = read_history(journal_path(output_dir))
    assert [row["reward/mean"] for row in history] == [0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1]


def test_what_was_recorded_after_the_checkpoint_is_forgotten_and_made_again(output_dir: Path) -> None:
    """The third attempt ends before the second one's last step, which MLflow alone still has."""
    uri = f"sqlite:///{output_dir}/mlflow.db"
    run_id = None
    for attempt, steps in enumerate(([1, 2, 3, 4, 5], [3, 4, 5, 6], [5])):
        tracker, run_id = begin(output_dir, run_id, steps[0] - 1)
        for step in steps:
            tracker.log_metrics(step, {"reward/mean": step + attempt / 10})
            tracker.log_samples(step, [{"response": f"{step} in attempt {attempt}"}])
        tracker.finish("KILLED")
    history = read_history(journal_path(output_dir))
    assert [row["reward/mean"] for row in history] == [1.0, 2.0, 3.1, 4.1, 5.2]
    assert run_id is not None
    assert steps_of(uri, run_id) == [1, 2, 3, 4, 5, 6]
    table = json.loads(Path(client(uri).download_artifacts(run_id, "samples.json", str(output_dir))).read_text())
    assert [row[-1][-1] for row in table["data"]] == ["0", "0", "1", "1", "2"]


def test_every_attempt_leaves_its_facts(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{output_dir}/mlflow.db"
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    tracker, run_id = begin(output_dir, step=0)
    tracker.finish("KILLED")
    assert client(uri).get_run(run_id).info.status == "KILLED"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    tracker, _ = begin(output_dir, run_id, step=4)
    wait_until(lambda: client(uri).get_run(run_id).info.status == "RUNNING")
    tracker.finish("FINISHED")
    run = client(uri).get_run(run_id)
    first, second = (json.loads(run.data.tags[f"erollout.attempt_{attempt}"]) for attempt in (1, 2))
    assert run.data.tags["erollout.attempt"] == "2" and run.info.status == "FINISHED"
    assert "job" not in first and "checkpoint" not in first
    assert second["job"] == "slurm 17, restart 2" and second["checkpoint"] == f"{output_dir}/checkpoints/step_00000004"
    assert first["host"] == second["host"] == socket.gethostname() and first["started"] <= second["started"]


def test_a_copy_of_the_package_says_of_which_commit_it_is(tmp_path: Path) -> None:
    assert checkout(tmp_path) == ("", False)
    (tmp_path / "source.json").write_text('{"commit": "abc", "dirty": true}')
    assert checkout(tmp_path) == ("abc", True)


def test_new_run_in_a_used_directory_moves_the_old_records_aside(output_dir: Path) -> None:
    tracker, old = begin(output_dir)
    tracker.log_metrics(1, {"reward/mean": 0.5})
    tracker.log_saved(1)  # no finish: as if the process had been killed, and the checkpoints were removed since
    tracker, new = begin(output_dir)
    tracker.log_metrics(1, {"reward/mean": 0.7})
    tracker.finish("FINISHED")
    assert old != new
    assert read_history(journal_path(output_dir)) == [{"step": 1, "reward/mean": 0.7}]
    assert read_history(output_dir / f"tracking-{old}" / "metrics.jsonl") == [{"step": 1, "reward/mean": 0.5}]
    assert client(f"sqlite:///{output_dir}/mlflow.db").get_run(old).info.status == "KILLED"


def test_a_kill_before_the_first_checkpoint_begins_no_other_run(output_dir: Path) -> None:
    uri = f"sqlite:///{output_dir}/mlflow.db"
    tracker, run_id = begin(output_dir, step=0)
    tracker.log_metrics(1, {"reward/mean": 0.5})  # and no more
    tracker, again = begin(output_dir, step=0)
    for step in (1, 2):
        tracker.log_metrics(step, {"reward/mean": step / 2})
    tracker.finish("FINISHED")
    assert again == run_id and steps_of(uri, run_id) == [1, 2] and client(uri).get_run(run_id).info.status == "FINISHED"
    assert read_history(journal_path(output_dir)) == [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 1.0}]
    assert [run.info.run_id for run in client(uri).search_runs(["1"])] == [run_id]
    _, another = begin(output_dir, step=0)  # it is over: this is a new one
    assert another != run_id


def test_a_kill_before_the_runs_id_is_heard_begins_no_other_run(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Stands for a kill of the process."""

    create = MlflowStore.create_run

    def killed_after(self: MlflowStore, *args: Any) -> str:
        create(self, *args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MlflowStore, "create_run", killed_after)
        begin(output_dir)
    (made,) = client(f"sqlite:///{output_dir}/mlflow.db").search_runs(["1"])
    tracker, run_id = begin(output_dir)
    tracker.finish("FINISHED")
    assert run_id == made.info.run_id


@pytest.mark.parametrize("back", ["the same file", "another file"])
def test_a_damaged_store_that_is_put_back_gets_what_it_has_not_confirmed(
    output_dir: Path, back: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erollout.tracking.tracker.Delivery", partial(Delivery, interval=0.05, longest_pause=0.2))
    database = output_dir / "mlflow.db"
    uri = f"sqlite:///{database}"
    tracker, run_id = begin(output_dir)
    tracker.log_metrics(1, {"reward/mean": 0.1})
    wait_until(lambda: steps_of(uri, run_id) == [1])
    contents = database.read_bytes()
    database.write_bytes(b"no database at all " * 1000)
    tracker.log_metrics(2, {"reward/mean": 0.2})
    tracker.log_samples(2, [{"response": "of that step"}])
    delivery = tracker._delivery  # type: ignore[attr-defined]
    wait_until(lambda: delivery._away)
    if back == "another file":
        (output_dir / "kept").write_bytes(contents)
        (output_dir / "kept").rename(database)
    else:
        database.write_bytes(contents)
    tracker.log_metrics(3, {"reward/mean": 0.3})
    tracker.finish("FINISHED")
    assert steps_of(uri, run_id) == [1, 2, 3] and not delivery.rejected
    assert "of that step" in Path(client(uri).download_artifacts(run_id, "samples.json", str(output_dir))).read_text()


@pytest.mark.parametrize("name", ["run?x=1", "a%20b", "a%41b", "two\nlines", "lr=1e-3 #2; x&y ünï"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    tracker, run_id = begin(folder)
    tracker.log_metrics(1, {"reward/mean": 0.5})
    tracker.log_samples(1, [{"response": "two"}])
    tracker.finish("FINISHED")
    uri = sqlite_uri(folder / "mlflow.db")
    assert (folder / "mlflow.db").is_file() and [path.name for path in tmp_path.iterdir()] == [name]
    assert steps_of(uri, run_id) == [1] and client(uri).get_run(run_id).info.status == "FINISHED"
    assert "two" in Path(client(uri).download_artifacts(run_id, "samples.json", str(tmp_path))).read_text()
    assert (folder / "mlartifacts").is_dir()


def test_the_environment_names_the_store_where_the_configuration_does_not(
    tmp_path: Path, output_dir: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    central = tmp_path / "central.db"
    shutil.copy(sqlite_template, central)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{central}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    tracker, run_id = begin(output_dir)
    tracker.finish("FINISHED")
    assert client(f"sqlite:///{central}").get_run(run_id).info.status == "FINISHED"
    assert "MLFLOW_EXPERIMENT_NAME = theirs is ignored; set tracking.experiment" in caplog.text
    tracker, other = begin(tmp_path / "other", uri=f"sqlite:///{output_dir}/mlflow.db")
    tracker.finish("FINISHED")
    assert client(f"sqlite:///{output_dir}/mlflow.db").get_run(other).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://here")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI = gopher://here can't be used"):
        begin(tmp_path / "third")


def test_what_killed_makers_of_a_database_have_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = f"mlflow.db.{socket.gethostname()}"
    names = (f"{mine}.{gone.pid}.partial", f"{mine}.{gone.pid}.partial-journal", "mlflow.db.elsewhere.1.partial")
    for name in (*names, f"{mine}.{os.getppid()}.partial", "mlflow.db.of-now.1.partial"):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / names[-1], (0, 0))
    locks = len(list(Path(tempfile.gettempdir()).glob("db_init_lock-*")))
    MlflowStore(f"sqlite:///{tmp_path}/mlflow.db").check()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mlflow.db", f"{mine}.{os.getppid()}.partial", "mlflow.db.of-now.1.partial"}
    assert len(list(Path(tempfile.gettempdir()).glob("db_init_lock-*"))) <= locks + 1


def test_store_without_the_run_gets_the_whole_journal(output_dir: Path, sqlite_template: Path) -> None:
    tracker, run_id = begin(output_dir)
    tracker.log_metrics(1, {"reward/mean": 0.1})
    tracker.finish("KILLED")
    other = output_dir / "other.db"
    shutil.copy(sqlite_template, other)
    tracker, moved = begin(output_dir, run_id, uri=f"sqlite:///{other}")
    tracker.log_metrics(2, {"reward/mean": 0.2})
    tracker.finish("FINISHED")
    assert moved != run_id and steps_of(f"sqlite:///{other}", moved) == [1, 2]
    assert client(f"sqlite:///{other}").get_run(moved).data.tags["erollout.resumed_from"] == run_id
    tracker, again = begin(output_dir, run_id, uri=f"sqlite:///{other}")  # the newest checkpoint is still of the first store
    tracker.log_metrics(3, {"reward/mean": 0.3})
    tracker.finish("FINISHED")
    assert again == moved and steps_of(f"sqlite:///{other}", moved) == [1, 2, 3]


def test_refused_record_does_not_hold_up_the_others(output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, run_id = begin(output_dir)
    tracker.log_metrics(1, {"reward/mean": 0.1})
    tracker.log_metrics(2, {"x" * 300: 1.0})  # MLflow refuses names that long
    tracker.log_metrics(3, {"reward/mean": 0.3})
    tracker.finish("FINISHED")
    uri = f"sqlite:///{output_dir}/mlflow.db"
    assert steps_of(uri, run_id) == [1, 3] and client(uri).get_run(run_id).info.status == "FINISHED"
    assert "1 tracking records were rejected" in caplog.text


def test_what_a_store_does_not_take_for_now_does_not_hold_up_the_others(
    output_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erollout.tracking.tracker.Delivery", partial(Delivery, interval=0.05, longest_pause=0.2))
    uri = f"sqlite:///{output_dir}/mlflow.db"
    with closing(sqlite3.connect(output_dir / "mlflow.db")) as database:
        database.execute("CREATE TRIGGER damage BEFORE INSERT ON params BEGIN INSERT INTO nowhere VALUES (1); END")
        tracker, run_id = begin(output_dir)
        tracker.log_metrics(1, {"reward/mean": 0.1})
        wait_until(lambda: steps_of(uri, run_id) == [1])
        tracker.finish("KILLED")
        assert not client(uri).get_run(run_id).data.params and client(uri).get_run(run_id).info.status == "KILLED"
        assert "does not accept a params record" in caplog.text and "\n1 tracking records are not in" in "\n".join(
            caplog.messages
        )
        tracker, _ = begin(output_dir, run_id, step=1)
        tracker.log_metrics(2, {"reward/mean": 0.2})
        wait_until(lambda: steps_of(uri, run_id) == [1, 2])
        database.execute("DROP TRIGGER damage")
    wait_until(lambda: client(uri).get_run(run_id).data.params)
    tracker.finish("FINISHED")
    assert tracker._journal.undelivered(tracker._journal.delivered) == 0  # type: ignore[attr-defined]


def test_system_metrics_are_recorded(output_dir: Path) -> None:
    tracker, run_id = begin(output_dir, system_metrics=True)
    tracker.finish("FINISHED")
    metrics = client(f"sqlite:///{output_dir}/mlflow.db").get_run(run_id).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0 and "system/cpu_utilization_percentage" in metrics
    assert read_history(journal_path(output_dir)) == []


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    tracker = create_tracker(rank=3)
    assert isinstance(tracker, NullTracker)
    assert tracker.start(make_config(tmp_path), LAYOUT, "abc", tmp_path) == "abc"
    tracker.log_metrics(1, {"a": 1})
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_disabled_tracking_still_keeps_the_journal(tmp_path: Path) -> None:
    tracker, run_id = begin(tmp_path, enabled=False)
    tracker.log_metrics(1, {"reward/mean": 0.5})
    tracker.finish("FINISHED")
    assert run_id and read_history(journal_path(tmp_path)) == [{"step": 1, "reward/mean": 0.5}]
    assert not (tmp_path / "mlflow.db").exists()


# --- a server that goes away -----------------------------------------------------------------------------------------------


@pytest.mark.full  # quick: a damaged store that is put back, records that a store does not take for now
@pytest.mark.end_to_end
def test_server_that_goes_away_gets_everything_later(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    tracker, run_id = begin(tmp_path, uri=server.uri)
    tracker.log_metrics(1, {"reward/mean": 0.1, "mismatch/kl": math.nan, "mismatch/max_ratio": math.inf})
    tracker.log_samples(1, [{"prompt": "p", "response": "r"}])
    wait_until(lambda: steps_of(server.uri, run_id) == [1])

    # away in the middle: nothing waits for it, it is said once, and the end of the run is bounded
    server.kill()
    began = time.monotonic()
    for step in (2, 3):
        tracker.log_metrics(step, {"reward/mean": step / 10})
    assert time.monotonic() - began < 5  # a bound on blocking, not on speed: MLflow's own calls would wait for seconds
    wait_until(lambda: "does not answer;" in caplog.text)
    tracker.log_metrics(4, {"reward/mean": 0.4})
    time.sleep(3)  # several more attempts
    tracker.finish("KILLED", timeout_seconds=20)
    assert caplog.text.count("does not answer;") == 1 and "tracking records are not in" in caplog.text

    # still away at the next start of the same run, then back: delivered in order, once, by the running process
    caplog.clear()
    tracker, same = begin(tmp_path, run_id, uri=server.uri)
    assert same == run_id and "although its store does not answer" in caplog.text
    tracker.log_metrics(5, {"reward/mean": 0.5})
    wait_until(lambda: "does not answer;" in caplog.text)
    server.start()
    wait_until(lambda: "answers again" in caplog.text)
    tracker.log_metrics(6, {"reward/mean": 0.6})
    tracker.finish("FINISHED")
    assert caplog.text.count("does not answer;") == 1 and caplog.text.count("answers again") == 1
    assert steps_of(server.uri, run_id) == [1, 2, 3, 4, 5, 6]
    run = client(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags["erollout.attempt"] == "2"
    assert math.isnan(run.data.metrics["mismatch/kl"])
    assert [file.path for file in client(server.uri).list_artifacts(run_id)] == ["samples.json"]


def run_until_killed(output_dir: str, uri: str) -> None:
    """Runs in a process of its own: two steps, delivered; two more, recorded only; then SIGKILL in the middle of a line."""
    tracker, run_id = begin(Path(output_dir), uri=uri)
    for step in (1, 2):
        tracker.log_metrics(step, {"reward/mean": step / 10})
    wait_until(lambda: steps_of(uri, run_id) == [1, 2])
    tracker._delivery._send = lambda records: threading.Event().wait()  # type: ignore[attr-defined]  # the store hangs
    for step in (3, 4):
        tracker.log_metrics(step, {"reward/mean": step / 10})
    with open(journal_path(output_dir), "a") as file:
        file.write('{"kind": "metrics", "step": 5, "val')
    print(run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_process_loses_nothing_it_logged(output_dir: Path) -> None:
    uri = f"sqlite:///{output_dir}/mlflow.db"
    code = f"import test_tracking; test_tracking.run_until_killed({str(output_dir)!r}, {uri!r})"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert child.returncode == -signal.SIGKILL
    run_id = child.stdout.strip()
    assert steps_of(uri, run_id) == [1, 2]

    journal_path(output_dir).with_name("metrics.jsonl.delivered").write_text("0")  # even the record of deliveries is lost
    tracker, _ = begin(output_dir, run_id, uri=uri)
    for step in (3, 4, 5):
        tracker.log_metrics(step, {"reward/mean": 1.0})
    tracker.finish("FINISHED")
    assert steps_of(uri, run_id) == [1, 2, 3, 4, 5]


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["refused", "silent", "no such host", "directory", "unknown scheme"])
def test_unusable_store_at_start_is_a_user_error(tmp_path: Path, kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if kind == "silent":
            listener.listen()
        uri = {
            "refused": f"http://127.0.0.1:{port}",
            "silent": f"http://127.0.0.1:{port}",
            "no such host": "http://tracking.invalid:5000",
            "directory": f"sqlite:///{tmp_path}/missing/mlflow.db",
            "unknown scheme": "ftp://tracking/store",
        }[kind]
        if kind == "directory":
            (tmp_path / "missing").write_text("a file, so the store can't make its directory")
        with pytest.raises(UserError) as caught:
            begin(tmp_path, uri=uri)
    message = str(caught.value)
    assert message.startswith(f"tracking.uri = {uri} can't be used") and "\n" not in message
    assert "correct the URI" in message


# --- journal ---------------------------------------------------------------------------------------------------------------


def test_journal_reads_around_torn_lines_and_keeps_non_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "metrics", "time": 1, "step": 1, "values": {"a": 1}}\n{"kind": "met')
    journal = Journal(path)
    journal.append("metrics", step=2, values={"a": math.nan, "b": -math.inf})
    assert [record["step"] for record in journal.records()] == [1, 2] and journal.undelivered(0) == 2
    first, torn, last = journal.read(0, limit=10)
    assert torn.record is None and last.end == path.stat().st_size
    journal.mark_delivered(first.end)
    journal.close()
    reopened = Journal(path)
    assert reopened.delivered == first.end and reopened.undelivered(first.end) == 1
    reopened.close()
    history = read_history(path)
    assert math.isnan(history[1]["a"]) and history[1]["b"] == -math.inf
    assert all(json.loads(line) for line in path.read_text().splitlines() if "values" in line)


def test_full_disk_costs_records_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, _ = begin(tmp_path, enabled=False)
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), tracker._journal._file)  # type: ignore[attr-defined]
    tracker.log_metrics(1, {"a": 1.0})
    tracker.log_metrics(2, {"a": 1.0})
    tracker.finish("FINISHED")
    os.close(full)
    assert caplog.text.count("can't be written") == 1 and "3 tracking records could not be written" in caplog.text


def test_groups_keep_order_and_respect_the_limit_of_a_call() -> None:
    def entry(kind: str, size: int = 0) -> JournalEntry:
        return JournalEntry({"kind": kind, "values": {str(name): 0.0 for name in range(size)}}, end=0)

    half = METRICS_PER_BATCH // 2
    entries = [
        entry("params"),
        *(entry("metrics", half) for _ in range(3)),
        entry("status"),
        entry("metrics", 1),
        JournalEntry(None, 0),
    ]
    groups = group_entries(entries)
    assert [len(group) for group in groups] == [1, 2, 1, 1, 1, 1]
    assert [item for group in groups for item in group] == entries


# --- metrics ---------------------------------------------------------------------------------------------------------------


def test_percentiles_interpolate() -> None:
    assert percentiles([4, 1, 3, 2], (0, 50, 90, 100)) == pytest.approx([1.0, 2.5, 3.7, 4.0])
    assert percentiles([7], (50, 99)) == [7.0, 7.0]
    with pytest.raises(ValueError, match="no values"):
        percentiles([], (50,))
    assert summarize_lengths([]) == {}
    assert summarize_lengths(list(range(101))) == {
        "mean": 50.0,
        "p50": 50.0,
        "p90": 90.0,
        "p99": 99.0,
        "max": 100.0,
    }


def test_phase_timer_counts_every_second_once() -> None:
    now = [0.0]
    timer = PhaseTimer(clock=lambda: now[0])
    now[0] += 1
    with timer("rollout"):
        now[0] += 2
        with timer("reward"):
            now[0] += 4
        now[0] += 8
    for _ in range(2):
        with pytest.raises(RuntimeError), timer("update"):
            now[0] += 16
            raise RuntimeError
    assert timer.collect() == {"seconds/rollout": 10, "seconds/reward": 4, "seconds/update": 32, "seconds/step": 47}
    now[0] += 3
    assert timer.collect() == {"seconds/step": 3}


def test_memory_metrics_follow_what_is_allocated() -> None:
    before = memory_metrics()["memory/peak_rss_gib"]
    block = b"x" * (int(before * 2**30) + 2**26)
    assert memory_metrics()["memory/peak_rss_gib"] > before + 0.03 and block


# --- console, logging, figures ---------------------------------------------------------------------------------------------


STEP = {
    "reward/mean": 0.5,
    "response_length/mean": 30.25,
    "rollout/tokens_per_second": 812.4,
    "mismatch/kl": 1.2e-5,
    "seconds/step": 4.0,
    "seconds/rollout": 3.0,
    "seconds/update": 0.5,
}


def test_log_file_gets_one_line_a_step() -> None:
    out = io.StringIO()
    with StepReporter(100, console=Console(file=out, width=40)) as reporter:
        reporter.update(1, STEP)
        reporter.update(2, {"reward/mean": 0.75})
    first, second = out.getvalue().splitlines()
    assert first[20:] == (
        "step=1/100 reward=0.500 length=30.2 s_per_step=4.00 eta=6m36s tokens_per_s=812 mismatch_kl=1.2e-05 "
        "phases=rollout:75%,update:12%"
    )
    assert second[20:].startswith("step=2/100 reward=0.750 eta=")


EVALUATION = {"evaluation/pass_at_1": 0.25, "evaluation/plus/pass_at_1": 0.5, "evaluation/response_length_mean": 12.5}


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_terminal_of_any_width_has_one_line_a_step_above_step_and_remaining_time(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    with StepReporter(100, console=console) as reporter:
        reporter.update(0, EVALUATION)
        reporter.update(42, STEP | {"reward/scoring_errors": 3.0, "train/loss": -0.00012345})
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in re.split(r"[\r\n]+", out.getvalue())]
    assert max(map(len, lines)) <= width or width < len("12:34:56 evaluation step=0/100")
    (step,) = (line for line in lines if " step=42/100" in line)
    (evaluation,) = (line for line in lines if "evaluation" in line)
    seen = {
        20: ("", ""),
        40: (" reward=0.500", ""),
        80: (" reward=0.500 scoring_errors=3 length=30.2 s_per_step=4.00", " accuracy=0.250 response_length_mean=12.5"),
        200: (" loss=-0.0001234 eta=3m52s tokens_per_s=812 mismatch_kl=1.2e-05 phases=rollout:75%,update:12%", "12.5"),
    }
    assert step.endswith(f"step=42/100{seen[width][0]}" if width < 200 else seen[width][0])
    assert evaluation[9:].startswith("evaluation step=0/100") and evaluation.endswith(seen[width][1])
    live = [line for line in lines if line.startswith("42/100 eta 3m52s")]
    assert live and len(live[-1]) <= width and (width < 40 or "━━" in live[-1])


def test_a_step_whose_responses_are_all_scored_says_nothing_of_it() -> None:
    out = io.StringIO()
    with StepReporter(10, console=Console(file=out)) as reporter:
        reporter.update(1, STEP | {"reward/scoring_errors": 0.0})
        reporter.update(2, STEP | {"reward/scoring_errors": 2.0})
    first, second = out.getvalue().splitlines()
    assert "scoring_errors" not in first and "reward=0.500 scoring_errors=2 " in second


def test_an_evaluation_is_no_part_of_the_time_of_a_step() -> None:
    out = io.StringIO()
    with StepReporter(10, console=Console(file=out)) as reporter:
        reporter.update(1, STEP)
        reporter.update(1, EVALUATION)
        reporter.update(2, STEP)
    first, evaluation, second = out.getvalue().splitlines()
    assert " eta=36s " in first and evaluation.endswith("response_length_mean=12.5") and " eta=32s " in second


def test_a_table_is_whole_in_a_file_and_on_a_narrow_terminal() -> None:
    columns, row = [f"column {i}" for i in range(12)], [f"{i}.123456789" for i in range(12)]
    out = io.StringIO()
    print_table(columns, [row], "Title", Console(file=out))
    assert any(all(number in line for number in row) for line in out.getvalue().splitlines())
    out = io.StringIO()
    print_summary([("checkpoint", "/a/long/path" * 20)], "", Console(file=out))
    assert "/a/long/path" * 20 in out.getvalue()
    out = io.StringIO()
    print_table(columns[:4], [row[:4]], "", Console(file=out, force_terminal=True, width=30))
    digits = "".join(re.findall(r"\d", out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")))
    assert "…" not in out.getvalue() and digits.count("9") == 4, out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_logging_levels_and_rank_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        for rank in (0, 2):
            configure_logging(rank)
            logging.getLogger("erollout.x").info("hello from %d", rank)
            logging.getLogger("erollout.x").warning("careful %d", rank)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    printed = capsys.readouterr().err
    assert "INFO erollout.x: hello from 0" in printed and "hello from 2" not in printed
    assert "WARNING [rank 2] erollout.x: careful 2" in printed and "[rank 0]" not in printed


def test_figures_show_the_history(tmp_path: Path) -> None:
    tracker, _ = begin(tmp_path, enabled=False)
    for step in range(1, 31):
        accuracy = {"evaluation/pass_at_1": step / 40} if step % 10 == 0 else {}
        lengths = {f"response_length/{name}": value for name, value in summarize_lengths([step, 2 * step]).items()}
        tracker.log_metrics(step, STEP | {"reward/mean": step / 30} | accuracy | lengths)
    tracker.finish("FINISHED")
    runs = [read_run(tmp_path)]
    reward = reward_curve(runs).axes[0]
    assert [len(line.get_xdata()) for line in reward.lines] == [30, 30, 3]
    assert reward.get_xlabel() == "step" and reward.get_ylabel()
    assert [text.get_text() for text in response_lengths(runs).axes[0].get_legend().get_texts()] == [
        "p99",
        "p90",
        "p50",
        "max_tokens 256:\nabove this axis",
    ]
    phases = phase_seconds(runs).axes[0]
    assert [text.get_text() for text in phases.get_legend().get_texts()] == ["other", "update", "rollout"]
    assert phases.dataLim.y1 == pytest.approx(4.0)

    save(reward_curve(runs), tmp_path / "docs" / "reward.png")
    assert (tmp_path / "docs" / "reward.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match="can't write the figure"):
        save(reward_curve([read_run(journal_path(tmp_path))]), tmp_path / "reward.nonsense")
    with pytest.raises(UserError, match="can't read the metrics"):
        read_run(tmp_path / "nothing.jsonl")


def test_redaction_keeps_everything_but_the_credentials() -> None:
    assert redact("https://me:secret@host:5000/path?q=1") == "https://host:5000/path?q=1"
    assert redact("no answer from http://me:secret@host/api (twice)") == "no answer from http://host/api (twice)"
    assert redact("sqlite:////tmp/a@b/mlflow.db") == "sqlite:////tmp/a@b/mlflow.db"


@pytest.mark.parametrize("form", [{}, {"force_terminal": True, "width": 80}], ids=["log", "terminal"])
@pytest.mark.parametrize("is_gone", [False, True], ids=["full disk", "closed pipe"])
def test_a_console_that_takes_nothing_ends_no_run(
    form: dict[str, Any], is_gone: bool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer if is_gone else os.open("/dev/full", os.O_WRONLY), "w")
    console = Console(file=out, **form)
    with StepReporter(2, console=console) as reporter:
        for step in (1, 2):
            reporter.update(step, {"reward/mean": 0.5})
    print_summary([("held-out accuracy", 0.5)], "Demo", console)
    print_table(["a"], [[1]], "Demo", console)
    assert len([record for record in caplog.records if "can't write to stdout" in record.message]) == 1
    with suppress(OSError):
        out.close()
