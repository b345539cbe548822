"""reasoning-gym's own scoring. Imported by scoring processes before any time limit runs."""

import json
from functools import lru_cache
from typing import Any

import reasoning_gym

from erollout.rewards.answers import final_answer
from erollout.types import Prompt


def score(prompt: Prompt, response: str) -> float:
    """The task's score of the final answer, 0 to 1. Raises what the task raises, which some do on garbage.

    Several tasks give partial credit, down to 0.01 for garbage: see rewards.threshold.
    """
    task = _task(prompt.task, json.dumps(prompt.item["args"], sort_keys=True))
    return float(task.score_answer(final_answer(response), prompt.item["entry"]))


@lru_cache(maxsize=256)
def _task(name: str, args: str) -> Any:
    """A one-item dataset: scoring needs the task's arguments, not its items."""
    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(args))
