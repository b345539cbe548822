"""The numbers of one step, from what its phases returned. Pure."""

from erollout.resharding.executor import ReshardStats
from erollout.rollout import RolloutResult
from erollout.tracking.metrics import summarize_lengths


def rollout_metrics(result: RolloutResult, seconds: float, reshard: ReshardStats) -> dict[str, float]:
    """Rewards, lengths and speeds of a step whose rollout phase took `seconds`."""
    scored = result.scored
    rewards = [s.reward for s in scored]
    lengths = [len(s.rollout.response_ids) for s in scored]
    mean = sum(rewards) / len(rewards)
    tokens = sum(lengths)
    metrics = {
        "reward/mean": mean,
        "reward/std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
        "reward/scoring_errors": sum(report["scoring_errors"] for report in result.reports),
        "rollout/truncated_fraction": sum(s.rollout.finish_reason == "length" for s in scored) / len(scored),
        "rollout/tokens": float(tokens),
        "rollout/tokens_per_second": tokens / max(seconds, 1e-9),
        "rollout/preemptions": sum(report["preemptions"] for report in result.reports),
        "rollout/slowest_replica_seconds": max(report["seconds"] for report in result.reports),
        "rollout/fastest_replica_seconds": min(report["seconds"] for report in result.reports),
        "reshard/seconds": reshard.seconds,
        "reshard/gigabytes_per_second": reshard.gigabytes_per_second,
    }
    metrics |= {f"response_length/{name}": value for name, value in summarize_lengths(lengths).items()}
    tasks = sorted({s.task for s in scored})
    if len(tasks) > 1:
        for task in tasks:
            mine = [s.reward for s in scored if s.task == task]
            metrics[f"reward/{task}"] = sum(mine) / len(mine)
    return metrics
