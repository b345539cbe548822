"""What a run's rollouts leave for the next ones, for the checkpoint and for people; calibrations that are not of the run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, RankPool
from test_replica_control import Event, Recorder
from tiny_runs import history, tiny_tree, train_here

from erollout.calibration.file import Calibration, Identity
from erollout.calibration.model_size import describe_shape, model_size
from erollout.calibration.sweep import hardware_name
from erollout.checkpoint.manifest import STATE
from erollout.config import Config, build_config
from erollout.drafter.registry import draft_weights
from erollout.errors import UserError
from erollout.policy.families import policy_architecture
from erollout.rollout.coordination import Coordination
from erollout.rollout.summary import BatchShare, shares
from erollout.speculation.cost.roofline import PassCost, Roofline
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import DecisionTrace, Reason, StepDecision
from erollout.training.preflight import preflight

DRAFTER = {"format": "w4a16", "group_size": 16}
ADAPTIVE: dict[str, Any] = {
    "mode": "adaptive",
    "drafter": DRAFTER | {"alternatives": ["w8a8"]},
    "toggle": {"bootstrap_seconds": 0.2, "max_speculative_tokens": 3},
}


def _tree(folder: Path, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
    train = {"steps": steps, "output_dir": str(folder / "run")}
    return tiny_tree(folder, train=train, **{"speculation": ADAPTIVE, "checkpoint": {"interval": 1}, **sections})


@pytest.mark.distributed
def test_a_resumed_run_goes_on_with_what_it_had_learnt(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, train_here, _tree(tmp_path, 2))
    before = _saved(tmp_path, 2)
    assert len(before["lengths"]) == 16 and set(before["toggle"]["acceptance"]) == {"w4a16", "w8a8"}
    rank_pool.run(2, train_here, _tree(tmp_path, 3))
    after = _saved(tmp_path, 3)
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3]
    assert after["calibration"] == before["calibration"]  # which would be another one if it had been measured again
    known = [state["toggle"]["cost"]["cells"] for state in (before, after)]
    assert {tuple(cell[:2]) for cell in known[0]} <= {tuple(cell[:2]) for cell in known[1]}  # kind and batch size


@pytest.mark.distributed
def test_a_resumed_run_with_other_drafters_measures_again(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, train_here, _tree(tmp_path, 1))
    speculation = ADAPTIVE | {"drafter": DRAFTER | {"lm_head": "w8a8"}}
    rank_pool.run(1, train_here, _tree(tmp_path, 2, speculation=speculation))
    assert _saved(tmp_path, 1)["calibration"]["identity"]["formats"] == ["w4a16", "w8a8"]
    assert _saved(tmp_path, 2)["calibration"]["identity"]["formats"] == ["w4a16+head"]


@pytest.mark.distributed
def test_every_training_rollout_leaves_its_decisions(rank_pool: RankPool, tmp_path: Path) -> None:
    evaluation = {"interval": 1, "num_prompts": 4}
    rank_pool.run(2, train_here, _tree(tmp_path, 2, evaluation=evaluation))
    files = sorted((tmp_path / "run" / "decisions").iterdir())
    assert [file.name for file in files] == [
        f"step_0000000{step}.replica_0000{replica}.csv.gz" for step in (0, 1) for replica in (0, 1)
    ]
    rows = history(tmp_path)
    for step, row in enumerate(rows):
        traces = [DecisionTrace.read(file) for file in files[2 * step : 2 * step + 2]]
        assert sum(map(len, traces)) == row["rollout/decode_steps"]
        assert sum(trace.total("emitted") for trace in traces) == row["rollout/tokens"]
        assert 0 <= row["toggle/share_speculating"] <= 1 and row["coordinator/windows"] > 0


@pytest.mark.distributed
def test_decisions_are_kept_as_often_as_wanted(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, train_here, _tree(tmp_path, 3, speculation=ADAPTIVE | {"trace_interval": 2}))
    assert [file.name[:13] for file in sorted((tmp_path / "run" / "decisions").iterdir())] == ["step_00000000", "step_00000002"]


def test_shares_by_batch_size_add_up() -> None:
    trace = DecisionTrace()
    arms = [OFF, Arm("w4a16", 3), OFF, Arm("w4a16", 1), OFF]
    for arm, batch, seconds, emitted in zip(arms, (0, 1, 3, 4, 9), (1.0, 2.0, 3.0, 4.0, 5.0), (5, 3, 3, 6, 9), strict=True):
        load = Load(batch, 10.0, 0 if batch else 50)
        trace.append(0.0, StepDecision(arm, Reason.KEPT), StepOutcome(arm, load, seconds, emitted=emitted))
    decoding = {1: BatchShare(2.0, 3, 2.0, 6.0), 4: BatchShare(7.0, 9, 4.0, 4.0), 16: BatchShare(5.0, 9, 0.0, 0.0)}
    assert shares(trace) == {0: BatchShare(1.0, 5, 0.0, 0.0), **decoding}


def _calibration(config: Config, **other: Any) -> Calibration:
    """That fits a configuration, but for what is given."""
    architecture = policy_architecture(config.model)
    size = model_size(architecture, draft_weights(["w4a16", "w8a8"]))
    cost = PassCost(1e10, 1e11)
    identity = Identity(describe_shape(architecture), hardware_name(torch.device("cpu")), 1, ("w4a16", "w8a8"), "bfloat16")
    return Calibration(replace(identity, **other), Roofline(size, cost, cost, {"w4a16": cost, "w8a8": cost}))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "layers=2"}, "is for model layers=2, this run has layers="),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size 2, this run has 1"),
        ({"formats": ("fp8",)}, "formats fp8, this run has w4a16, w8a8"),
        ({"dtype": "float32"}, "dtype float32, this run has bfloat16"),
    ],
)
def test_a_calibration_of_something_else_is_refused_before_any_rank_starts(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    config = build_config(_tree(tmp_path, 1, speculation=ADAPTIVE | {"calibration": str(path)}))
    _calibration(config, **other).save(path)
    with pytest.raises(UserError, match=words):
        preflight(config)
    _calibration(config).save(path)
    assert preflight(config)
    path.write_text(path.read_text().replace("bandwidth", "bandwith"))
    with pytest.raises(UserError, match="damaged"):
        preflight(config)
    path.unlink()
    with pytest.raises(UserError, match="can't read calibration"):
        preflight(config)


@pytest.mark.distributed
def test_a_calibration_of_other_hardware_is_refused_by_the_ranks(rank_pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    tree = _tree(tmp_path, 1, speculation=ADAPTIVE | {"calibration": str(path)})
    _calibration(build_config(tree), hardware="A100").save(path)
    with pytest.raises(RankFailure, match="is for hardware A100, this run has"):
        rank_pool.run(1, train_here, tree)


def _forgotten(tree: dict[str, Any]) -> list[str]:
    """Names of the drafters that a training run's toggle forgets."""
    forget, names = Toggle.forget, []

    def recorded(self: Toggle, format: str) -> None:
        names.append(format)
        forget(self, format)

    Toggle.forget = recorded  # type: ignore[method-assign]
    try:
        train_here(tree)
    finally:
        Toggle.forget = forget  # type: ignore[method-assign]
    return names


