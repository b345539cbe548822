"""The commands as functions, in this process: alone, or on every rank that torchrun or another launcher has started."""

from erollout.api import sampling
from erollout.checkpoint.saved_policy import SavedPolicy
from erollout.config import Config, require_trainable, require_training_data, without_training_data
from erollout.environment import is_rank
from erollout.errors import UserError
from erollout.parallel.groups import expected_world_size
from erollout.rollout.compare import Comparison
from erollout.training import session


def train(config: Config) -> None:
    """Train by reinforcement learning, from the newest checkpoint if there is one, as `erollout train`. Raises UserError."""
    require_trainable(config)
    _require_ranks(config)
    session.train(config)


def supervised(config: Config) -> None:
    """Fine-tune on prompts with given answers, as `erollout sft`. Raises UserError."""
    require_training_data(config)
    _require_ranks(config)
    session.supervised(config)


def evaluate(policy: Config | SavedPolicy) -> dict[str, float]:
    """Metrics on the held-out prompts of a configured model or of a run's checkpoint (`find_policy`), as `erollout evaluate`.

    Returns: as tracked in training (`evaluation/pass_at_1`, ...), and prompts, responses, tokens, seconds, tokens/s. Raises
    UserError.
    """
    config, saved = (policy, None) if isinstance(policy, Config) else (policy.config, policy)
    _require_ranks(config)
    return sampling.evaluate(without_training_data(config), saved).metrics


def compare(config: Config) -> dict[str, Comparison]:
    """Rollouts of the held-out prompts with speculation off and as configured, in turns, by case. Raises UserError."""
    _require_ranks(config)
    return sampling.compare_modes(config)


def _require_ranks(config: Config) -> None:
    """Raise UserError if the configuration needs ranks that nothing has started."""
    size = expected_world_size(config.parallel)
    if size > 1 and not is_rank():
        raise UserError(
            f"the configuration needs {size} ranks; start the program with `torchrun --standalone --nproc-per-node {size}`, or "
            "use the command of the same name, which starts them"
        )
