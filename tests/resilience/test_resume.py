"""Checkpoints that can't be used or saved: what was saved before is intact, and the run says what to do in one line."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, invoke
from ranks import RankFailure, RankPool
from tiny_runs import all_rows, history, sft_here, tiny_tree, train_here, write_config

from erollout.checkpoint.manifest import complete_checkpoints, damage, write_manifest
from erollout.config import build_config
from erollout.errors import UserError
from erollout.tracking.journal import journal_path

OLDER, NEWEST = "step_00000002", "step_00000004"


def invoke_here(*arguments: str) -> Outcome:
    """For RankPool.run(1, ...)."""
    return invoke(*arguments)


def failing_train(tree: dict[str, Any], largest_file: int | None = None) -> str:
    """For RankPool.run: the message that a training run ends with; files may grow to `largest_file` bytes."""
    from erollout.training import session

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
        session.train(build_config(tree))
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def _saving(folder: Path, steps: int, **parallel: int) -> dict[str, Any]:
    return tiny_tree(folder, train={"steps": steps}, checkpoint={"interval": 2}, parallel=parallel)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def saved(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    rank_pool.run(1, train_here, _saving(folder, 4))
    assert [path.name for path in complete_checkpoints(folder / "run" / "checkpoints")] == [OLDER, NEWEST]
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder, with a configuration that goes on to step 6."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    write_config(folder, train={"steps": 6, "output_dir": str(folder / "run")}, checkpoint={"interval": 2})
    return folder


def _shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _truncate(checkpoint: Path) -> None:
    shard = _shard(checkpoint)
    shard.write_bytes(shard.read_bytes()[:-1000])


def _lose_a_shard(checkpoint: Path) -> None:
    _shard(checkpoint).unlink()


def _lose_the_index(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def _scramble(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_bytes(b"?" * path.stat().st_size)  # of the right size

    return damage


def _nothing(checkpoint: Path) -> None:
    """The configuration is what doesn't fit."""


def _flip_a_bit(checkpoint: Path) -> None:
    shard = _shard(checkpoint)
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (_flip_a_bit, ".distcp has the checksum"),
    "truncated": (_truncate, "bytes instead of"),
    "shard missing": (_lose_a_shard, ".distcp is missing"),
    "index missing": (_lose_the_index, ".metadata is missing"),
    "index scrambled": (_scramble(".metadata"), ".metadata has the checksum"),
    "state scrambled": (_scramble("state.json"), "state.json has the checksum"),
    "manifest scrambled": (_scramble("manifest.json"), "manifest.json is not a valid manifest"),
}

MISFITS: dict[str, tuple[list[str], list[str]]] = {
    "another model": (["model.architecture.hidden_size=16"], ["another model", "hidden_size = 32 there, 16 here"]),
    "another dtype": (["model.dtype=bfloat16"], ["model.dtype = float32"]),
    "another optimizer": (["optimizer.use_distributed_optimizer=true"], ["use_distributed_optimizer = False"]),
    "resuming is off": (["checkpoint.resume=false"], ["checkpoint.resume = false"]),
}


