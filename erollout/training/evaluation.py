"""Held-out evaluation: pass@1, pass@k and response lengths on prompts that are never trained on. Pure."""

from collections import defaultdict
from collections.abc import Sequence
from math import comb

from erollout.types import ScoredRollout

_CORRECT = 1.0 - 1e-6
"""Least reward of a right response: numerically 1."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k draws is right, from `correct` of `samples` (arXiv 2107.03374, eq. 1)."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def evaluation_metrics(scored: Sequence[ScoredRollout], scoring_errors: int = 0) -> dict[str, float]:
    """pass@1, with k samples per prompt pass@k, and mean reward, over all prompts and by task; mean response length.

    Args:
        scoring_errors: number of responses without a score.
    """
    metrics = _of_samples(scored, "evaluation/")
    tasks = {sample.task for sample in scored}
    if len(tasks) > 1:
        for task in sorted(tasks):
            metrics |= _of_samples([sample for sample in scored if sample.task == task], f"evaluation/{task}/")
    metrics["evaluation/scoring_errors"] = float(scoring_errors)
    lengths = [len(sample.rollout.response_ids) for sample in scored]
    metrics["evaluation/response_length_mean"] = sum(lengths) / max(1, len(lengths))
    metrics["evaluation/truncated_fraction"] = sum(s.rollout.finish_reason == "length" for s in scored) / max(1, len(scored))
    return metrics


def _of_samples(scored: Sequence[ScoredRollout], prefix: str) -> dict[str, float]:
    by_prompt: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for sample in scored:
        by_prompt[sample.task, sample.rollout.prompt_index].append(sample.reward >= _CORRECT)
    mean = sum(sample.reward for sample in scored) / max(1, len(scored))
    return _pass_rates(list(by_prompt.values()), prefix) | {f"{prefix}reward_mean": mean}


def _pass_rates(prompts: Sequence[Sequence[bool]], prefix: str) -> dict[str, float]:
    k = min(len(hits) for hits in prompts)
    rates = {f"{prefix}pass_at_1": sum(pass_at_k(len(h), sum(h), 1) for h in prompts) / len(prompts)}
    if k > 1:
        rates[f"{prefix}pass_at_{k}"] = sum(pass_at_k(len(h), sum(h), k) for h in prompts) / len(prompts)
    return rates
