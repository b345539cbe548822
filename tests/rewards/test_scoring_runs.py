"""Runs whose scorers fail: what is said, counted and saved. On this process's one rank."""

import json
from pathlib import Path
from typing import Any

from commands import invoke
from tiny_runs import all_rows, history, write_config

SCORES = """
from pathlib import Path
def half(prompt, response):
    if len(response) % 2:
        raise KeyError(f"no mark in {response!r}")
    return 0.25
def until_told(prompt, response):
    if prompt.index >= 4 and not response.endswith(str(prompt.item["answer"])):
        raise ConnectionError("the judge is gone")
    return float(len(response) % 3)
"""


def tiny(folder: Path, function: str, **sections: dict[str, Any]) -> str:
    (folder / "scores.py").write_text(SCORES)
    rollout = {"dtype": "float32"} | sections.pop("rollout", {})
    rewards = {"function": function} | sections.pop("rewards", {})
    return str(write_config(folder, rollout=rollout, rewards=rewards, **sections))


def test_failures_are_said_once_and_counted_in_the_table(tmp_path: Path) -> None:
    config = tiny(tmp_path, "scores.py:half", evaluation={"interval": 2, "num_prompts": 8})
    outcome = invoke("train", "--config", config)
    assert outcome.status == 0, outcome.stderr
    said = [line for line in outcome.stderr.splitlines() if "was not scored" in line]
    assert len(said) == 1 and "KeyError: " in said[0] and "no mark in" in said[0]
    assert outcome.stderr.count("checkpoint.interval = 0: nothing is saved before the last step") == 1
    steps = history(tmp_path)
    lines = [line for line in outcome.stdout.splitlines() if " step=" in line and " reward=" in line]
    for row, line in zip(steps, lines, strict=True):
        assert f" scoring_errors={row['reward/scoring_errors']:.0f} " in line
    total = sum(row["reward/scoring_errors"] for row in steps)
    assert total == sum(row.get("reward/scoring_errors/KeyError", 0) for row in steps) > 0
    assert f"{total:.0f} (KeyError {total:.0f})" in outcome.stdout and "held-out responses not scored" in outcome.stdout
    evaluated = [row for row in all_rows(tmp_path) if "evaluation/reward_mean" in row]
    assert all(0 < row["evaluation/reward_mean"] < 0.25 and row["evaluation/pass_at_1"] == 0 for row in evaluated)
    assert evaluated and "held-out reward, before and after" in outcome.stdout


def test_a_step_in_which_all_fail_ends_the_run_and_saves_what_was_before(tmp_path: Path) -> None:
    config = tiny(tmp_path, "scores:until_told", checkpoint={"interval": 10}, train={"steps": 3})
    line = invoke("train", "--config", config).error()
    assert "step 2: none of 16 responses was scored" in line and "ConnectionError: the judge is gone" in line
    assert "rewards.stop_when_all_fail" in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    assert len(history(tmp_path)) == 1
    assert invoke("train", "--config", config, "rewards.stop_when_all_fail=false").status == 0
    assert [row["reward/scoring_errors"] for row in history(tmp_path)] == [0, 16, 16]


def test_a_single_response_is_no_group(tmp_path: Path) -> None:
    config = tiny(tmp_path, "scores.py:half", rollout={"group_size": 1})
    for command in (
        ["train", "--dry-run"],
        ["launch", "torchrun", "--nodes", "1", "--nproc-per-node", "1", "--head", "localhost"],
    ):
        line = invoke(*command, "--config", config).error()
        assert "rollout.group_size = 1: GRPO compares" in line and "set it to 2 or more" in line
    out = tmp_path / "out.jsonl"
    assert invoke("rollout", "--config", config, "--out", str(out), "evaluation.num_prompts=2").status == 0
    assert len(out.read_text().splitlines()) == 2 and "reward" in json.loads(out.read_text().splitlines()[0])
    line = invoke("train", "--config", config, "rollout.group_size=4", "rollout.temperature=0", "--dry-run").error()
    assert "rollout.temperature = 0" in line and "group_size" not in line


def test_a_resumed_run_tells_its_template_the_day_on_which_it_began(tmp_path: Path) -> None:
    config = tiny(tmp_path, "toy_scorer:share_of_digits", checkpoint={"interval": 1}, train={"steps": 1})
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}\n{{ messages[0].content }}"
    )
    first = invoke("train", "--config", config, "data.date=2001-02-03")
    second = invoke("train", "--config", config, "train.steps=2")
    assert first.status == second.status == 0
    assert "nothing is saved" not in first.stderr
    assert "the date: fixed to 2001-02-03" in first.stderr and "the date: fixed to 2001-02-03" in second.stderr
