"""An algorithm that selects its groups: prompts are drawn until a step has enough, and a run that stops on the way resumes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from tiny_runs import history, tiny_tree, train_here

from erollout.checkpoint.checkpointer import partial_rollouts_file
from erollout.checkpoint.manifest import STATE, complete_checkpoints

COMPARED = ("train/loss", "train/grad_norm", "reward/mean", "rollout/rollouts", "rollout/dropped_groups", "rollout/tokens")


def choosy_train(tree: dict[str, Any], max_rollouts: int, stops_in: int | None = None) -> None:
    """A run that trains on prompts of even index alone, asked to stop in its `stops_in`-th training rollout."""
    from erollout import algorithm
    from erollout.algorithm.grpo import GRPO
    from erollout.rollout.rollout_worker import TRAINING_STREAM, RolloutWorker

    class Choosy(GRPO):
        def select(self, group: Any) -> bool:
            return group[0].rollout.prompt_index % 2 == 0

    Choosy.max_rollouts = max_rollouts
    rollout, text = RolloutWorker.rollout, RolloutWorker.text
    rollouts = 0

    def counted(self: Any, prompts: Any, sampling: Any, size: int, stream: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal rollouts
        rollouts += stream == TRAINING_STREAM
        return rollout(self, prompts, sampling, size, stream, *args, **kwargs)

    def asked(self: Any, response: Any) -> str:
        if rollouts == stops_in:
            os.kill(os.getpid(), signal.SIGUSR1)
        return text(self, response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(algorithm._ALGORITHMS, "grpo", Choosy)
        patch.setattr(RolloutWorker, "rollout", counted)
        patch.setattr(RolloutWorker, "text", asked)
        train_here(tree)


def _tree(folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    tree = tiny_tree(folder, checkpoint={"interval": 100}, train={"output_dir": str(folder / "run")})
    tree["rollout"] |= {"max_num_seqs": 3}
    return tree


def _newest(folder: Path) -> tuple[int, int, list[str]]:
    """Step and cursor of the newest checkpoint, and what it keeps of rollouts."""
    path = complete_checkpoints(folder / "run" / "checkpoints")[-1]
    state = json.loads((path / STATE).read_text())
    return state["step"], state["cursor"], sorted(file.name for file in path.glob("rollouts*"))


@pytest.mark.distributed
def test_prompts_are_drawn_until_a_step_has_its_groups_also_when_it_is_interrupted(rank_pool: RankPool, tmp_path: Path) -> None:
    unbroken, broken = _tree(tmp_path / "unbroken"), _tree(tmp_path / "broken")
    rank_pool.run(1, choosy_train, unbroken, 9)
    wanted = history(tmp_path / "unbroken")
    # prompts 0 to 3 bring two groups, 4 and 5 one, 6 the last; then 7 to 10, 11 and 12, 13, 14
    assert [row["rollout/rollouts"] for row in wanted] == [3.0, 4.0]
    assert [row["rollout/dropped_groups"] for row in wanted] == [3.0, 4.0]
    assert _newest(tmp_path / "unbroken") == (2, 15, [])
    rank_pool.run(1, choosy_train, broken, 9, 2)
    assert _newest(tmp_path / "broken") == (0, 0, [partial_rollouts_file(0), partial_rollouts_file(1)])
    rank_pool.run(1, choosy_train, broken, 9, 5)  # the first step takes three, and this is the second of the next
    assert _newest(tmp_path / "broken") == (1, 7, [partial_rollouts_file(0), partial_rollouts_file(1)])
    rank_pool.run(1, choosy_train, broken, 9)
    assert _newest(tmp_path / "broken") == (2, 15, [])
    ours = history(tmp_path / "broken")
    assert [[row[name] for name in COMPARED] for row in ours] == [[row[name] for name in COMPARED] for row in wanted]


@pytest.mark.distributed
def test_what_is_missing_after_the_last_rollout_is_made_up_from_groups_that_were_not_selected(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    rank_pool.run(1, choosy_train, _tree(tmp_path), 2)
    first, second = history(tmp_path)
    assert [row["rollout/rollouts"] for row in (first, second)] == [2.0, 2.0]
    assert [row["rollout/dropped_groups"] for row in (first, second)] == [2.0, 2.0]
    assert _newest(tmp_path)[:2] == (2, 12)
