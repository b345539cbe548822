"""Runs that are asked to stop in the middle of a rollout: they end there, keep its tokens, and go on as if unbroken."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import RankFailure, RankPool
from safetensors.torch import load_file
from tiny_runs import history, tiny_tree, train_here

from erollout.checkpoint.checkpointer import PARTIAL_ROLLOUTS
from erollout.checkpoint.manifest import complete_checkpoints
from erollout.rollout.partial import PartialRollouts
from erollout.tracking.journal import journal_path, read_history

STEPS = 3
COMPARED = ("train/loss", "train/grad_norm", "reward/mean", "response_length/mean")
COUPLED = {"mode": "always", "verification": "coupled", "drafter": {"format": "w4a16", "group_size": 16}}


def asked_train(tree: dict[str, Any], stream: int, step: int, responses: int, dies: bool = False) -> None:
    """A run in which every rank gets SIGUSR1 as soon as it has completed so many responses of a rollout.

    It is slow from then on, so that few more are completed before all ranks have agreed on it.
    `dies`: while the checkpoint takes the place of one of the same step.
    """
    from erollout.rollout.rollout_worker import RolloutWorker

    rollout, text, generate = RolloutWorker.rollout, RolloutWorker.text, RolloutWorker._generate
    here: list[tuple[int, int]] = [(-1, -1)]
    samples_now, complete = False, 0

    def noted_rollout(
        self: Any, prompts: Any, sampling: Any, size: int, stream: int, step: int, *args: Any, **kwargs: Any
    ) -> Any:
        here[0] = stream, step
        return rollout(self, prompts, sampling, size, stream, step, *args, **kwargs)

    def noted_generate(self: Any, *args: Any) -> Any:
        nonlocal samples_now
        samples_now = here[0] == (stream, step)  # before, what an earlier attempt has completed is scored
        return generate(self, *args)

    def counted_text(self: Any, response: Any) -> str:
        nonlocal complete
        if samples_now:
            complete += 1
            if complete == responses:
                os.kill(os.getpid(), signal.SIGUSR1)
            if complete >= responses:
                time.sleep(0.2)
        return text(self, response)

    def last_rename(written: Path, target: Path) -> Path:
        if dies and target.parent.name == "checkpoints" and written.suffix == ".partial":
            os._exit(9)
        return rename(written, target)

    rename = Path.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", last_rename)
        patch.setattr(RolloutWorker, "rollout", noted_rollout)
        patch.setattr(RolloutWorker, "text", counted_text)
        patch.setattr(RolloutWorker, "_generate", noted_generate)
        train_here(tree)


def train_terminated_in_scoring(tree: dict[str, Any]) -> None:
    """A run in which SIGTERM reaches every process as the second rollout's responses begin to be scored."""
    from erollout.rewards.pool import RewardPool

    collect, submit = RewardPool.collect, RewardPool.submit
    calls, held = 0, []

    def later(self: RewardPool, *args: Any) -> None:
        if calls == 1:
            held.append(args)
        else:
            submit(self, *args)

    def disturbed(self: RewardPool, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            for response in held:
                submit(self, *response)
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):  # a scorer's child
                    process.terminate()
        return collect(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardPool, "submit", later)
        patch.setattr(RewardPool, "collect", disturbed)
        train_here(tree)


def _tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    given = {
        "checkpoint": {"interval": 100, "export_path": str(folder / "exported")},
        "evaluation": {"interval": 2, "num_prompts": 6, "samples_per_prompt": 2},
        "speculation": {"mode": "off"},
    }
    tree = tiny_tree(folder, **(given | sections))
    tree["rollout"] |= {"max_num_seqs": 3, "max_tokens": 40}
    tree["train"]["steps"] = STEPS
    return tree


def _kept(folder: Path) -> tuple[str, PartialRollouts | None]:
    """The newest checkpoint's name, and what it keeps of a rollout."""
    newest = complete_checkpoints(folder / "run" / "checkpoints")[-1]
    file = newest / PARTIAL_ROLLOUTS
    return newest.name, PartialRollouts.from_bytes(file.read_bytes()) if file.exists() else None


