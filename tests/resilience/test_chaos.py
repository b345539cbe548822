"""A run that is killed, suspended and stopped at random, and started again each time, ends as one that was left alone."""

import itertools
import json
import os
import random
import re
import signal
import socket
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


def _kill_the_last_rank(run: Launched, rng: random.Random) -> None:
    run.ranks()[-1].kill()


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


def _as_a_rank_begins(chaos: "Chaos", saved: int) -> bool:
    return chaos.launched is not None and bool(chaos.launched.ranks())


def _at_a_step(chaos: "Chaos", saved: int) -> bool:
    return chaos.begun() > chaos.before and bool(chaos.attempts()[-1])


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
        self.launched: Launched | None = None
        self.status = 0
        self.before = 0.0
        """When the attempt before had begun."""

    def attempt(self, moment: Moment | None = None, seconds: float = 0.0, *disturbances: Disturbance) -> bool:
        """One start of the run; whether it came to its end.

        Args:
            moment: that is waited for; None: the start.
            seconds: up to which time passes before each disturbance.
        """
        saved, self.before = self.saved(), self.begun()
        (self.run / "verdict").unlink(missing_ok=True)
        (self.folder / "output").unlink(missing_ok=True)
        with Launched("train", "--config", str(self.config), output=self.folder / "output") as run:
            self.launched = run
            if moment is not None:
                pause = 0.002 if moment is _while_saving else 0.05
                run.wait_until(lambda: run.process.poll() is not None or moment(self, saved), pause=pause)
            for disturbance in disturbances:
                time.sleep(self.rng.uniform(0, seconds))
                disturbance(run, self.rng)
            disturbed = time.monotonic()
            self.status = run.process.wait(280)
            run.wait_until_gone(10)
        names = ", ".join(function.__name__.strip("_") for function in (moment, *disturbances) if function) or "left alone"
        print(
            f"from step {saved}: {names}: status {self.status} after {time.monotonic() - disturbed:.1f} s, "
            f"verdict {self.verdict()}, did {self.reached()}, saved {self.saved()}"
        )
        self._check(was_killed=not {_kill_a_rank, _kill_the_launcher}.isdisjoint(disturbances))
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

    def begun(self) -> float:
        """When the newest attempt began to train; 0: none has."""
        return max((record["time"] for record in self.records() if record["kind"] == "start"), default=0.0)

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

    def said(self) -> str:
        """What the last attempt printed."""
        return (self.folder / "output").read_text()

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        found = complete_checkpoints(self.run / "checkpoints")
        return int(found[-1].name.removeprefix("step_")) if found else 0

    def reached(self) -> int:
        """The last step that the newest attempt has done; that of the checkpoint if it has done none."""
        return max(self.saved(), *itertools.chain(*self.attempts()[-1:]), 0)

    def _check(self, was_killed: bool) -> None:
        """What a run leaves, however it ended: whole checkpoints, and few steps lost."""
        for checkpoint in complete_checkpoints(self.run / "checkpoints"):
            assert damage(checkpoint) is None
        output = self.said()
        assert self.reached() - self.saved() <= self.most_lost, output
        if self.verdict() is not None:
            late = (-signal.SIGKILL, 128 + signal.SIGKILL) if was_killed else ()  # after the verdict, before the launcher's end
            assert self.status in (0, 128 + signal.SIGTERM, *late) and self.reached() == self.saved(), output

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


@pytest.mark.full  # quick: test_interrupted_runs, and test_watchdog_launched where a launcher is killed
@pytest.mark.end_to_end
@pytest.mark.timeout(900)  # three starts
def test_a_run_that_is_disturbed_in_every_way_ends_as_one_that_was_left_alone(rank_pool: RankPool, tmp_path: Path) -> None:
    """Each start of the same command ends by another cause; two nodes that meet take the last one."""
    steps = 10
    unbroken = _unbroken(rank_pool, tmp_path / "unbroken", steps)
    unhurried = {"function": "unhurried_scorer:half_a_second"}  # time to disturb it
    chaos = Chaos(tmp_path / "chaos", random.Random(0), **_sections(tmp_path / "chaos", 1000, rewards=unhurried))

    assert not chaos.attempt(_past_a_checkpoint, 0.0, _suspend_a_rank, _kill_the_last_rank)
    assert chaos.status == 128 + signal.SIGKILL
    assert re.search(rf"error: rank 1 \(pid \d+, host {socket.gethostname()}\) was ended by SIGKILL; possibly", chaos.said())
    (chaos.run / "checkpoints" / "step_00000099.partial").mkdir()  # left by a crash in the middle of saving

    assert not chaos.attempt(_at_a_step, 0.0, _kill_the_launcher), "its ranks, which nothing else has disturbed, end with it"
    assert chaos.status == -signal.SIGKILL and 0 < chaos.reached() < steps
    outputs = _on_two_nodes(chaos, f"train.steps={steps}", "rewards.function=toy_scorer:share_of_digits")
    assert chaos.verdict() == "done" and any("training tensor 1 x data 2" in output for output in outputs), outputs
    chaos.check_attempts()
    _assert_same_end(chaos.folder, unbroken, steps)


@pytest.mark.full
@pytest.mark.timeout(900)  # two starts
def test_the_launcher_passes_requests_on_and_waits_even_for_ranks_that_do_not_listen_yet(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path / "chaos", random.Random(0), **_sections(tmp_path / "chaos", 1000))
    assert not chaos.attempt(_as_a_rank_begins, 0.0, _ask_to_requeue)
    assert (chaos.status, chaos.verdict()) == (0, "requeue") and "Traceback" not in chaos.said()
    assert not chaos.attempt(_at_a_step, 0.0, _ask_to_stop)
    assert (chaos.status, chaos.verdict()) == (128 + signal.SIGTERM, "stopped") and "Traceback" not in chaos.said()


def _on_two_nodes(chaos: Chaos, *overrides: str) -> list[str]:
    """One start of the run by two agents that meet: what they print. Each rank's output is in a file too."""
    logs = chaos.folder / "logs"
    where = ["--nodes", "2", "--nproc-per-node", "1", "--head", "127.0.0.1", "--interface", "lo", "--log-dir", str(logs)]
    arguments = ["launch", "torchrun", *where, "--config", str(chaos.config), "--", *overrides]
    files = [chaos.folder / f"node-{node}" for node in range(2)]
    with Launched(*arguments, output=files[0]) as first, Launched(*arguments, output=files[1]) as second:
        statuses = [agent.process.wait(280) for agent in (first, second)]
    outputs = [file.read_text() for file in files]
    assert statuses == [0, 0], outputs
    assert {file.name for file in logs.iterdir()} == {f"rank_0000{rank}.{kind}" for rank in range(2) for kind in ("out", "err")}
    assert any(line.startswith("rank 0: ") and " step=10/10 " in line for output in outputs for line in output.splitlines())
    assert " step=10/10 " in (logs / "rank_00000.out").read_text()
    assert "training tensor 1 x data 2" in (logs / "rank_00000.err").read_text()
    return outputs


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
