"""Run directories written by the tracker and the decision trace themselves, without the training between: in milliseconds."""

import random
from math import exp
from pathlib import Path
from typing import Any

from erollout.config import build_config
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.trace import DecisionTrace, Reason, StepDecision
from erollout.tracking.tracker import JournalTracker

HOSTILE = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"></pre></td>&amp;"\'{{ 7*7 }}'
"""What a response may hold."""
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def metrics_of(step: int, seed: int = 0, drafts: bool = True) -> dict[str, float]:
    """The metrics of a step of a run that learns."""
    noise = random.Random(1000 * seed + step)
    learnt = 1 - exp(-step / 40)
    p50 = 60 + 60 * learnt + noise.gauss(0, 3)
    values = {
        "reward/mean": 0.2 + 0.5 * learnt + noise.gauss(0, 0.02),
        "train/loss": noise.gauss(0, 0.01),
        "train/entropy": 1.2 - 0.6 * learnt + noise.gauss(0, 0.02),
        "train/grad_norm": 0.3 + abs(noise.gauss(0, 0.05)),
        "train/approx_kl": 0.002 + abs(noise.gauss(0, 0.001)),
        "train/kl_reference": 0.02 * learnt,
        "train/clip_fraction_low": 0.01,
        "train/clip_fraction_high": 0.02 + 0.01 * learnt,
        "mismatch/kl": 1e-4 + abs(noise.gauss(0, 2e-5)),
        "mismatch/mean_abs_difference": 0.006 + abs(noise.gauss(0, 2e-4)),
        "response_length/mean": 1.2 * p50,
        "response_length/p50": p50,
        "response_length/p90": 2.1 * p50,
        "response_length/p99": min(320.0, 2.9 * p50),
        "rollout/truncated_fraction": 0.06 * learnt,
        "rollout/tokens_per_second": 9000 + noise.gauss(0, 400),
        "seconds/refit": 0.05,
        "seconds/rollout": 2.0 + noise.gauss(0, 0.1),
        "seconds/logprobs": 0.6,
        "seconds/update": 1.1,
        "seconds/step": 4.0 + noise.gauss(0, 0.05),
        "memory/peak_rss_gib": 1.1 + 0.001 * step,
    }
    if drafts:
        rates = {f"speculation/acceptance_at_{i}": 0.95 - 0.03 * i for i in range(1, 5)}
        values |= {"speculation/acceptance_rate": 0.85 + noise.gauss(0, 0.01), "speculation/acceptance_length": 3.1, **rates}
        values["speculation/drafts"] = 500.0
    return values


def sample(step: int, text: str) -> dict[str, Any]:
    return {
        "task": "sums",
        "prompt_index": 0,
        "sample_index": 0,
        "prompt": f"2+{step}=",
        "response": text,
        "reference": str(2 + step),
        "reward": 1.0,
        "finish_reason": "stop",
        "tokens": 7,
    }


def write_run(
    directory: Path,
    steps: int = 60,
    seed: int = 0,
    text: str = HOSTILE,
    restart_at: int | None = None,
    kind: str = "rl",
    tracked: dict[str, float] | None = None,
    **sections: dict[str, Any],
) -> Path:
    """A run of so many steps. `restart_at`: step of a checkpoint from which a second attempt began, five steps later.

    `tracked`: metrics of every step, instead of made-up ones.

    `kind`: `rl`; `sft`, which has losses alone; or `other`, which shares no metric with them.
    """
    tree: dict[str, Any] = {
        "model": {"architecture": ARCHITECTURE, "tokenizer": "characters"},
        "data": {"kind": "chain_sum_cot"},
        "rollout": {"max_tokens": 320},
        "speculation": {"mode": "adaptive"},
        "train": {"steps": steps, "output_dir": str(directory)},
        "tracking": {"enabled": False},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    config = build_config(tree)
    starts = [(None, steps)] if restart_at is None else [(None, restart_at + 5), (restart_at, steps)]
    run_id = None
    for resumed, last in starts:
        tracker = JournalTracker()
        run_id = tracker.start(config, {"parameters": 1_234_567}, run_id, directory, resumed)
        for step in range(1 + (resumed or 0), last + 1):
            tracker.log_metrics(step, tracked or _metrics(kind, step, seed, config.speculation.mode != "off"))
            if step % 20 == 0:
                tracker.log_samples(step, [sample(step, text), sample(step, "4")])
                if kind == "rl":
                    solved = 0.3 + step / 200
                    tracker.log_metrics(step, {"evaluation/pass_at_1": solved, "evaluation/reward_mean": solved})
            if step == restart_at:
                tracker.log_saved(step)
        if last == steps:
            tracker.finish("FINISHED")
    if kind == "rl" and config.speculation.mode != "off":
        for replica in range(2):
            rollout_trace(seed + replica).write(directory / "decisions" / f"step_{steps - 1:08d}.replica_{replica:05d}.csv.gz")
    return directory


def _metrics(kind: str, step: int, seed: int, drafts: bool) -> dict[str, float]:
    if kind == "other":
        return {"custom/score": float(step)}
    return {"train/loss": 2 / step, "train/grad_norm": 1.0} if kind == "sft" else metrics_of(step, seed, drafts)


def rollout_trace(seed: int, sequences: int = 32) -> DecisionTrace:
    """A rollout whose sequences end one after the other: off while there are many, longer drafts the fewer there are."""
    trace, noise, now, context = DecisionTrace(), random.Random(seed), 0.0, 20.0
    for step in range(240):
        batch = max(1, round(sequences * exp(-step / 70)))
        length = next(n for n, limit in ((0, 8), (2, 4), (4, 0)) if batch > limit)
        draft = Arm("w4a16", length or 2)
        probe = step % 50 == 49
        arm = draft if length or probe else OFF
        n = arm.num_speculative_tokens
        once = 1e-3 * (2 + 0.25 * batch)
        took = {OFF: once, draft: once * (1 + 0.25 * draft.num_speculative_tokens * (1 + batch / 16))}
        tokens = {OFF: 1.0, draft: 1 + 0.85 * draft.num_speculative_tokens}
        seconds = took[arm] * exp(noise.gauss(0, 0.08))
        accepted = tuple(round(batch * 0.9 ** (i + 1)) for i in range(n))
        other = draft if arm == OFF else OFF
        decision = StepDecision(
            arm, Reason.PROBE if probe else Reason.KEPT, took[arm] / tokens[arm], other, took[other] / tokens[other]
        )
        outcome = StepOutcome(
            arm, Load(batch, context, waiting=max(0, 8 - step)), seconds, 0.0, batch + sum(accepted), (batch,) * n, accepted
        )
        trace.append(now, decision, outcome)
        now, context = now + seconds + 1e-4, context + 1
    return trace
