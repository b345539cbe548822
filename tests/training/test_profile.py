"""Profiles of steps: a trace per rank of the steps that were asked for, with the phases by name."""

import gzip
import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from commands import invoke
from ranks import RankPool
from tiny_runs import tiny_tree, train_here, write_config

from erollout.tracking.profiler import StepProfiler, span

PHASES = {"step/refit", "step/rollout", "step/logprobs", "step/update"}
ENGINE = {"engine/schedule", "engine/draft", "engine/verify", "engine/sample"}


@pytest.mark.distributed
def test_a_profiled_step_leaves_a_trace_with_the_phases_by_name(rank_pool: RankPool, tmp_path: Path) -> None:
    speculation = {"mode": "always", "proposer": "ngram", "num_speculative_tokens": 1}
    train = {"steps": 3, "profile": {"steps": [2]}, "output_dir": str(tmp_path / "run")}
    rank_pool.run(2, train_here, tiny_tree(tmp_path, train=train, speculation=speculation, parallel={"world_size": 2}))
    files = sorted((tmp_path / "run" / "profile").iterdir())
    assert [file.name for file in files] == [f"step_00000002_rank_0000{rank}.json.gz" for rank in (0, 1)]
    with gzip.open(files[1]) as trace:
        events = json.load(trace)["traceEvents"]
    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    assert ranges.keys() >= PHASES | ENGINE
    rollout, draft = ranges["step/rollout"], ranges["engine/draft"]
    assert rollout["ts"] <= draft["ts"] <= draft["ts"] + draft["dur"] <= rollout["ts"] + rollout["dur"]


def test_a_profile_that_can_not_be_written_is_said_and_the_step_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("")
    with StepProfiler([2], str(tmp_path), rank=1)(2):
        torch.ones(1)
    assert all(words in caplog.text for words in ("train.profile.steps", "rank 1", "step_00000002_rank_00001"))


def test_without_a_profile_a_range_is_nothing() -> None:
    one, other = span("a"), span("b")
    assert one is other and isinstance(one, AbstractContextManager)


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("train", "train.profile.steps=[1, 3]", ["train.profile.steps = 3", "train.steps = 2"]),
        ("sft", "train.profile.steps=101", ["train.profile.steps = 101", "supervised.steps = 100"]),
        ("train", "train.profile.steps=[0]", ["train.profile.steps"]),
        ("train", "train.profile.steps=all", ["train.profile.steps"]),
        ("train", "train.profile=[1]", ["train.profile"]),
    ],
)
def test_steps_that_can_not_be_profiled_are_refused(command: str, override: str, words: list[str], tmp_path: Path) -> None:
    line = invoke(command, "--config", str(write_config(tmp_path)), "--dry-run", override).error()
    assert all(word in line for word in words), line
