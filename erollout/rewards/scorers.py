"""Choice of the reward function: the task's own, or one named by the user."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.rewards.function import absolute_name, is_file, load_function, reward_value, split_name
from erollout.types import Prompt

if TYPE_CHECKING:  # scoring processes import this module and need no configuration
    from erollout.config import DataConfig, RewardsConfig

DEFAULT_FUNCTIONS = {
    "reasoning_gym": "erollout.rewards.reasoning_gym_scorer:score",
    "chain_sum_cot": "erollout.rewards.answers:integer_match",
    "file": "erollout.rewards.math_scorer:score",
}
"""Default functions by data.kind. `erollout.rewards.answers:exact_match` can be chosen as well."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A scoring function by name: small to pickle, loaded once in each process."""

    function: str
    threshold: float | None = None
    import_path: str | None = None
    """Directory whose modules it may import."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Raises NotANumber for a score that is not a finite number, and whatever the function raises."""
        value = reward_value(self.function, load_function(self.function, self.import_path)(prompt, response))
        return value if self.threshold is None else float(value >= self.threshold)

    def load(self) -> None:
        """Import what scoring needs, so that this does not count against a response's time. Raises as `load_function`."""
        load_function(self.function, self.import_path)


def build_scorer(rewards: "RewardsConfig", data: "DataConfig") -> Scorer:
    """Build the scorer without importing its module, which runs only in scoring processes. Raises UserError for a bad name."""
    if rewards.function is None:
        return Scorer(DEFAULT_FUNCTIONS[data.kind], rewards.threshold)
    split_name(rewards.function)
    name, folder = rewards.function, rewards.import_path
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"rewards.import_path = {folder} is not a directory; name the one with the modules of rewards.function")
    if is_file(name):
        name = absolute_name(name, Path(folder or "."))
    return Scorer(name, rewards.threshold, folder and str(Path(folder).absolute()))
