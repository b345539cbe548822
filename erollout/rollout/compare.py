"""Comparison of rollouts with speculation off and on, alternating in one process: time saved, and equality of tokens."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from erollout.data.prompts import PromptDataset
from erollout.engine.proposers.proposer_set import RequantizeStats
from erollout.rollout.rollout_worker import EVALUATION_STREAM, RolloutResult, RolloutWorker
from erollout.rollout.summary import BatchShare
from erollout.speculation.statistics import merge

Rows = list[tuple[str, object]]

_ONE_BY_ONE = 8
"""Number of prompts in the comparison with one sequence at a time."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rollouts of the same requests, equally many with and without drafts."""

    off: list[RolloutResult]
    on: list[RolloutResult]

    @property
    def differing(self) -> int:
        """Number of responses that differ, in any rollout with drafts, from the first one without."""
        without = _responses(self.off[0])
        return sum(a != b for result in self.on for a, b in zip(without, _responses(result), strict=True))

    @property
    def speed_up(self) -> float:
        """Ratio of tokens per second with and without drafts: under `rejection` the responses differ in length."""
        return _tokens_per_second(self.on) / _tokens_per_second(self.off)

    def rows(self) -> Rows:
        """Names and values for a table. Seconds and throughput are medians."""
        speculation = merge(result.speculation for result in self.on)
        responses = len(self.on) * len(self.on[0].scored)
        same = "all, token for token" if not self.differing else f"all but {self.differing} of {responses}"
        return [
            ("responses", len(self.off[0].scored)),
            ("rollout seconds, off -> on", f"{_seconds(self.off):.2f} -> {_seconds(self.on):.2f}"),
            ("tokens/s, off -> on", f"{_tokens_per_second(self.off):.1f} -> {_tokens_per_second(self.on):.1f}"),
            ("speed-up", f"{self.speed_up:.2f}x"),
            ("acceptance_rate", f"{speculation.acceptance_rate:.3f}"),
            ("acceptance_length", f"{speculation.acceptance_length:.2f}"),
            ("responses that are the same off and on", same),
        ]

    def where(self) -> list[tuple[str, ...]]:
        """Rows by batch size: seconds per rollout without and with speculation, share of time speculating, and speed-up."""
        off, on = (_shares(results) for results in (self.off, self.on))
        rows: list[tuple[str, ...]] = []
        for batch in sorted(off.keys() | on.keys()):
            before, after = off.get(batch, BatchShare()), on.get(batch, BatchShare())
            speeds = [share.emitted / share.seconds if share.seconds else 0.0 for share in (before, after)]
            drafts = after.num_speculative_tokens / after.speculating if after.speculating else 0.0
            rows.append(
                (
                    _sequences(batch),
                    f"{before.seconds / len(self.off):.2f}",
                    f"{after.seconds / len(self.on):.2f}",
                    f"{after.speculating / after.seconds if after.seconds else 0.0:.0%}",
                    f"{drafts:.1f}",
                    f"{speeds[1] / speeds[0]:.2f}x" if all(speeds) else "-",
                )
            )
        return rows


WHERE = ("sequences", "seconds, off", "seconds, on", "speculating", "mean n", "tokens/s, on over off")
"""Columns of Comparison.where."""


def compare(rollout: Callable[[bool], RolloutResult], rounds: int = 3) -> Comparison:
    """Run a rollout without and with speculation, alternating, with their order reversed in every other round.

    Collective over the world.
    """
    comparison = Comparison([], [])
    for index in range(rounds):
        for on in (False, True) if index % 2 == 0 else (True, False):
            (comparison.on if on else comparison.off).append(rollout(on))
    return comparison


def compare_held_out(worker: RolloutWorker, data: PromptDataset, rounds: int = 3) -> dict[str, Comparison]:
    """Comparisons on held-out prompts by number of concurrent sequences: one (with the first few prompts), and as configured.

    Each comparison is between rollouts of the same requests on the same replicas.
    """
    options = worker.config.evaluation
    few = [data.prompt(i) for i in range(min(_ONE_BY_ONE, options.num_prompts, len(data)))]
    sampling = worker.sampling_params(options.temperature)
    with _at_once(worker, 1):
        one = compare(lambda on: worker.rollout(few, sampling, 1, EVALUATION_STREAM, 0, on, learns=on), rounds)
    many = compare(lambda on: worker.evaluate(data, 0, on, learns=on), rounds)
    return {"one sequence at once": one, f"up to {worker.config.rollout.max_num_seqs} sequences at once": many}


def drafter_as_in_training(worker: RolloutWorker, data: PromptDataset) -> tuple[RolloutResult, RequantizeStats]:
    """Update the drafter as in a training step: from the current weights, with statistics of an earlier rollout.

    Returns that rollout, made without drafts, and the cost of the update. Collective over the world.
    """
    assert worker.speculation is not None
    first = worker.evaluate(data, 0, speculates=False)
    worker.engine.wake_up()
    worker.speculation.learn_from([sample.rollout for sample in first.scored])
    requantize = worker.load_weights()
    assert requantize is not None
    return first, requantize


@contextmanager
def _at_once(worker: RolloutWorker, max_num_seqs: int) -> Iterator[None]:
    """Context in which max_num_seqs sequences run concurrently."""
    options = worker.engine.rollout
    worker.engine.rollout = replace(options, max_num_seqs=max_num_seqs)  # type: ignore[type-var]  # as in Config.to_dict
    try:
        yield
    finally:
        worker.engine.rollout = options


def _sequences(batch: int) -> str:
    """Range of batch sizes of a BatchShare, from the largest one."""
    if batch < 3:
        return str(batch or "with prompts")
    return f"{batch // 2 + 1}-{batch}"


def _shares(results: list[RolloutResult]) -> dict[int, BatchShare]:
    """Shares summed over all replicas and rollouts, by batch size."""
    total: dict[int, BatchShare] = {}
    for result in results:
        for summary in result.summaries:
            for batch, share in summary.shares.items():
                total.setdefault(batch, BatchShare()).add(share)
    return total


def _responses(result: RolloutResult) -> list[tuple[int, ...]]:
    return [sample.rollout.response_ids for sample in result.scored]


def _seconds(results: list[RolloutResult]) -> float:
    """Median seconds of the slowest replica."""
    return statistics.median(max(report["seconds"] for report in result.reports) for result in results)


def _tokens_per_second(results: list[RolloutResult]) -> float:
    return statistics.median(sum(r["tokens"] for r in x.reports) / max(r["seconds"] for r in x.reports) for x in results)
