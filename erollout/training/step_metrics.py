"""Metrics of one step, from the results of its phases. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from erollout.calibration.devices import Hardware
from erollout.config import TrackingConfig
from erollout.engine.proposers.proposer_set import RequantizeStats
from erollout.policy.architecture import Architecture
from erollout.rollout.decode_replica import RefitStats
from erollout.rollout.rollout_worker import RolloutResult
from erollout.security.redaction import redact
from erollout.speculation.statistics import SpeculationStatistics
from erollout.tracking.address import store_uri
from erollout.tracking.metrics import SCORING_ERRORS, summarize_lengths
from erollout.types import ScoredRollout

_FEW = 10
"""Number of steps over which the first and the last reward are averaged."""


def rollout_metrics(result: RolloutResult, seconds: float, refit: RefitStats, ranks: int) -> dict[str, float]:
    """Rewards, lengths and throughput of a step whose rollout phase took `seconds` on this many ranks."""
    requantize_seconds = refit.requantize.seconds if refit.requantize is not None else 0.0
    reshard = replace(refit.reshard, seconds=refit.reshard.seconds - requantize_seconds)
    scored = result.scored
    rewards = [s.reward for s in scored]
    lengths = [len(s.rollout.response_ids) for s in scored]
    mean = sum(rewards) / len(rewards)
    tokens = sum(s.rollout.num_sampled for s in scored)
    throughput = (tokens - result.kept_tokens) / max(seconds, 1e-9)
    prompts = [len(s.rollout.prompt_ids) for s in scored]
    metrics = {
        "reward/mean": mean,
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "reward/uniform_groups": uniform_groups(scored),
        "reward/std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
        SCORING_ERRORS: sum(report["scoring_errors"] for report in result.reports),
        "rollout/truncated_fraction": sum(s.rollout.finish_reason == "length" for s in scored) / len(scored),
        "rollout/tokens": float(tokens),
        "rollout/tokens_per_second": throughput,
        "rollout/tokens_per_second_per_device": throughput / ranks,
        "rollout/resumed_samples": float(result.resumed_samples),
        "rollout/kept_tokens": float(result.kept_tokens),
        "rollout/preemptions": sum(report["preemptions"] for report in result.reports),
        "rollout/slowest_replica_seconds": max(report["seconds"] for report in result.reports),
        "rollout/fastest_replica_seconds": min(report["seconds"] for report in result.reports),
        "rollout/decode_steps": sum(report["decode_steps"] for report in result.reports),
        "reshard/seconds": reshard.seconds,
        "reshard/gigabytes_per_second": reshard.gigabytes_per_second,
    }
    metrics |= {f"{SCORING_ERRORS}/{kind}": float(number) for kind, number in result.failures.items()}
    metrics |= coordination_metrics([summary.metrics for summary in result.summaries])
    if refit.requantize is not None:
        metrics |= speculation_metrics(result.speculation, refit.requantize)
    metrics |= {f"response_length/{name}": value for name, value in summarize_lengths(lengths).items()}
    metrics |= {"prompt_length/mean": sum(prompts) / len(prompts), "prompt_length/max": float(max(prompts))}
    tasks = sorted({s.task for s in scored})
    if len(tasks) > 1:
        for task in tasks:
            mine = [s.reward for s in scored if s.task == task]
            metrics[f"reward/{task}"] = sum(mine) / len(mine)
    return metrics


def uniform_groups(scored: Sequence[ScoredRollout]) -> float:
    """Share of groups whose responses all have the same reward, so that their advantages are 0."""
    rewards: dict[int, set[float]] = {}
    for sample in scored:
        rewards.setdefault(sample.rollout.prompt_index, set()).add(sample.reward)
    return sum(len(different) == 1 for different in rewards.values()) / len(rewards)


def update_metrics(
    architecture: Architecture, samples: Sequence[ScoredRollout], seconds: float, ranks: int, hardware: Hardware
) -> dict[str, float]:
    """Throughput per rank of an update phase of `seconds` on these samples, and the utilisation of hardware of known peak.

    FLOPs: 6 per matmul parameter and token, and 6 x layers x query size x length per token for causal attention (PaLM,
    arXiv 2204.02311, appendix B, with half of the score matrix).
    """
    lengths = [len(sample.rollout.prompt_ids) + len(sample.rollout.response_ids) for sample in samples]
    tokens = sum(lengths)
    lookup = 0 if architecture.tie_word_embeddings else architecture.vocab_size * architecture.hidden_size
    flops = 6.0 * (architecture.num_parameters() - lookup) * tokens
    flops += 6.0 * architecture.num_layers * architecture.query_size * sum(length**2 for length in lengths)
    per_rank, peak = max(seconds, 1e-9) * ranks, hardware.compute
    metrics = {"train/tokens_per_second_per_device": tokens / per_rank, "train/teraflops_per_device": flops / per_rank / 1e12}
    return metrics | ({"train/flops_utilization": flops / per_rank / peak} if isfinite(peak) else {})


def coordination_metrics(replicas: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of toggle (means) and coordinator (sums; maxima of shares) over all replicas."""
    metrics = {}
    for name in dict.fromkeys(name for replica in replicas for name in replica):
        values = [replica[name] for replica in replicas if name in replica]
        if name.startswith("toggle/"):
            metrics[name] = sum(values) / len(values)
        else:
            metrics[name] = max(values) if name.endswith("_share") else sum(values)
    return metrics