def _assert_same_run(folder: Path, unbroken: Path) -> None:
    ours, theirs = history(folder), history(unbroken)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in COMPARED:
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    evaluations, others = (
        [r for r in read_history(journal_path(f / "run")) if "evaluation/pass_at_1" in r] for f in (folder, unbroken)
    )
    assert [row["step"] for row in evaluations] == [row["step"] for row in others]
    weights, wanted = (load_file(path / "exported" / "model.safetensors") for path in (folder, unbroken))
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def unbroken(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    rank_pool.run(2, train_here, _tree(folder))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("speculation", [{"mode": "off"}, COUPLED], ids=["off", "coupled"])
def test_a_run_interrupted_in_two_rollouts_ends_as_an_unbroken_one(
    speculation: dict[str, Any], rank_pool: RankPool, unbroken: Path, tmp_path: Path
) -> None:
    tree = _tree(tmp_path, speculation=speculation)
    rank_pool.run(2, asked_train, tree, 0, 0, 2)
    name, first = _kept(tmp_path)
    assert (tmp_path / "run" / "verdict").read_text() == "requeue\n"
    assert name == "step_00000000" and first is not None and first.finished and first.begun
    rank_pool.run(2, asked_train, tree, 0, 0, 2)
    name, second = _kept(tmp_path)
    assert name == "step_00000000" and second is not None and len(first.finished) < len(second.finished) < 16
    assert second.num_tokens > first.num_tokens
    rank_pool.run(2, asked_train, tree, 0, 1, 3)
    name, third = _kept(tmp_path)
    assert name == "step_00000001" and third is not None
    rank_pool.run(2, train_here, tree)
    assert _kept(tmp_path) == ("step_00000003", None)
    _assert_same_run(tmp_path, unbroken)
    resumed = [(row["rollout/resumed_samples"], row["rollout/kept_tokens"]) for row in history(tmp_path)]
    assert resumed == [(len(second.samples), second.num_tokens), (len(third.samples), third.num_tokens), (0, 0)]


@pytest.mark.distributed
def test_an_interrupted_evaluation_is_made_by_the_next_attempt(rank_pool: RankPool, unbroken: Path, tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    for step in (0, 2, 3):
        rank_pool.run(2, asked_train, tree, 1, step, 2)
        assert (tmp_path / "run" / "verdict").read_text() == "requeue\n"
        if step:
            assert _kept(tmp_path) == (f"step_{step:08d}", None)
        else:
            assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []
    rank_pool.run(2, train_here, tree)
    assert (tmp_path / "run" / "verdict").read_text() == "done\n"
    _assert_same_run(tmp_path, unbroken)


@pytest.mark.distributed
def test_what_a_signal_did_to_scoring_is_scored_again(rank_pool: RankPool, unbroken: Path, tmp_path: Path) -> None:
    tree = _tree(tmp_path, rewards={"function": "toy_scorer:by_a_child"}, evaluation={"interval": 0})
    with pytest.raises(RankFailure, match="143"):
        rank_pool.run(2, train_terminated_in_scoring, tree)
    name, kept = _kept(tmp_path)
    assert name == "step_00000001" and kept is not None and len(kept.finished) == 16
    rank_pool.run(2, train_here, tree)
    ours, theirs = history(tmp_path), history(unbroken)
    for name in COMPARED:
        assert [row[name] for row in ours] == [row[name] for row in theirs], name


@pytest.mark.distributed
def test_a_crash_while_a_checkpoint_is_replaced_loses_none(rank_pool: RankPool, unbroken: Path, tmp_path: Path) -> None:
    """The same step is saved twice, as its rollout is interrupted twice, and nothing else is kept."""
    tree = _tree(tmp_path, checkpoint={"interval": 100, "keep_last": 1, "export_path": str(tmp_path / "exported")})
    rank_pool.run(2, asked_train, tree, 0, 1, 2)
    name, kept = _kept(tmp_path)
    assert name == "step_00000001" and kept is not None
    with pytest.raises(RankFailure, match="rank 0 died"):
        rank_pool.run(2, asked_train, tree, 0, 1, 2, True)
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []
    rank_pool.run(2, train_here, tree)
    _assert_same_run(tmp_path, unbroken)
    assert history(tmp_path)[1]["rollout/resumed_samples"] == len(kept.samples)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.distributed
def test_the_first_rollout_goes_on_with_any_optimizer(rank_pool: RankPool, tmp_path: Path) -> None:
    """It has no state yet that could be saved."""
    sections = {"model": tiny_tree(tmp_path)["model"] | {"dtype": "bfloat16"}, "evaluation": {"interval": 0}}
    trees = {}
    for name in ("broken", "whole"):
        folder = tmp_path / name
        trees[name] = _tree(folder, **sections)
        trees[name]["optimizer"]["use_distributed_optimizer"] = True
    rank_pool.run(2, asked_train, trees["broken"], 0, 0, 3)
    assert _kept(tmp_path / "broken")[0] == "step_00000000"
    for tree in trees.values():
        rank_pool.run(2, train_here, tree)
    _assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.distributed
def test_another_number_of_replicas_goes_on(rank_pool: RankPool, unbroken: Path, tmp_path: Path) -> None:
    """One response's log-probs differ by rounding in the update alone: another layout of training."""
    rank_pool.run(2, asked_train, _tree(tmp_path), 0, 1, 3)
    rank_pool.run(1, train_here, _tree(tmp_path))
    ours, theirs = history(tmp_path)[1], history(unbroken)[1]
    assert ours["rollout/kept_tokens"] > 0
    for name in ("reward/mean", "response_length/mean"):
        assert ours[name] == theirs[name], name
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3, abs=1e-4)


@pytest.mark.distributed
def test_without_checkpoints_nothing_is_saved(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, asked_train, _tree(tmp_path, checkpoint={"interval": 0}), 0, 0, 2)
    assert (tmp_path / "run" / "verdict").read_text() == "stopped\n" and history(tmp_path) == []
    assert not (tmp_path / "run" / "checkpoints").exists()
