"""Trace of all decisions of one replica in one rollout, with their predictions and outcomes. Pure."""

import csv
import gzip
import io
import logging
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from math import nan
from pathlib import Path

from erollout.errors import UserError
from erollout.resilience.atomic_write import write_atomically
from erollout.speculation.step import OFF, Arm, Load, StepOutcome

logger = logging.getLogger(__name__)

KEPT_TRACES = 100
"""Number of traces kept per replica."""
OUTLIER = 3.0
"""Cap on a step's seconds as attributed to its arm, in multiples of the prediction."""


class Reason(IntEnum):
    """Reason for which an arm was taken."""

    FIXED = 0
    """The mode leaves no choice."""
    IDLE = 1
    """No sequence decodes."""
    KEPT = 2
    """It is the best one, as before."""
    BETTER = 3
    """It has become the best one."""
    PROBE = 4
    """It is being probed."""
    IMPOSED = 5
    """The cluster imposed it."""
    EMPTY = 6
    """The arm's proposer had nothing to propose: the pass was autoregressive."""


@dataclass(slots=True)
class StepDecision:
    """An arm with its reason. Predictions are seconds per token of every decoding sequence; nan: none."""

    arm: Arm
    reason: Reason
    predicted: float = nan
    other: Arm = OFF
    """The best other arm."""
    other_predicted: float = nan


@dataclass(frozen=True, slots=True)
class Bin:
    """A span of a rollout's time. Means are over all its seconds, idle ones included."""

    busy: float
    """Share of its seconds spent in steps."""
    decoding: float
    """Mean number of decoding sequences."""
    waiting: float
    speculating: float
    """Share of its seconds spent in steps that speculate."""
    drafts: float
    """Mean num_speculative_tokens; 0 without speculation."""


_WHOLE = ("step", "decoding", "waiting", "prefill_tokens", "emitted", "drafted", "accepted", "finished")
_REAL = ("start", "seconds", "context", "predicted", "other_predicted")
_NAMED = ("arm", "other", "reason")
COLUMNS = (
    *_WHOLE[:1],
    *_REAL[:2],
    *_WHOLE[1:4],
    "context",
    "arm",
    "predicted",
    "other",
    "other_predicted",
    *_WHOLE[4:],
    "reason",
)
"""Columns of the file. `start`: seconds since the rollout began; `seconds`: duration of the step."""


