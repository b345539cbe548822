"""A configuration that is changed before a run goes on: each key is obeyed or refused, and what has changed is said."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from ranks import RankPool
from tiny_runs import history, tiny_config, tiny_tree, train_here, write_config

from erollout.checkpoint.manifest import STATE, complete_checkpoints
from erollout.checkpoint.resume import (
    OBEYED,
    REFUSED,
    UNREAD,
    Change,
    RunKind,
    changes,
    configuration,
    drawn,
    keys,
)
from erollout.config import Config, build_config
from erollout.errors import UserError
from erollout.tracking.journal import journal_path

STEPS = 4
OPTIMIZER = {"lr": 1e-3, "lr_decay_style": "linear", "lr_warmup_steps": 2}


def test_every_key_stands_in_one_table() -> None:
    obeyed = [f"{section}.{key}" for section, names in OBEYED.items() for key in names.split()]
    assert sorted([*obeyed, *REFUSED, *UNREAD]) == sorted(key for key, _ in keys(Config()))


def test_places_are_the_same_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = tiny_config(tmp_path, train={"output_dir": "run"}, data={"test_files": ["a.jsonl"]})
    absolute = tiny_config(
        tmp_path, train={"output_dir": str(tmp_path / "run")}, data={"test_files": [str(tmp_path / "a.jsonl")]}
    )
    assert changes(configuration(relative), absolute) == []


def test_a_key_that_only_one_side_knows_is_not_compared(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    saved = configuration(config) | {"optimizer.of_old": 1}
    del saved["optimizer.lr"]
    assert changes(saved, config) == []


def test_a_renamed_key_of_a_checkpoint_is_compared(tmp_path: Path) -> None:
    saved = configuration(tiny_config(tmp_path))
    saved["coordinator.hand_out"] = saved.pop("coordinator.dispatch")
    assert changes(saved, tiny_config(tmp_path)) == []
    assert changes(saved, tiny_config(tmp_path, coordinator={"dispatch": "static"})) == [
        Change("coordinator.dispatch", "dynamic", "static")
    ]


@pytest.mark.parametrize(
    ("kind", "before", "sections"),
    [
        ("reinforcement learning", 4, {"rollout": {"prompts_per_step": 2}}),
        ("supervised", 64, {"supervised": {"batch_size": 4}}),
    ],
)
def test_a_checkpoint_without_a_cursor_has_drawn_as_many_items_as_its_steps_took(
    kind: RunKind, before: int, sections: dict[str, Any], tmp_path: Path
) -> None:
    document = {"step": 3, "configuration": configuration(tiny_config(tmp_path))}
    assert drawn(document, tiny_config(tmp_path, **sections), kind) == 3 * before
    assert drawn(document | {"cursor": 17}, tiny_config(tmp_path, **sections), kind) == 17


@pytest.fixture(scope="module")
def saved(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    rank_pool.run(1, train_here, _tree(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def _tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {"train": {"steps": 2}, "checkpoint": {"interval": 2}, "optimizer": OPTIMIZER}
    given["rollout"] = {"dtype": "float32"}
    tree = tiny_tree(folder)
    for name, values in [*given.items(), *sections.items()]:
        tree[name] = tree.get(name, {}) | values
    tree["train"]["output_dir"] = str(folder / "run")
    return tree


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OTHERS: dict[str, Any] = {
    "model.architecture": {"hidden_size": 16},
    "model.dtype": "bfloat16",
    "optimizer.use_distributed_optimizer": True,
    "train.seed": 5,
    "checkpoint.resume": False,
}
"""Another value of each key that is refused."""


def refused_train(tree: dict[str, Any]) -> str:
    from erollout.training import session

    with pytest.raises(UserError) as refusal:
        session.train(build_config(tree))
    return str(refusal.value)


@pytest.mark.distributed
def test_another_number_of_prompts_per_step_goes_on_where_the_steps_before_ended(folder: Path, rank_pool: RankPool) -> None:
    tree = _tree(folder, train={"steps": 3})
    tree["rollout"]["prompts_per_step"] = 2
    rank_pool.run(1, train_here, tree)
    states = [json.loads((path / STATE).read_text()) for path in complete_checkpoints(folder / "run" / "checkpoints")]
    assert [(state["step"], state["cursor"]) for state in states] == [(2, 8), (3, 10)]


@pytest.mark.distributed
@pytest.mark.parametrize("key", OTHERS)
def test_what_is_refused_is_named_and_leaves_everything_as_it_was(key: str, folder: Path, rank_pool: RankPool) -> None:
    assert {*OTHERS} == {*REFUSED, "checkpoint.resume"}
    section, name = key.split(".")
    tree = _tree(folder, train={"steps": STEPS})
    value = OTHERS[key]
    tree[section][name] = tree[section][name] | value if isinstance(value, dict) else value
    before = _contents(folder)
    assert "run/verdict" in before and "run/heartbeats/rank_00000.json" in before
    (message,) = rank_pool.run(1, refused_train, tree)
    assert str(folder / "run" / "checkpoints" / "step_00000002") in message
    assert (name if name != "architecture" else "hidden_size = 32 there, 16 here") in message
    assert any(fix in message for fix in ("set it to", "restore the model"))
    assert _contents(folder) == before


@pytest.mark.distributed
def test_a_dry_run_refuses_too(folder: Path) -> None:
    config = write_config(folder, **{name: values for name, values in _tree(folder).items() if name != "data"})
    before = _contents(folder)
    line = invoke("train", "--config", str(config), "--dry-run", "train.seed=5").error()
    assert "train.seed = 5, but checkpoint" in line and "was saved with 1234" in line
    assert _contents(folder) == before


@pytest.mark.distributed
def test_a_job_that_would_be_refused_is_not_submitted(folder: Path) -> None:
    config = write_config(folder, **{name: values for name, values in _tree(folder).items() if name != "data"})
    before = _contents(folder)
    where = ["--nodes", "1", "--ranks-per-node", "1", "--config", str(config)]
    assert "train.seed = 7, but checkpoint" in invoke("launch", "slurm", *where, "--", "train.seed=7").error()
    assert _contents(folder) == before


@pytest.mark.distributed
def test_what_is_named_like_a_half_written_checkpoint_goes_with_it(folder: Path, rank_pool: RankPool) -> None:
    checkpoints = folder / "run" / "checkpoints"
    (folder / "kept").mkdir()
    (folder / "kept" / "file").write_text("of the user")
    (checkpoints / "step_00000003.partial").symlink_to(folder / "kept")
    (checkpoints / "step_00000004.partial").write_text("a file")
    (checkpoints / "step_00000005.partial").symlink_to(folder / "nowhere")
    rank_pool.run(1, train_here, _tree(folder, train={"steps": STEPS}))
    assert not list(checkpoints.glob("*.partial")) and (folder / "kept" / "file").read_text() == "of the user"


@pytest.mark.distributed
def test_what_is_obeyed_counts_from_the_next_step_on(folder: Path, rank_pool: RankPool) -> None:
    """The rate is that of the new schedule at that step, as if it had always been so."""
    optimizer = {"lr": 1e-2, "min_lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 1}
    sections: dict[str, dict[str, Any]] = {
        "optimizer": optimizer,
        "train": {"steps": STEPS},
        "rollout": {"group_size": 2, "max_tokens": 3},
        "algorithm": {"clip_ratio_high": 0.3},
    }
    rank_pool.run(1, train_here, _tree(folder, **sections))
    rows = history(folder)
    rates = [row["train/learning_rate"] for row in rows]
    cosine = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))) for step in (3, 4)]
    assert rates == pytest.approx([5e-4, 1e-3, *cosine])
    assert all(row["response_length/p99"] <= 3 for row in rows[2:]) and rows[1]["response_length/p99"] > 3
    records = [json.loads(line) for line in journal_path(folder / "run").read_text().splitlines()]
    changed = [record["changed"] for record in records if record["kind"] == "params"][-1]
    assert changed.items() >= {"optimizer.lr": "0.01", "rollout.group_size": "2", "algorithm.clip_ratio_high": "0.3"}.items()


def hyper_parameters(tree: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Hyper-parameters of every parameter group after the checkpoint is loaded, and the log lines about it."""
    import logging

    from erollout.training import session
    from erollout.training.loop import RunLoop

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    found: list[dict[str, Any]] = []

    def looked_at(self: RunLoop) -> None:
        found.extend({name: group[name] for name in NAMES} for group in self.training.actor.optimizer.param_groups)

    log = logging.getLogger("erollout.checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLoop, "run", looked_at)
        log.addHandler(handler)
        try:
            session.train(build_config(tree))
        finally:
            log.removeHandler(handler)
    return found, [line for line in said if "has changed" in line]


NAMES = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay")


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "distributed"), [("float32", False), ("bfloat16", True)])
def test_every_optimizer_takes_the_new_values(dtype: str, distributed: bool, rank_pool: RankPool, tmp_path: Path) -> None:
    before = {"optimizer": OPTIMIZER | {"use_distributed_optimizer": distributed}, "model": {"dtype": dtype}}
    rank_pool.run(2, train_here, _tree(tmp_path, **before))
    values = {"lr": 2e-4, "min_lr": 1e-5, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-6}
    after = {**before, "optimizer": before["optimizer"] | values | {"lr_warmup_steps": 0, "lr_decay_style": "constant"}}
    for groups, said in rank_pool.run(2, hyper_parameters, _tree(tmp_path, **after)):
        assert groups
        for group in groups:
            assert group["weight_decay"] in (0.3, 0.0)  # norms have none
            assert tuple(group[name] for name in NAMES[:-1]) == (2e-4, 2e-4, 1e-5, (0.8, 0.9), 1e-6)
        assert len(said) <= 1 and all("optimizer.lr = 0.001 -> 0.0002" in line for line in said)


@pytest.mark.distributed
def test_what_is_read_no_more_is_said(folder: Path, rank_pool: RankPool) -> None:
    tree = _tree(folder, tracking={"experiment": "another"}, train={"steps": STEPS})
    (found,) = rank_pool.run(1, hyper_parameters, tree)
    (line,) = found[1]
    assert 'tracking.experiment = "erollout" -> "another" (the run stays in its experiment)' in line
