"""A run that is killed, suspended and stopped at random, and started again each time, ends as one that was left alone."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launched import Launched
from ranks import RankPool
from tiny_runs import history, tiny_tree, train_here, write_config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from erollout.checkpoint.manifest import STATE, complete_checkpoints, damage
from erollout.tracking.journal import journal_path

INTERVAL = 2
STEPS = 60
DISTURBED_SECONDS = 240.0
COMPARED = ("train/loss", "train/grad_norm", "train/learning_rate", "reward/mean", "response_length/mean")


def _a_rank(run: Launched, rng: random.Random) -> psutil.Process | None:
    """None: the run has ended."""
    run.wait_until(lambda: run.process.poll() is not None or len(run.ranks()) == 2)
    ranks = run.ranks()
    return rng.choice(ranks) if ranks else None


def _kill_a_rank(run: Launched, rng: random.Random) -> None:
    with suppress(psutil.NoSuchProcess):
        if rank := _a_rank(run, rng):
            rank.kill()


def _kill_the_launcher(run: Launched, rng: random.Random) -> None:
    run.process.kill()


def _suspend_a_rank(run: Launched, rng: random.Random) -> None:
    with suppress(psutil.NoSuchProcess):
        if rank := _a_rank(run, rng):
            rank.suspend()
            time.sleep(rng.uniform(0.1, 2))
            rank.resume()


def _ask_to_requeue(run: Launched, rng: random.Random) -> None:
    run.process.send_signal(signal.SIGUSR1)


def _ask_to_stop(run: Launched, rng: random.Random) -> None:
    run.process.send_signal(signal.SIGTERM)


def _at_a_step(chaos: "Chaos", saved: int) -> bool:
    return chaos.reached() > saved


def _past_a_checkpoint(chaos: "Chaos", saved: int) -> bool:
    return chaos.saved() > saved and chaos.reached() > chaos.saved()


def _while_saving(chaos: "Chaos", saved: int) -> bool:
    with suppress(FileNotFoundError):  # it is complete now
        return any((chaos.run / "checkpoints").glob("*.partial/*"))
    return False


Moment = Callable[["Chaos", int], bool]
MOMENTS: tuple[Moment | None, ...] = (None, _at_a_step, _past_a_checkpoint, _while_saving)

Disturbance = Callable[[Launched, random.Random], None]
ENDS: tuple[Disturbance, ...] = (_kill_a_rank, _kill_the_launcher, _ask_to_requeue, _ask_to_stop)


class Chaos:
    """Starts a run again and again, as a scheduler would, until it says that it is done."""

    def __init__(self, folder: Path, rng: random.Random, most_lost: int = INTERVAL, **sections: dict[str, Any]) -> None:
        """`most_lost`: steps that an attempt may lose."""
        folder.mkdir()
        self.folder, self.run, self.rng, self.most_lost = folder, folder / "run", rng, most_lost
        self.config = write_config(folder, **sections)

    def attempt(self, moment: Moment | None = None, seconds: float = 0.0, *disturbances: Disturbance) -> bool:
        """One start of the run; whether it came to its end.

        Args:
            moment: that is waited for; None: the start.
            seconds: up to which time passes before each disturbance.
        """
        saved = self.saved()
        (self.run / "verdict").unlink(missing_ok=True)
        with Launched("train", "--config", str(self.config), output=self.folder / "output") as run:
            if moment is not None:
                run.wait_until(lambda: run.process.poll() is not None or moment(self, saved), pause=0.002)
            for disturbance in disturbances:
                time.sleep(self.rng.uniform(0, seconds))
                disturbance(run, self.rng)
            disturbed = time.monotonic()
            status = run.process.wait(280)
            run.wait_until_gone(10)
        names = ", ".join(function.__name__.strip("_") for function in (moment, *disturbances) if function) or "left alone"
        print(
            f"from step {saved}: {names}: status {status} after {time.monotonic() - disturbed:.1f} s, "
            f"verdict {self.verdict()}, did {self.reached()}, saved {self.saved()}"
        )
        self._check(status, was_killed=not {_kill_a_rank, _kill_the_launcher}.isdisjoint(disturbances))
        return self.verdict() == "done"

    def attempts(self) -> list[list[int]]:
        """The steps that each attempt did, as far as it began any."""
        found: list[list[int]] = []
        for record in self.records():
            if record["kind"] == "start":
                found.append([])
            elif record["kind"] == "metrics" and "reward/mean" in record["values"] | record.get("repeated", {}):
                found[-1].append(record["step"])
        return found

    def records(self) -> list[dict[str, Any]]:
        path, found = journal_path(self.run), []
        with suppress(FileNotFoundError):  # not there yet, or put aside by an attempt that begins anew
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # torn, or being written
                    found.append(json.loads(line))
        return found

    def verdict(self) -> str | None:
        path = self.run / "verdict"
        return path.read_text().strip() if path.exists() else None

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        found = complete_checkpoints(self.run / "checkpoints")
        return int(found[-1].name.removeprefix("step_")) if found else 0

    def reached(self) -> int:
        """The last step that the newest attempt has done; that of the checkpoint if it has done none."""
        return max(self.saved(), *itertools.chain(*self.attempts()[-1:]), 0)

    def _check(self, status: int, was_killed: bool) -> None:
        """What a run leaves, however it ended: whole checkpoints, and few steps lost."""
        for checkpoint in complete_checkpoints(self.run / "checkpoints"):
            assert damage(checkpoint) is None
        output = (self.folder / "output").read_text()
        assert self.reached() - self.saved() <= self.most_lost, output
        if self.verdict() is not None:
            late = (-signal.SIGKILL, 128 + signal.SIGKILL) if was_killed else ()  # after the verdict, before the launcher's end
            assert status in (0, 128 + signal.SIGTERM, *late) and self.reached() == self.saved(), output

    def check_attempts(self) -> None:
        """Each goes on behind a checkpoint, and does each step once."""
        done = 0
        for steps in filter(None, self.attempts()):
            assert steps == list(range(steps[0], steps[-1] + 1)) and done - self.most_lost < steps[0] <= done + 1, (
                self.attempts()
            )
            done = steps[-1]


def _sections(folder: Path, steps: int, **sections: Any) -> dict[str, Any]:
    return {
        "train": {"steps": steps, "output_dir": str(folder / "run"), "max_tokens_per_micro_batch": 256},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 3},
        "checkpoint": {"interval": INTERVAL},
        "parallel": {"world_size": 2},
        **sections,
    }


def _tensors(folder: Path, step: int) -> dict[str, Any]:
    """Whatever the checkpoint of a step holds: model, optimizer, counters."""
    whole = folder / f"whole-{step}.pt"
    dcp_to_torch_save(folder / "run" / "checkpoints" / f"step_{step:08d}", whole)
    return dict(_flat(torch.load(whole, weights_only=False)))


def _flat(tree: Any, prefix: str = "") -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        yield prefix, tree.getvalue() if hasattr(tree, "getvalue") else tree
        return
    for name, value in items:
        yield from _flat(value, f"{prefix}/{name}")


def _assert_same_end(folder: Path, unbroken: Path, steps: int) -> None:
    ours, theirs = history(folder), history(unbroken)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, steps + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert [mine[name] for name in COMPARED] == [other[name] for name in COMPARED], mine["step"]
    found, expected = _tensors(folder, steps), _tensors(unbroken, steps)
    assert found.keys() == expected.keys() and sum(isinstance(value, torch.Tensor) for value in found.values()) > 20
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


def _unbroken(rank_pool: RankPool, folder: Path, steps: int, **sections: Any) -> Path:
    folder.mkdir()
    rank_pool.run(2, train_here, tiny_tree(folder, **_sections(folder, steps, **sections)))
    return folder


@pytest.mark.end_to_end
def test_a_run_that_is_killed_and_suspended_ends_as_one_that_was_left_alone(rank_pool: RankPool, tmp_path: Path) -> None:
    unbroken = _unbroken(rank_pool, tmp_path / "unbroken", 6)
    unhurried = {"function": "unhurried_scorer:a_second"}  # time to disturb it
    chaos = Chaos(tmp_path / "chaos", random.Random(0), **_sections(tmp_path / "chaos", 6, rewards=unhurried))
    assert not chaos.attempt(_past_a_checkpoint, 0.0, _kill_the_launcher)
    assert chaos.attempt(_at_a_step, 0.5, _suspend_a_rank)
    chaos.check_attempts()
    _assert_same_end(chaos.folder, unbroken, 6)


@pytest.mark.cluster
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "asynchronous"])
def test_a_run_that_is_disturbed_for_minutes_ends_as_one_that_was_left_alone(
    asynchronous: bool, rank_pool: RankPool, tmp_path: Path
) -> None:
    """With drafts and MLflow. EROLLOUT_CHAOS_SEED repeats the choices, though not the times that the machine adds.

    A checkpoint that is written beside training is whole one interval later at most.
    """
    seed = int(os.environ.get("EROLLOUT_CHAOS_SEED") or random.randrange(10**6))
    print(f"EROLLOUT_CHAOS_SEED={seed}")
    rng = random.Random(seed)
    drafter = {"format": "w4a16_clip", "group_size": 16, "statistics_tokens": 64, "statistics_interval": 3}
    unbroken = _unbroken(rank_pool, tmp_path / "unbroken", STEPS)
    chaos = Chaos(
        tmp_path / "chaos",
        rng,
        2 * INTERVAL if asynchronous else INTERVAL,
        **_sections(tmp_path / "chaos", STEPS, checkpoint={"interval": INTERVAL, "asynchronous": asynchronous}),
        speculation={"mode": "always", "num_speculative_tokens": 3, "drafter": drafter},
        tracking={"enabled": True, "system_metrics": False},
    )
    plan = itertools.chain.from_iterable(_shuffled(rng) for _ in itertools.count())
    done, until = False, time.monotonic() + DISTURBED_SECONDS
    while not done and time.monotonic() < until:
        moment, end = next(plan)
        first = [_suspend_a_rank] * rng.randrange(2)
        done = chaos.attempt(moment, rng.choice((0.1, 1.0)) if moment else 12.0, *first, end)
    assert done or chaos.attempt()
    chaos.check_attempts()
    _assert_same_end(chaos.folder, unbroken, STEPS)
    _check_store(chaos)


def _shuffled(rng: random.Random) -> list[tuple[Moment | None, Disturbance]]:
    """Every moment with every end."""
    plan = list(itertools.product(MOMENTS, ENDS))
    rng.shuffle(plan)
    return plan


def _check_store(chaos: Chaos) -> None:
    """One MLflow run has every step once; those of attempts that never got to a checkpoint are closed.

    FAILED: by a rank that survived another one. KILLED: by the next attempt.
    """
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{chaos.run}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    last = json.loads((chaos.run / "checkpoints" / f"step_{STEPS:08d}" / STATE).read_text())["run_id"]
    for run in runs:
        assert run.info.status in (("FINISHED",) if run.info.run_id == last else ("FAILED", "KILLED")), runs
    steps = [point.step for point in client.get_metric_history(last, "reward/mean")]
    assert sorted(steps) == list(range(1, STEPS + 1))