@pytest.mark.distributed
@pytest.mark.parametrize(("format", "expected"), [("auto", ["auto"]), ("w4a16", [])])
def test_what_was_learnt_before_auto_chose_is_forgotten_once(
    rank_pool: RankPool, tmp_path: Path, format: str, expected: list[str]
) -> None:
    tree = _tree(tmp_path, 3, speculation=ADAPTIVE | {"drafter": {"format": format, "group_size": 16}})
    assert rank_pool.run(1, _forgotten, tree) == [expected]


def _train_with_a_stop(tree: dict[str, Any]) -> None:
    """Rank 1 stops in its first rollout, for longer than it is waited for."""
    begin = Coordination.begin

    def interrupted(self: Coordination, *args: Any) -> Recorder:
        return Recorder(begin(self, *args), [Event(1, "stop", 6.0)] if dist.get_rank() == 1 else [])

    Coordination.begin = interrupted  # type: ignore[assignment,method-assign]
    train_here(tree)


@pytest.mark.distributed
def test_replicas_that_lost_each_other_do_not_begin_another_rollout(tmp_path: Path) -> None:
    sections = {"parallel": {"timeout_seconds": 2}, "fault_tolerance": {"hang_seconds": 0}}
    tree = _tree(tmp_path, 2, speculation={"mode": "off"}, coordinator={"dispatch": "static"}, **sections)
    with pytest.raises(RankFailure, match="replicas lost each other in the last rollout"):
        RankPool().run(2, _train_with_a_stop, tree, timeout=120)
    assert [row["step"] for row in history(tmp_path)] == [1]


def _saved(folder: Path, step: int) -> dict[str, Any]:
    """What the rollouts of a run had learnt when it saved a step."""
    saved: dict[str, Any] = json.loads((folder / "run" / "checkpoints" / f"step_{step:08d}" / STATE).read_text())["rollout"]
    return saved
