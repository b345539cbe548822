"""Tables of a report: key figures, configuration, samples, attempts."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median

from erollout.config import Config
from erollout.tracking import metrics as names
from erollout.tracking.parameters import flatten
from erollout.tracking.recorded_run import RecordedAttempt, RecordedRun
from erollout.tracking.samples import Row

FEW = 10
"""Number of steps over which the first and the last figures are averaged."""
SAMPLES = 8
"""Number of responses shown of a step."""
UNKNOWN = "–"
_PLACES = ("train.output_dir", "checkpoint.directory", "tracking.run_name")
"""Keys that differ between any two runs."""


@dataclass(frozen=True, slots=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    """Whether it is shown on request."""
    texts: Sequence[str] = ()
    """Columns that hold long text."""


def glance(runs: Sequence[RecordedRun]) -> Table:
    """Key figures, a column per run; rows that no run has are left out."""
    rows = [(name, [fact(run) for run in runs]) for name, fact in _FACTS]
    shown = [[name, *values] for name, values in rows if any(value != UNKNOWN for value in values)]
    return Table(["", *(run.name for run in runs)], shown)


def configuration(runs: Sequence[RecordedRun]) -> list[Table]:
    """What was set, or what differs between several runs; then every key, folded."""
    keys = sorted({key for run in runs for key in run.parameters})
    columns = ["key", *(run.name for run in runs)]

    def values(key: str) -> list[str]:
        return [run.parameters.get(key, UNKNOWN) for run in runs]

    if len(runs) == 1:
        default = flatten(Config().to_dict())
        rows = [[key, *values(key), default.get(key, UNKNOWN)] for key in keys if values(key) != [default.get(key)]]
        first = Table(["key", "value", "default"], rows, "What is not the default")
    else:
        rows = [[key, *values(key)] for key in keys if len(set(values(key))) > 1 and key not in _PLACES]
        first = Table(columns, rows, "What differs" if rows else "No key differs")
    return [first, Table(columns, [[key, *values(key)] for key in keys], f"All {len(keys)} keys", folded=True)]


def samples(run: RecordedRun, titled: bool) -> list[Table]:
    """The newest responses of the samples table, by split; without any, of the saved rollouts."""
    rows = run.samples()
    tables = []
    for split in ("evaluation", "training"):
        mine = [row for row in rows if (row.get("split") or "evaluation") == split]
        if mine:
            step = max(row["step"] for row in mine)
            shown = [row for row in mine if row["step"] == step]
            kind = "held-out" if split == "evaluation" else "training"
            tables.append(_samples(run, titled, f"{kind} prompts after step {step}", shown))
    return tables or _saved_rollouts(run, titled)


def attempts(run: RecordedRun, titled: bool) -> Table:
    """A row per attempt: when, from which checkpoint, how far, how it ended, what was repeated or changed."""
    rows = []
    for before, attempt in zip([None, *run.attempts], run.attempts, strict=False):
        rows.append([str(attempt.number), _date(attempt.began), _duration(attempt.last - attempt.began), *_facts(run, attempt)])
        rows[-1] += [_steps(attempt), _end(run, attempt), _repeated(before, attempt), _changed(attempt)]
    header = ["attempt", "began", "lasted", "host", "job", "steps", "end", "steps repeated", "keys changed"]
    return Table(header, rows, run.name if titled else "")


def _samples(run: RecordedRun, titled: bool, what: str, rows: Sequence[Row]) -> Table:
    header = ["prompt", "response", "reference", "reward", "tokens", "finish"]
    cells = [
        [_text(row.get(name)) for name in ("prompt", "response", "reference", "reward", "tokens", "finish_reason")]
        for row in rows[:SAMPLES]
    ]
    shown = f"{run.name}, {what}" if titled else what[0].upper() + what[1:]
    more = f" ({SAMPLES} of {len(rows)})" if len(rows) > SAMPLES else ""
    return Table(header, cells, shown + more, texts=header[:3])


def _saved_rollouts(run: RecordedRun, titled: bool) -> list[Table]:
    files = sorted((run.path / "rollouts").glob("step_*.jsonl"))
    if not files:
        return []
    rows: list[Row] = []
    with suppress(OSError, ValueError), open(files[-1], encoding="utf-8", errors="surrogatepass") as lines:
        rows = [row for line in islice(lines, SAMPLES) if isinstance(row := json.loads(line), dict)]
    step = files[-1].stem.removeprefix("step_").lstrip("0")
    return [_samples(run, titled, f"training prompts of step {step}", rows)] if rows else []


def _text(value: object) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(run: RecordedRun, attempt: RecordedAttempt) -> list[str]:
    """Host and job of an attempt, which are in a tag of it."""
    tag = f"erollout.attempt_{attempt.number}"
    known: dict[str, object] = {}
    for record in run.records:
        if record["kind"] == "tags" and tag in record["values"]:
            with suppress(ValueError, TypeError):
                known = dict(json.loads(record["values"][tag]))
    return [_text(known.get("host")), _text(known.get("job"))]


def _end(run: RecordedRun, attempt: RecordedAttempt) -> str:
    return attempt.status or ("none recorded: running or killed" if attempt is run.attempts[-1] else "killed")


def _steps(attempt: RecordedAttempt) -> str:
    began = "" if attempt.resumed_from is None else f"from {attempt.resumed_from} "
    saved = f", saved at {', '.join(map(str, attempt.saved[-3:]))}" if attempt.saved else ""
    return f"{began}to {attempt.reached}{saved}" if attempt.reached is not None else f"{began}none{saved}"


def _repeated(before: RecordedAttempt | None, attempt: RecordedAttempt) -> str:
    if before is None or before.reached is None or attempt.resumed_from is None:
        return UNKNOWN
    return str(max(0, before.reached - attempt.resumed_from))


def _changed(attempt: RecordedAttempt) -> str:
    return ", ".join(f"{key}={value}" for key, value in attempt.changed.items()) or UNKNOWN


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _steps_key(run: RecordedRun) -> str:
    return "train.steps" if run.has(names.REWARD) else "supervised.steps"


def _number(value: float, form: str = "") -> str:
    """Three digits, without an exponent where it can be read without."""
    return format(value, form or (",.0f" if 1000 <= abs(value) < 1e7 else ".3g"))


def _ends(name: str, form: str = "") -> Callable[[RecordedRun], str]:
    """The mean of a metric over the first and the last FEW steps that tracked it."""

    def ends(run: RecordedRun) -> str:
        _, values = run.series(name)
        few = min(FEW, len(values))
        return " → ".join(_number(fmean(part), form) for part in (values[:few], values[-few:])) if values else UNKNOWN

    return ends


def _first_and_last(name: str) -> Callable[[RecordedRun], str]:
    def ends(run: RecordedRun) -> str:
        _, values = run.series(name)
        return f"{_number(values[0])} → {_number(values[-1])}" if values else UNKNOWN

    return ends


def _median(name: str) -> Callable[[RecordedRun], str]:
    def middle(run: RecordedRun) -> str:
        _, values = run.series(name)
        return _number(median(values)) if values else UNKNOWN

    return middle


def _rollout_share(run: RecordedRun) -> str:
    rollout, step = (sum(run.series(f"{names.SECONDS}/{name}")[1]) for name in ("rollout", "step"))
    return f"{rollout / step:.0%}" if step and rollout else UNKNOWN


def _last(name: str) -> Callable[[RecordedRun], str]:
    def last(run: RecordedRun) -> str:
        _, values = run.series(name)
        return _number(values[-1]) if values else UNKNOWN

    return last


_FACTS: tuple[tuple[str, Callable[[RecordedRun], str]], ...] = (
    ("directory", lambda run: str(run.path)),
    ("model", lambda run: run.model),
    ("steps", lambda run: f"{run.step} of {run.parameters.get(_steps_key(run), UNKNOWN)}"),
    ("began", lambda run: _date(run.attempts[0].began) if run.attempts else UNKNOWN),
    ("attempts", lambda run: str(len(run.attempts))),
    ("end", lambda run: _end(run, run.attempts[-1]) if run.attempts else UNKNOWN),
    (f"reward, first and last {FEW} steps", _ends(names.REWARD)),
    ("held-out prompts solved, first and last", _first_and_last(names.ACCURACY)),
    ("held-out reward, first and last", _first_and_last(names.EVALUATION_REWARD)),
    (f"loss, first and last {FEW} steps", _ends(names.LOSS)),
    ("seconds per step, median", _median(names.STEP_SECONDS)),
    ("share of the rollout in them", _rollout_share),
    ("sampled tokens per second, median", _median(names.TOKENS_PER_SECOND)),
    (f"truncated responses, first and last {FEW} steps", _ends("rollout/truncated_fraction", ".1%")),
    ("accepted / drafted tokens, median", _median("speculation/acceptance_rate")),
    ("tokens per verify pass, median", _median("speculation/acceptance_length")),
    (
        "updates skipped",
        lambda run: f"{sum(run.series('train/update_skipped')[1]):.3g}" if run.has("train/update_skipped") else UNKNOWN,
    ),
    ("peak memory of rank 0's process, GiB", _last("memory/peak_rss_gib")),
    ("peak memory of rank 0's device, GiB", _last("memory/peak_cuda_reserved_gib")),
)
