"""Runs that are interrupted at each moment of a step: they end there, keep what was sampled, and resume as if unbroken."""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import RankFailure, RankPool
from safetensors.torch import load_file
from tiny_runs import history, tiny_tree, train_here

from erollout.checkpoint.checkpointer import PARTIAL_ROLLOUTS
from erollout.checkpoint.manifest import STATE, complete_checkpoints
from erollout.rollout.partial import PartialRollouts
from erollout.tracking.journal import journal_path, read_history

STEPS = 3
COMPARED = ("train/loss", "train/grad_norm", "reward/mean", "response_length/mean")
DRAFTER = {"format": "w4a16_clip", "group_size": 16, "statistics_tokens": 64}
COUPLED = {"mode": "always", "verification": "coupled", "drafter": DRAFTER}


@dataclass(frozen=True)
class Interruption:
    """What ends one start of a run, and the step of the newest checkpoint that it leaves."""

    moment: str
    step: int
    """The first is 0."""
    saved: int | None
    keeps: bool = False
    """Whether the checkpoint holds a part of a rollout."""
    speculates: bool = False
    """Each start may follow one that did and one that did not."""
    verdict: str = "requeue"
    status: int = 0


INTERRUPTIONS = (
    Interruption("evaluation", 0, None),
    Interruption("rollout", 0, 0, keeps=True, speculates=True),
    Interruption("rollout", 0, 0, keeps=True),  # the same one again
    Interruption("update", 0, 1, speculates=True),
    Interruption("scoring", 1, 1, keeps=True, speculates=True, verdict="stopped", status=143),
    Interruption("evaluation", 2, 2, speculates=True),
    Interruption("rollout", 2, 2, keeps=True),
    Interruption("saving", 2, None),
    Interruption("evaluation", 3, 3, speculates=True),
)
"""In the order in which one run meets them."""
LAYOUTS: dict[str, dict[str, int]] = {"data": {}, "pipeline": {"pipeline_model_parallel_size": 2}}


def interrupted_train(tree: dict[str, Any], moment: str, step: int, responses: int = 2) -> int | str | None:
    """A run that is interrupted at a moment of a step, and the status that it exits with.

    In a rollout or evaluation every rank gets SIGUSR1 once it has completed so many responses, in an update one rank alone; as
    responses begin to be scored, SIGTERM reaches every process; as a checkpoint takes the place of one of the same step, the
    process ends.
    """
    patches = {"update": _asks_in_update, "scoring": _terminates_in_scoring}
    with pytest.MonkeyPatch.context() as patch:
        if moment in patches:
            patches[moment](patch, step)
        else:
            _asks_in_rollout(patch, int(moment == "evaluation"), step, responses)
        if moment == "saving":
            _dies_in_the_last_rename(patch)
        try:
            train_here(tree)
        except SystemExit as ended:
            return ended.code
    return 0


def _asks_in_rollout(patch: pytest.MonkeyPatch, stream: int, step: int, responses: int) -> None:
    """It is slow from then on, so that few more are completed before all ranks have agreed on it."""
    from erollout.rollout.decode_replica import DecodeReplica
    from erollout.rollout.rollout_worker import RolloutWorker

    rollout, text, sample = RolloutWorker.rollout, RolloutWorker.text, DecodeReplica.sample
    here: list[tuple[int, int]] = [(-1, -1)]
    samples_now, complete = False, 0

    def noted_rollout(
        self: Any, prompts: Any, sampling: Any, size: int, stream: int, step: int, *args: Any, **kwargs: Any
    ) -> Any:
        here[0] = stream, step
        return rollout(self, prompts, sampling, size, stream, step, *args, **kwargs)

    def noted_sample(self: Any, *args: Any) -> Any:
        nonlocal samples_now
        samples_now = here[0] == (stream, step)  # before, what an earlier attempt has completed is scored
        return sample(self, *args)

    def counted_text(self: Any, response: Any) -> str:
        nonlocal complete
        if samples_now:
            complete += 1
            if complete == responses:
                os.kill(os.getpid(), signal.SIGUSR1)
            if complete >= responses:
                time.sleep(0.2)
        return text(self, response)

    patch.setattr(RolloutWorker, "rollout", noted_rollout)
    patch.setattr(RolloutWorker, "text", counted_text)
    patch.setattr(DecodeReplica, "sample", noted_sample)


def _asks_in_update(patch: pytest.MonkeyPatch, step: int) -> None:
    import torch.distributed as dist

    from erollout.training.updates import Updates

    make = Updates.make

    def asked(self: Updates, batches: Any, now: int) -> Any:
        if now == step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return make(self, batches, now)

    patch.setattr(Updates, "make", asked)


def _terminates_in_scoring(patch: pytest.MonkeyPatch, step: int) -> None:
    from erollout.rewards.pool import RewardPool
    from erollout.training.trainer import Trainer

    collect, submit, train_step = RewardPool.collect, RewardPool.submit, Trainer.train_step
    now, held = [-1], []

    def noted_step(self: Trainer, number: int, phase: Any) -> Any:
        now[0] = number
        return train_step(self, number, phase)

    def later(self: RewardPool, *args: Any) -> None:
        if now[0] == step:
            held.append(args)
        else:
            submit(self, *args)

    def disturbed(self: RewardPool, *args: Any) -> Any:
        if now[0] == step:
            for response in held:
                submit(self, *response)
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):  # a scorer's child
                    process.terminate()
        return collect(self, *args)

    patch.setattr(Trainer, "train_step", noted_step)
    patch.setattr(RewardPool, "submit", later)
    patch.setattr(RewardPool, "collect", disturbed)


