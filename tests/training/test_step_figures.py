"""Figures of a step: rewards by group, advantages, throughput of the update."""

import pytest
from tiny_runs import ARCHITECTURE

from erollout.calibration.devices import find_hardware
from erollout.policy.families import read_architecture
from erollout.training.step_metrics import uniform_groups, update_metrics
from erollout.types import Rollout, ScoredRollout


def _scored(prompt: int, reward: float, prompt_tokens: int = 2, response_tokens: int = 3) -> ScoredRollout:
    logprobs = (-1.0,) * response_tokens
    rollout = Rollout(prompt, 0, (1,) * prompt_tokens, (2,) * response_tokens, logprobs, logprobs, "stop", 0)
    return ScoredRollout(rollout, reward, "task")


def test_groups_with_one_reward_are_counted() -> None:
    assert uniform_groups([_scored(0, 1.0), _scored(0, 0.0), _scored(1, 1.0), _scored(1, 1.0)]) == 0.5
    assert uniform_groups([_scored(0, 0.0)]) == 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_an_update_are_those_of_its_matrix_products(tied: bool) -> None:
    architecture = read_architecture(ARCHITECTURE | {"tie_word_embeddings": tied}, "test")
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32  # queries, keys, values, output, MLP, norms
    parameters = 2 * layer + 32 + 67 * 32  # final norm, LM head
    samples = [_scored(0, 0.0, 2, 3), _scored(1, 0.0, 4, 6)]
    attention = sum(2 * 3 * 2 * 32 * length * (length / 2) * 2 for length in (5, 10))  # layers, passes, products, half
    metrics = update_metrics(architecture, samples, 2.0, 4, find_hardware("cpu"))
    assert metrics["train/tokens_per_second_per_device"] == 15 / 8
    assert metrics["train/teraflops_per_device"] == pytest.approx((6 * parameters * 15 + attention) / 8 / 1e12)
    assert "train/flops_utilization" not in metrics  # the peak of a CPU is unknown
    known = update_metrics(architecture, samples, 2.0, 4, find_hardware("NVIDIA H100 80GB HBM3"))
    assert known["train/flops_utilization"] == pytest.approx(known["train/teraflops_per_device"] / 989)