def speculation_metrics(statistics: SpeculationStatistics, requantize: RequantizeStats) -> dict[str, float]:
    """Metrics of a step's drafts, and the cost of updating the drafter; seconds of drafting are summed over replicas."""
    return {
        "speculation/acceptance_rate": statistics.acceptance_rate,
        "speculation/acceptance_length": statistics.acceptance_length,
        **{f"speculation/acceptance_at_{i}": rate for i, rate in enumerate(statistics.acceptance_by_position, start=1)},
        "speculation/drafts": float(statistics.num_drafts),
        "speculation/proposed_share": statistics.proposed_share,
        "speculation/wasted_tokens": float(statistics.wasted),
        "speculation/seconds_drafting": statistics.seconds_drafting,
        "speculation/seconds_verifying": statistics.seconds_verifying,
        "speculation/requantize_seconds": requantize.seconds,
        "speculation/requantize_peak_mib": requantize.peak_extra_bytes / 2**20,
    }


def summary_rows(
    history: Sequence[Mapping[str, float]],
    evaluations: Sequence[Mapping[str, float]],
    tracking: TrackingConfig,
    output_dir: str,
    run_id: str,
) -> list[tuple[str, object]]:
    """Rows of the table at the end of a run: first and last reward, held-out accuracy before and after, seconds, tracking."""
    steps = [row for row in history if "reward/mean" in row]
    rows: list[tuple[str, object]] = [("steps", len(steps))]
    if steps:
        few = steps[:_FEW], steps[-_FEW:]
        first, last = (sum(row["reward/mean"] for row in part) / len(part) for part in few)
        rows.append((f"reward, first and last {len(few[0])} steps", f"{first:.3f} -> {last:.3f}"))
    if evaluations:
        before, after = evaluations[0]["evaluation/pass_at_1"], evaluations[-1]["evaluation/pass_at_1"]
        rows.append(
            ("held-out accuracy, before and after", f"{before:.3f} -> {after:.3f} ({100 * (after - before):+.1f} points)")
        )
        rewards = [row.get("evaluation/reward_mean") for row in (evaluations[0], evaluations[-1])]
        if None not in rewards:  # from a checkpoint that lacks it
            rows.append(("held-out reward, before and after", " -> ".join(f"{mean:.3f}" for mean in rewards)))
    rows += _failure_rows(history)
    phases = sorted({name for row in steps for name in row if name.startswith("seconds/")})
    for phase in phases:
        total = sum(row.get(phase, 0.0) for row in steps)
        rows.append(
            (f"{phase.removeprefix('seconds/')} seconds, in all and per step", f"{total:.1f}, {total / len(steps):.3f}")
        )
    if drafted := [row for row in steps if "speculation/acceptance_rate" in row]:
        for name in ("acceptance_rate", "acceptance_length", "requantize_seconds"):
            mean = sum(row[f"speculation/{name}"] for row in drafted) / len(drafted)
            rows.append((f"speculation: {name.replace('_', ' ')}, mean of steps", f"{mean:.3f}"))
    if tracking.enabled:
        rows.append(("MLflow run", run_id))
        rows.append(("MLflow store", redact(store_uri(tracking, output_dir))))
    return rows


def _failure_rows(history: Sequence[Mapping[str, float]]) -> list[tuple[str, object]]:
    """Rows on responses without a score, in training by kind; none if all were scored."""
    rows: list[tuple[str, object]] = []
    totals: Counter[str] = Counter()
    for row in history:
        totals.update({name: int(value) for name, value in row.items() if "scoring_errors" in name and value})
    if total := totals[SCORING_ERRORS]:
        prefix = f"{SCORING_ERRORS}/"
        kinds = ", ".join(f"{name.removeprefix(prefix)} {n}" for name, n in totals.most_common() if name.startswith(prefix))
        rows.append(("responses not scored", f"{total} ({kinds})" if kinds else total))
    if total := totals["evaluation/scoring_errors"]:
        rows.append(("held-out responses not scored", total))
    return rows
