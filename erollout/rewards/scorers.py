"""Which function scores a response: the task's own, or one that the user names."""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.types import Prompt

if TYPE_CHECKING:  # scoring processes import this module and need no configuration
    from erollout.config import DataConfig, RewardsConfig

ScoreFunction = Callable[[Prompt, str], float]

DEFAULT_FUNCTIONS = {
    "reasoning_gym": "erollout.rewards.reasoning_gym_scorer:score",
    "chain_sum_cot": "erollout.rewards.answers:integer_match",
    "file": "erollout.rewards.math_scorer:score",
}
"""By data.kind. `erollout.rewards.answers:exact_match` is there for the asking."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A scoring function by import path: small to pickle, loaded once in each process."""

    function: str
    threshold: float | None = None

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Raises ValueError for a score that is not finite, and whatever the function raises."""
        value = float(_load(self.function)(prompt, response))
        if not math.isfinite(value):
            raise ValueError(f"{self.function} returned {value}")
        return value if self.threshold is None else float(value >= self.threshold)

    def load(self) -> None:
        """Import what scoring needs, so that no response pays for it."""
        _load(self.function)


def build_scorer(rewards: "RewardsConfig", data: "DataConfig") -> Scorer:
    """Raises UserError for a function that can't be imported or called with (prompt, response)."""
    if rewards.function is None:
        return Scorer(DEFAULT_FUNCTIONS[data.kind], rewards.threshold)
    key = f"rewards.function = {rewards.function!r}"
    if not all(rewards.function.partition(":")):
        raise UserError(f"{key} must look like package.module:function")
    try:
        function = _load(rewards.function)
    except Exception as error:  # importing a user's module runs the user's code
        raise UserError(
            f"{key} can't be imported ({type(error).__name__}: {error}); is its directory on PYTHONPATH?"
        ) from error
    try:
        inspect.signature(function).bind(None, "")
    except TypeError as error:
        raise UserError(f"{key} must be callable as function(prompt, response): {error}") from error
    return Scorer(rewards.function, rewards.threshold)


@lru_cache(maxsize=8)
def _load(path: str) -> ScoreFunction:
    module, _, name = path.partition(":")
    function: ScoreFunction = getattr(importlib.import_module(module), name)
    return function
