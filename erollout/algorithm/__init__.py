"""Algorithms by name."""

from erollout.algorithm.grpo import GRPO
from erollout.algorithm.protocol import Algorithm
from erollout.config import AlgorithmConfig

_ALGORITHMS: dict[str, type[GRPO]] = {"grpo": GRPO}


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    return _ALGORITHMS[config.name](config)