class DecisionTrace:
    """Columns of equal length, with one entry per step."""

    def __init__(self) -> None:
        self.columns: dict[str, array] = {name: array("q") for name in (*_WHOLE, *_NAMED)}
        self.columns |= {name: array("d") for name in _REAL}
        self.arms: list[Arm] = []
        """Arms that the columns `arm` and `other` index."""
        self._index: dict[Arm, int] = {}
        self._appends = [self.columns[name].append for name in COLUMNS]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def append(self, start: float, decision: StepDecision, outcome: StepOutcome) -> None:
        """`start`: seconds from the start of the rollout to the start of the step."""
        load, arm = outcome.load, outcome.arm
        index = self._index
        number = index.get(arm)
        if number is None:
            number = self._number(arm)
        other = index.get(decision.other)
        if other is None:
            other = self._number(decision.other)
        drafted, accepted = sum(outcome.drafted_at), sum(outcome.accepted_at)
        row = (
            len(self),
            start,
            outcome.seconds,
            load.decoding,
            load.waiting,
            load.prefill_tokens,
            load.context,
            number,
            decision.predicted,
            other,
            decision.other_predicted,
            outcome.emitted,
            drafted,
            accepted,
            outcome.finished,
            decision.reason,
        )
        for append, value in zip(self._appends, row, strict=True):
            append(value)

    @property
    def seconds(self) -> float:
        """Total seconds of all steps."""
        return sum(self.columns["seconds"])

    def total(self, column: str) -> int:
        """Sum of an integer column."""
        return int(sum(self.columns[column]))

    def count(self, reason: Reason) -> int:
        """Number of steps whose arm was taken for the given reason."""
        return self.columns["reason"].count(reason)

    @property
    def num_speculative_tokens(self) -> list[int]:
        """Draft length of every step."""
        lengths = [arm.num_speculative_tokens for arm in self.arms]
        return [lengths[index] for index in self.columns["arm"]]

    @property
    def predicted_over_measured(self) -> float:
        """Predicted over measured seconds, for the tokens of the steps without prompts; 1 without such steps."""
        columns = self.columns
        predicted = measured = 0.0
        for step, per_token in enumerate(columns["predicted"]):
            if per_token == per_token and not columns["prefill_tokens"][step]:  # excludes nan, which differs from itself
                predicted += per_token * self.tokens(step)
                measured += columns["seconds"][step]
        return predicted / measured if measured else 1.0

    def load(self, step: int) -> Load:
        columns = self.columns
        return Load(
            columns["decoding"][step], columns["context"][step], columns["prefill_tokens"][step], columns["waiting"][step]
        )

    def arm(self, step: int) -> Arm:
        return self.arms[self.columns["arm"][step]]

    def tokens(self, step: int) -> float:
        """Mean number of tokens per decoding sequence in a step; 0 where none decoded."""
        columns = self.columns
        decoding = columns["decoding"][step]
        if not decoding:
            return 0.0
        if columns["prefill_tokens"][step]:  # emitted includes the first tokens after prompts
            return 1 + columns["accepted"][step] / decoding
        return columns["emitted"][step] / decoding

    def write(self, path: Path) -> bool:
        """Write gzipped CSV with a header, deterministically. Returns False if the disk failed; the run continues."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(self._texts(name) for name in COLUMNS), strict=True))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, gzip.compress(text.getvalue().encode(), 6, mtime=0))
        except OSError as error:
            logger.warning("the decision trace of this rollout is lost: %s can't be written (%s)", path, error)
            return False
        return True

    @classmethod
    def read(cls, path: Path) -> "DecisionTrace":
        """Read what `write` wrote. Raises UserError for a missing or damaged file."""
        trace = cls()
        try:
            reader = csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))
            if tuple(next(reader, ())) != COLUMNS:
                raise ValueError("its header is not that of a decision trace")
            for row in reader:
                trace._append_text(row)
        except (OSError, EOFError, ValueError, KeyError, OverflowError, zlib.error, csv.Error) as error:
            raise UserError(
                f"{path} can't be read as the decision trace of a rollout ({error}); give a file of <run>/decisions"
            ) from error
        return trace

    def binned(self, bins: int, seconds: float) -> list[Bin]:
        """A summary of fixed size, for gathering from many replicas: equal spans of [0, seconds)."""
        names = ("start", "seconds", "decoding", "waiting")
        rows = zip(*(self.columns[name] for name in names), self.num_speculative_tokens, strict=True)
        return binned(((start, start + length, *rest) for start, length, *rest in rows), bins, seconds)

    def regret(self, seconds_per_token: Callable[[Load], Sequence[float]], arms: Sequence[Arm]) -> float:
        """Seconds that the arms taken lost against the best arm of every step, as predicted in hindsight.

        Args:
            seconds_per_token: predictions for every arm, with all that is known now.
        """
        lost = 0.0
        known = {arm: index for index, arm in enumerate(arms)}
        for step in range(len(self)):
            if (tokens := self.tokens(step)) and (index := known.get(self.arm(step))) is not None:
                values = seconds_per_token(self.load(step))
                lost += tokens * (values[index] - min(values))
        return lost

    def saved(self, step_seconds: Callable[[Arm, Load], float], probes: bool = True) -> dict[int, float]:
        """Seconds that speculating steps saved against autoregressive ones for the same tokens (negative: lost).

        Args:
            step_seconds: predictions with all that is known now; the steps themselves count as measured, with outliers cut.
            probes: whether probes are included.

        Returns: saved seconds by the bit length of the batch size, where there were such steps.
        """
        saved: dict[int, float] = {}
        reasons = self.columns["reason"]
        for step, batch in enumerate(self.columns["decoding"]):
            if self.arm(step).speculates and batch and (probes or reasons[step] != Reason.PROBE):
                size = batch.bit_length()
                saved[size] = saved.get(size, 0.0) + self.gain(step, step_seconds)
        return saved

    def gain(self, step: int, step_seconds: Callable[[Arm, Load], float]) -> float:
        """Seconds that one step saved, as in `saved`; 0 if it did not speculate."""
        arm, load, tokens = self.arm(step), self.load(step), self.tokens(step)
        if not arm.speculates or not tokens:
            return 0.0
        once = step_seconds(OFF, load)
        again = step_seconds(OFF, Load(load.decoding, load.context)) if load.prefill_tokens else once
        return once + (tokens - 1) * again - min(self.columns["seconds"][step], OUTLIER * step_seconds(arm, load))

    def _number(self, arm: Arm) -> int:
        self._index[arm] = len(self.arms)
        self.arms.append(arm)
        return self._index[arm]

    def _texts(self, name: str) -> Iterable[str]:
        """A column as written in the file."""
        column = self.columns[name]
        if name == "start":
            return (f"{value:.6f}" for value in column)  # microsecond resolution, however long the rollout
        if name in _REAL:
            return (f"{value:.6g}" for value in column)
        if name == "reason":
            return (Reason(value).name.lower() for value in column)
        if name in _NAMED:
            names = [str(arm) for arm in self.arms]
            return (names[index] for index in column)
        return map(str, column)

    def _append_text(self, row: Sequence[str]) -> None:
        if len(row) != len(COLUMNS):
            raise ValueError(f"a row of {len(row)} columns")
        fields = dict(zip(COLUMNS, row, strict=True))
        for name in _WHOLE:
            self.columns[name].append(int(fields[name]))
        for name in _REAL:
            self.columns[name].append(float(fields[name]))
        for name in ("arm", "other"):
            arm = _arm(fields[name])
            self.columns[name].append(self._index[arm] if arm in self._index else self._number(arm))
        self.columns["reason"].append(Reason[fields["reason"].upper()])


def binned(spans: Iterable[tuple[float, float, float, float, int]], bins: int, seconds: float) -> list[Bin]:
    """Means over equal parts of [0, seconds).

    Args:
        spans: start, end, decoding sequences, waiting sequences, num_speculative_tokens.
    """
    width, last = seconds / bins, bins - 1
    sums = [[0.0] * 5 for _ in range(bins)]
    for start, end, decoding, waiting, n in spans:
        values = (1.0, decoding, waiting, float(n > 0), float(n))
        for index in range(max(0, min(last, int(start / width))), min(last, int(end / width)) + 1):
            share = max(0.0, min(end, (index + 1) * width) - max(start, index * width)) / width
            sums[index] = [total + share * value for total, value in zip(sums[index], values, strict=True)]
    return [Bin(*total) for total in sums]


def forget_others(written: Path, kept: int = KEPT_TRACES) -> None:
    """Remove a replica's old traces and those of steps that will be repeated. Files are `step_00000000.replica_00000...`.

    Args:
        written: the newest trace.
        kept: number of traces to keep, the newest one included.
    """
    _, _, replica = written.name.partition(".")
    found = sorted(path.name for path in written.parent.glob(f"step_*.{replica}"))
    at = found.index(written.name) + 1
    for name in [*found[: max(0, at - kept)], *found[at:]]:
        with suppress(OSError):
            (written.parent / name).unlink()


def _arm(text: str) -> Arm:
    """The inverse of str(Arm)."""
    format, found, n = text.rpartition(" n=")
    if not found and text != str(OFF):
        raise ValueError(f"no arm: {text!r}")
    return Arm(format, int(n)) if found else OFF