@pytest.fixture(scope="module")
def unbroken(saved: Path, rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Steps of that run, gone on with to step 6 from its newest checkpoint."""
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    rank_pool.run(1, train_here, _saving(folder, 6))
    return history(folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("a bit", "manifest scrambled") else pytest.mark.full) for name in DAMAGE]
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    name: str, rank_pool: RankPool, run: Path, unbroken: list[dict[str, float]]
) -> None:
    damage, reason = DAMAGE[name]
    checkpoints = run / "run" / "checkpoints"
    damage(checkpoints / NEWEST)
    damaged = _contents(checkpoints / NEWEST)
    outcome: Outcome = rank_pool.run(1, invoke_here, "train", "--config", str(run / "config.yaml"))[0]
    assert outcome.status == 0, outcome.stderr
    (line,) = [line for line in outcome.stderr.splitlines() if "is damaged" in line]
    assert reason in line and str(checkpoints / NEWEST) in line and f"set aside, falling back on {OLDER}" in line
    assert _contents(checkpoints / f"damaged_{NEWEST}") == damaged
    assert [path.name for path in complete_checkpoints(checkpoints)] == [NEWEST, "step_00000006"]
    for mine, other in zip(history(run), unbroken, strict=True):
        for key in ("step", "train/loss", "reward/mean", "response_length/mean", "train/learning_rate"):
            assert mine[key] == other[key], (mine["step"], key)


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_checkpoint_of_a_stranger_is_not_executed(name: str, rank_pool: RankPool, run: Path) -> None:
    checkpoint = run / "run" / "checkpoints" / NEWEST
    with open(checkpoint / name, "wb") as file:
        (pickle.dump if name == ".metadata" else torch.save)({"a": Hostile(run / "made")}, file)
    write_manifest(checkpoint)
    outcome: Outcome = rank_pool.run(1, invoke_here, "train", "--config", str(run / "config.yaml"))[0]
    line = outcome.error()
    assert f"{checkpoint} is refused: {name}: it names posix.mkdir" in line and not (run / "made").exists()


@pytest.mark.distributed
def test_all_ranks_find_the_same_damage(rank_pool: RankPool, run: Path) -> None:
    _flip_a_bit(run / "run" / "checkpoints" / NEWEST)
    assert rank_pool.run(2, failing_train, _saving(run, 4, tensor_model_parallel_size=2)) == ["", ""]
    assert [row["step"] for row in history(run)] == [1, 2, 3, 4]


@pytest.mark.distributed
def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(rank_pool: RankPool, run: Path) -> None:
    checkpoints = run / "run" / "checkpoints"
    _truncate(checkpoints / NEWEST)
    _flip_a_bit(checkpoints / OLDER)
    before = _contents(checkpoints)
    messages = rank_pool.run(2, failing_train, _saving(run, 6, tensor_model_parallel_size=2))
    assert messages[0] == messages[1] and "no earlier one that is whole" in messages[0] and NEWEST in messages[0]
    assert _contents(checkpoints) == before


@pytest.mark.distributed
@pytest.mark.parametrize("name", MISFITS)
def test_checkpoint_that_does_not_fit_is_named_and_nothing_is_harmed(name: str, rank_pool: RankPool, run: Path) -> None:
    overrides, words = MISFITS[name]
    checkpoints = run / "run" / "checkpoints"
    before = _contents(checkpoints)
    outcome: Outcome = rank_pool.run(1, invoke_here, "train", "--config", str(run / "config.yaml"), *overrides)[0]
    line = outcome.error()
    assert outcome.status == 2 and str(checkpoints / NEWEST) in line
    for word in words:
        assert word in line
    assert _contents(checkpoints) == before


@pytest.mark.distributed
def test_finished_run_may_be_started_again(rank_pool: RankPool, run: Path) -> None:
    before, steps = _contents(run / "run" / "checkpoints"), history(run)
    rank_pool.run(1, train_here, _saving(run, 4))
    assert _contents(run / "run" / "checkpoints") == before and history(run) == steps


@pytest.mark.distributed
def test_save_that_fails_on_the_disk_costs_no_earlier_checkpoint(rank_pool: RankPool, run: Path) -> None:
    """Files may not grow beyond a fifth of a shard: what a full disk or a quota does in the middle of writing."""
    checkpoints = run / "run" / "checkpoints"
    before = _contents(checkpoints)
    limit = _shard(checkpoints / NEWEST).stat().st_size // 5
    messages = rank_pool.run(2, failing_train, _saving(run, 6, pipeline_model_parallel_size=2), limit)
    for message in messages:
        assert "can't save checkpoint" in message and "step_00000006" in message and "\n" not in message
    assert "rank 0: " in messages[0] and "rank 0 says why" in messages[1]
    assert {name: data for name, data in _contents(checkpoints).items() if ".partial" not in name} == before
    rank_pool.run(2, train_here, _saving(run, 6, pipeline_model_parallel_size=2))
    assert [row["step"] for row in history(run)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in checkpoints.iterdir()) == [NEWEST, "step_00000006"]


@pytest.mark.distributed
@pytest.mark.parametrize("first", ["train", "sft"])
def test_run_of_another_kind_is_not_gone_on_with(first: str, rank_pool: RankPool, tmp_path: Path) -> None:
    """Warm-up and reinforcement learning with the same output directory: neither takes the other's optimizer."""
    second = {"train": "sft", "sft": "train"}[first]
    config = str(
        write_config(tmp_path, train={"steps": 1}, supervised={"steps": 1, "batch_size": 2}, checkpoint={"interval": 1})
    )
    done: Outcome = rank_pool.run(1, invoke_here, first, "--config", config)[0]
    assert done.status == 0, done.stderr
    before = _contents(tmp_path / "run" / "checkpoints")
    line = rank_pool.run(1, invoke_here, second, "--config", config)[0].error()
    assert "step_00000001 is from a" in line and "train.output_dir" in line
    assert _contents(tmp_path / "run" / "checkpoints") == before


@pytest.mark.distributed
def test_supervised_run_that_is_resumed_equals_an_unbroken_one(rank_pool: RankPool, tmp_path: Path) -> None:
    losses = {}
    for name, stops in {"broken": (2, 4), "whole": (4,)}.items():
        for steps in stops:
            supervised = {"steps": steps, "batch_size": 8}
            output = {"output_dir": str(tmp_path / name)}
            rank_pool.run(2, sft_here, tiny_tree(tmp_path, supervised=supervised, train=output, checkpoint={"interval": 2}))
        losses[name] = [(row["step"], row["train/loss"]) for row in all_rows(tmp_path, name)]
    assert losses["broken"] == losses["whole"] and len(losses["whole"]) == 4


@pytest.mark.distributed
def test_tracking_that_can_not_start_is_every_ranks_error(rank_pool: RankPool, tmp_path: Path) -> None:
    """Only rank 0 talks to the store; a rank that knew nothing of its failure would wait, then end with a traceback."""
    import mlflow

    uri = f"sqlite:///{tmp_path}/store.db"
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.create_experiment("gone"))
    tracking = {"enabled": True, "uri": uri, "experiment": "gone"}
    messages = rank_pool.run(2, failing_train, tiny_tree(tmp_path, tracking=tracking, train={"steps": 1}))
    assert messages[0] == messages[1] and "tracking.experiment = 'gone'" in messages[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many KiB."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kib: int) -> Path:
        options = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        if subprocess.run(options, capture_output=True).returncode:
            pytest.skip("this user may not mount a file system")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sizes", "words"), [(1.5, ["no disk space", "MiB needed"]), (0.5, ["can't save checkpoint", "step_00000002"])]
)
def test_no_disk_space(
    sizes: float, words: list[str], rank_pool: RankPool, tmp_path: Path, saved: Path, small_disk: Callable[[int], Path]
) -> None:
    """A disk for one checkpoint and a half: the second is not begun. A disk for half of one: it can't be finished."""
    one = sum(map(len, _contents(saved / "run" / "checkpoints" / NEWEST).values()))
    place = small_disk(int(one * sizes) // 1024)
    tree = tiny_tree(tmp_path, train={"steps": 4}, checkpoint={"interval": 2, "directory": str(place / "checkpoints")})
    messages = rank_pool.run(1, failing_train, tree)
    for word in words:
        assert word in messages[0]
    left = complete_checkpoints(place / "checkpoints")
    assert [path.name for path in left] == ([OLDER] if sizes > 1 else [])
    for checkpoint in left:
        assert damage(checkpoint) is None


def train_dying_in_the_second_save(tree: dict[str, Any]) -> None:
    from erollout.checkpoint import checkpointer

    class Writing(checkpointer.Writing):
        begun = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            Writing.begun += 1
            if Writing.begun == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer, "Writing", Writing)
        train_here(tree)