def _dies_in_the_last_rename(patch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def dies(written: Path, target: Path) -> Path:
        if target.parent.name == "checkpoints" and written.suffix == ".partial":
            os._exit(9)
        return rename(written, target)

    patch.setattr(Path, "rename", dies)


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


def _kept(folder: Path) -> tuple[int | None, PartialRollouts | None]:
    """Step of the newest checkpoint, and what it keeps of a rollout."""
    found = complete_checkpoints(folder / "run" / "checkpoints")
    if not found:
        return None, None
    file = found[-1] / PARTIAL_ROLLOUTS
    return int(found[-1].name.removeprefix("step_")), PartialRollouts.from_bytes(file.read_bytes()) if file.exists() else None


def _of_the_drafter(folder: Path) -> Any:
    """What the newest checkpoint has of the drafter."""
    return json.loads((complete_checkpoints(folder / "run" / "checkpoints")[-1] / STATE).read_text())["rollout"]["drafter"]


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


@pytest.mark.distributed
@pytest.mark.timeout(900)  # eleven runs
@pytest.mark.parametrize("layout", ["data", pytest.param("pipeline", marks=pytest.mark.full)])
def test_a_run_interrupted_at_every_moment_ends_as_an_unbroken_one(layout: str, rank_pool: RankPool, tmp_path: Path) -> None:
    """Some of the starts speculate."""
    sections: dict[str, Any] = {"parallel": LAYOUTS[layout]}
    rank_pool.run(2, train_here, _tree(tmp_path / "unbroken", **sections))
    folder = tmp_path / "broken"
    sections["checkpoint"] = {"interval": 100, "keep_last": 1, "export_path": str(folder / "exported")}
    resumed: dict[int, PartialRollouts] = {}
    learnt: dict[tuple[str, int], Any] = {}
    for there in INTERRUPTIONS:
        scorer = {"function": "toy_scorer:by_a_child"} if there.moment == "scoring" else {}
        speculation = COUPLED if there.speculates else {"mode": "off"}
        tree = _tree(folder, speculation=speculation, rewards=scorer, **sections)
        if there.moment == "saving":
            with pytest.raises(RankFailure, match="rank 0 died"):
                rank_pool.run(2, interrupted_train, tree, there.moment, there.step)
        else:
            assert rank_pool.run(2, interrupted_train, tree, there.moment, there.step) == [there.status] * 2, there
            assert (folder / "run" / "verdict").read_text() == f"{there.verdict}\n", there
        step, kept = _kept(folder)
        assert (step, kept is not None) == (there.saved, there.keeps), there
        if kept is not None:
            assert there.moment == "scoring" or (len(kept.finished) < 16 and kept.begun), there
            if (before := resumed.get(there.step)) is not None:
                assert kept.num_tokens > before.num_tokens and len(kept.finished) > len(before.finished), there
            resumed[there.step] = kept
        if there.speculates:
            learnt[there.moment, there.step] = _of_the_drafter(folder)
    assert len(resumed[1].finished) == 16, "what was being scored is complete"
    first = learnt["update", 0]
    assert first["tokens"] and learnt["scoring", 1] == learnt["evaluation", 2] == first, "its resumes learn nothing anew"
    rank_pool.run(2, train_here, _tree(folder, **sections))
    assert (folder / "run" / "verdict").read_text() == "done\n"
    _assert_same_run(folder, tmp_path / "unbroken")
    rows = [(row["rollout/resumed_samples"], row["rollout/kept_tokens"]) for row in history(folder)]
    assert rows == [(len(resumed[step].samples), resumed[step].num_tokens) for step in range(STEPS)]
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    assert _kept(folder) == (3, None)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.full)])
def test_a_distributed_optimizer_resumes_with_its_state_and_before_it_has_any(
    dtype: str, rank_pool: RankPool, tmp_path: Path
) -> None:
    sections = {"model": tiny_tree(tmp_path)["model"] | {"dtype": dtype}, "evaluation": {"interval": 0}}
    trees = {}
    for name in ("broken", "whole"):
        folder = tmp_path / name
        trees[name] = _tree(folder, **sections)
        trees[name]["optimizer"]["use_distributed_optimizer"] = True
    for moment, step in (("rollout", 0), ("update", 1)):
        rank_pool.run(2, interrupted_train, trees["broken"], moment, step)
    for tree in trees.values():
        rank_pool.run(2, train_here, tree)
    _assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert history(tmp_path / "broken")[0]["rollout/resumed_samples"] > 0


@pytest.mark.distributed
def test_without_checkpoints_nothing_is_saved(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, interrupted_train, _tree(tmp_path, checkpoint={"interval": 0}), "rollout", 0)
    assert (tmp_path / "run" / "verdict").read_text() == "stopped\n" and history(tmp_path) == []
    assert not (tmp_path / "run" / "checkpoints").exists()