@pytest.mark.distributed
@pytest.mark.full
def test_killed_while_saving_and_resumed_as_the_same_tracked_run(tmp_path: Path, rank_pool: RankPool) -> None:
    """Killed as the second checkpoint is being written. The same command ends the run: one MLflow run, every step once."""
    import mlflow

    sections = {
        "train": {"steps": 6, "output_dir": str(tmp_path / "run")},
        "checkpoint": {"interval": 2, "asynchronous": True},
        "tracking": {"enabled": True, "system_metrics": False},
        "evaluation": {"interval": 3, "num_prompts": 2},
    }
    tree = tiny_tree(tmp_path, **sections)
    with pytest.raises(RankFailure, match="rank 0 died"):
        rank_pool.run(1, train_dying_in_the_second_save, tree)
    assert len(history(tmp_path)) == 4
    assert any((tmp_path / "run" / "checkpoints").glob("step_00000004.*")), "it died in the middle of saving"
    rank_pool.run(1, train_here, tree)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    tracked = client.get_metric_history(runs[0].info.run_id, "reward/mean")
    assert [metric.step for metric in tracked] == [1, 2, 3, 4, 5, 6]
    assert [m.step for m in client.get_metric_history(runs[0].info.run_id, "evaluation/pass_at_1")] == [0, 3, 6]
    records = [json.loads(line) for line in journal_path(tmp_path / "run").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "start"] == [0, 2]
    plain = tmp_path / "plain"
    plain.mkdir()
    rank_pool.run(1, train_here, tiny_tree(plain, **(sections | {"train": {"steps": 6, "output_dir": str(plain / "run")}})))
    for mine, other in zip(history(tmp_path), history(plain), strict=True):
        for name in ("train/loss", "reward/mean", "response_length/mean", "train/learning_rate"):
            assert mine[name] == other[name], (mine["step"], name)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["run_id"] == runs[0].info.run_id and [row["step"] for row in state["history"]] == [0, 3, 6]
