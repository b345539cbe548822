"""Plots of runs over their steps: reward, every curve of the update, lengths, seconds per phase, memory, acceptance."""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Literal

from erollout.errors import UserError
from erollout.plots.style import (
    ALERT,
    INK,
    MUTED,
    OFF_COLOR,
    SERIES,
    figure,
    label,
    legend_below,
    legend_beside,
    plain,
    run_colors,
    shortened,
    steps_below,
)
from erollout.tracking import metrics as names
from erollout.tracking.recorded_run import RecordedRun

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
LENGTHS = ("p99", "p90", "p50")
_SHADES = ("#9ecae1", "#4292c6", "#08519c")
TRUNCATED = "rollout/truncated_fraction"
_PHASES = 6
"""Number of phases with a band of their own; the others are summed up."""
_FAR = 1.6
"""max_tokens is drawn if it is at most so many times the longest percentile: above, it would flatten the lengths."""
CURVES = (
    ("reward", ((names.REWARD, "training"), (names.EVALUATION_REWARD, "held-out"))),
    ("held-out prompts solved, share", ((names.ACCURACY, ""),)),
    ("loss", ((names.LOSS, ""),)),
    ("entropy, nats", (("train/entropy", ""),)),
    ("gradient norm", (("train/grad_norm", ""),)),
    ("KL per token, nats", (("train/approx_kl", "old and new policy"), ("train/kl_reference", "reference"))),
    ("mismatch: KL of engine and actor, nats", ((names.MISMATCH_KL, ""),)),
    ("clipped tokens, share", (("train/clip_fraction_low", "low"), ("train/clip_fraction_high", "high"))),
)
"""Panels of `curves`: title, and tracked names with their labels."""
MEMORY = (
    ("memory/peak_rss_gib", "resident, process"),
    ("memory/peak_cuda_allocated_gib", "allocated, device"),
    ("memory/peak_cuda_reserved_gib", "reserved, device"),
)
POSITION = "speculation/acceptance_at_"


class NoData(UserError):
    """What a plot needs was not tracked; the message says why, in a line."""


def subject(runs: Sequence[RecordedRun], step: int | None = None) -> str:
    """Run, model and step of a title."""
    models = list(dict.fromkeys(run.model for run in runs))
    last = max(run.step for run in runs)
    when = f"step {step}" if step is not None else f"steps 1 to {last}" if last > 1 else f"step {last}"
    who = shortened(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs"
    return f"{who}, {' and '.join(models[:2]) if len(models) < 3 else f'{len(models)} models'}, {when}"


def reward_curve(runs: Sequence[RecordedRun]) -> "Figure":
    """Mean reward per step, its moving average, and held-out accuracy at the steps that measured it."""
    shown = _having(runs, [names.REWARD], "no rewards: no step of reinforcement learning is complete")
    made = figure(9, 4.2, f"Reward: {subject(shown)}")
    axes = made.subplots()
    plain(axes, ylabel="mean reward of the step's responses")
    steps_below(axes)
    for index, run in enumerate(shown):
        one, color = len(shown) == 1, run_colors(len(shown))[index]
        steps, rewards = run.series(names.REWARD)
        axes.plot(steps, rewards, color=color, alpha=0.3, linewidth=1)
        averages = _moving_average(rewards, max(1, len(rewards) // 20))
        _line(axes, steps, averages, color, label="training reward" if one else label(run.name), linewidth=2)
        evaluated, accuracy = run.series(names.ACCURACY)
        if evaluated:
            held_out = SERIES[1] if one else color
            text = "held-out prompts solved" if one or index == len(shown) - 1 else None
            axes.plot(evaluated, accuracy, "o--", color=held_out, linewidth=1.2, markersize=5, label=text)
        if one and evaluated:
            for at in {0, len(evaluated) - 1}:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
                place = (evaluated[at], accuracy[at]), (0, 9)
                axes.annotate(f"{accuracy[at]:.0%}", *place, textcoords="offset points", ha="center", color="#9a6700", bbox=box)
    axes.margins(y=0.12)
    legend_beside(axes)
    return made


def curves(runs: Sequence[RecordedRun]) -> "Figure":
    """A panel for each of CURVES that a run has tracked; several runs overlaid, each in its colour."""
    panels = [(title, lines) for title, lines in CURVES if any(run.has(name) for run in runs for name, _ in lines)]
    if not panels:
        raise NoData(f"{_paths(runs)}: no curves of training: no step is complete")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    made = figure(5.5 * columns, 0.9 + 2.1 * rows, f"Training: {subject(runs)}")
    grid = made.subplots(rows, columns, squeeze=False).flat
    for axes, (title, lines) in zip(grid, panels, strict=False):
        plain(axes, title=title)
        steps_below(axes)
        tracked = [(name, text) for name, text in lines if any(run.has(name) for run in runs)]
        for style, (name, text) in zip(STYLES, tracked, strict=False):
            for color, run in zip(run_colors(len(runs)), runs, strict=True):
                _line(axes, *run.series(name), color, linestyle=style, linewidth=1.5, label=text)
        if len(tracked) > 1:
            _style_key(axes, [text for _, text in tracked])
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    _run_key(made, runs)
    return made


def response_lengths(runs: Sequence[RecordedRun]) -> "Figure":
    """Percentiles of the response lengths per step with rollout.max_tokens, above the share that was truncated there."""
    shown = _having(runs, [f"{names.RESPONSE_LENGTH}/p50"], "no response lengths: no rollout is complete")
    made = figure(9, 5.2, f"Response lengths: {subject(shown)}")
    lengths, truncated = made.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    plain(lengths, ylabel="tokens")
    plain(truncated, ylabel="truncated, %")
    steps_below(truncated)
    one, longest = len(shown) == 1, 0.0
    for index, run in enumerate(shown):
        color = run_colors(len(shown))[index]
        for name, shade, style in zip(LENGTHS, _SHADES, (":", "--", "-"), strict=True):
            steps, values = run.series(f"{names.RESPONSE_LENGTH}/{name}")
            longest = max([longest, *filter(isfinite, values)])
            how = {"label": name, "color": shade} if one else {"linestyle": style, "color": color}
            _line(lengths, steps, values, linewidth=1.8, **how)
        steps, values = run.series(TRUNCATED)
        text = None if one else label(run.name)
        _line(truncated, steps, [100 * value for value in values], INK if one else color, label=text, linewidth=1.5)
    _draw_limit(lengths, shown, longest)
    if not one:
        for name, style in zip(LENGTHS, (":", "--", "-"), strict=True):
            lengths.plot([], [], color=MUTED, linestyle=style, label=name)
    for axes in (lengths, truncated):
        axes.set_ylim(bottom=0)
        legend_beside(axes)
    if truncated.get_ylim()[1] < 1:
        truncated.set_ylim(0, 1)
    return made


def phase_seconds(runs: Sequence[RecordedRun]) -> "Figure":
    """Seconds per phase and step, stacked, a panel per run; phases beyond the six largest are summed up as `other`."""
    shown = _having(runs, [names.STEP_SECONDS], "no seconds of phases: no step is complete")
    made = figure(9, 1 + 2.6 * len(shown), f"Where the time goes: {subject(shown)}")
    largest = _largest_phases(shown)
    panels = made.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, shown, strict=True):
        plain(axes, ylabel="seconds per step", title=label(run.name) if len(shown) > 1 else "")
        _stack_phases(axes, run, largest)
    steps_below(panels[-1])
    legend_beside(panels[0], reverse=True)
    return made


def memory(runs: Sequence[RecordedRun]) -> "Figure":
    """Peak memory of rank 0's process and device, which includes that of all steps before."""
    shown = _having(runs, [name for name, _ in MEMORY], "no memory was tracked: no step is complete")
    made = figure(9, 3.6, f"Peak memory of rank 0: {subject(shown)}")
    axes = made.subplots()
    plain(axes, ylabel="GiB")
    steps_below(axes)
    tracked = [(name, text) for name, text in MEMORY if any(run.has(name) for run in shown)]
    for style, (name, _) in zip(STYLES, tracked, strict=False):
        for color, run in zip(run_colors(len(shown)), shown, strict=True):
            _line(axes, *run.series(name), color, linestyle=style, linewidth=1.8)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    _style_key(axes, [text for _, text in tracked])
    _run_key(made, shown)
    return made


def acceptance_over_steps(runs: Sequence[RecordedRun]) -> "Figure":
    """Acceptance rate and length per step, and the acceptance by position in the draft, over all steps that drafted."""
    shown = _having(runs, ["speculation/acceptance_rate"], "no drafts: speculation.mode is off")
    made = figure(11, 3.9, f"Acceptance: {subject(shown)}")
    rate, length, position = made.subplots(1, 3)
    plain(rate, title="accepted / drafted tokens, by step")
    plain(length, title="tokens per verify pass, by step")
    plain(position, "position in the draft", title="accepted, given those before")
    steps_below(rate)
    steps_below(length)
    last = 1
    for color, run in zip(run_colors(len(shown)), shown, strict=True):
        _line(rate, *_where_drafted(run, "speculation/acceptance_rate"), color, linewidth=1.6)
        _line(length, *_where_drafted(run, "speculation/acceptance_length"), color, linewidth=1.6)
        if shares := _by_position(run):
            position.plot(range(1, len(shares) + 1), shares, "o-", color=color, linewidth=1.6, markersize=4)
            last = max(last, len(shares))
    for axes in (rate, position):
        axes.set_ylim(0, 1.02)
    position.set_xticks(range(1, last + 1))
    length.set_ylim(bottom=1)
    _run_key(made, shown)
    return made


def _having(runs: Sequence[RecordedRun], tracked: Sequence[str], why: str) -> list[RecordedRun]:
    """Runs that have tracked one of these names. Raises NoData if none has."""
    shown = [run for run in runs if any(run.has(name) for name in tracked)]
    if not shown:
        raise NoData(f"{_paths(runs)}: {why}")
    return shown


def _paths(runs: Sequence[RecordedRun]) -> str:
    return ", ".join(str(run.path) for run in runs)


def _line(axes: "Axes", steps: Sequence[float], values: Sequence[float], color: str, **style: object) -> None:
    """Draw a line, with marks if it is so short that it could not be seen."""
    marker = {"marker": "o", "markersize": 4} if 0 < len(steps) < 4 else {}
    axes.plot(steps, values, color=color, **marker, **style)  # type: ignore[arg-type]


def _style_key(axes: "Axes", texts: Sequence[str]) -> None:
    """A legend of line styles, beside the axes' title."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=INK, linestyle=style, label=text) for style, text in zip(STYLES, texts, strict=False)]
    axes.legend(
        handles=handles, frameon=False, labelcolor=INK, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.98)
    )


def _run_key(made: "Figure", runs: Sequence[RecordedRun]) -> None:
    """A legend of the runs' colours, if there are several."""
    from matplotlib.lines import Line2D

    colors = zip(run_colors(len(runs)), runs, strict=True)
    handles: list[Artist] = [Line2D([], [], color=color, linewidth=2.5, label=label(run.name)) for color, run in colors]
    if len(runs) > 1:
        legend_below(made, handles)


def _draw_limit(axes: "Axes", runs: Sequence[RecordedRun], longest: float) -> None:
    for limit in sorted({int(text) for run in runs if (text := run.parameters.get("rollout.max_tokens", "")).isdigit()}):
        if limit <= _FAR * longest:
            axes.axhline(limit, color=ALERT, linewidth=1.2, linestyle="-.", label=f"max_tokens {limit}")
        else:
            axes.plot([], [], linestyle="none", label=f"max_tokens {limit}:\nabove this axis")


def _largest_phases(runs: Sequence[RecordedRun]) -> list[str]:
    totals: dict[str, float] = {}
    for row in (row for run in runs for row in run.history if names.STEP_SECONDS in row):
        for name, value in row.items():
            if name.startswith(f"{names.SECONDS}/") and name != names.STEP_SECONDS:
                totals[name] = totals.get(name, 0.0) + value
    return sorted(totals, key=lambda name: -totals[name])[:_PHASES]


def _stack_phases(axes: "Axes", run: RecordedRun, phases: Sequence[str]) -> None:
    timed = [row for row in run.history if names.STEP_SECONDS in row]
    steps = [row["step"] for row in timed]
    edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 0.5]
    base = [0.0] * len(timed)
    for color, phase in zip(SERIES, phases, strict=False):
        top = [below + row.get(phase, 0.0) for below, row in zip(base, timed, strict=True)]
        text = phase.removeprefix(f"{names.SECONDS}/")
        axes.stairs(top, edges, baseline=base, fill=True, color=color, label=text)
        base = top
    whole = [max(below, row[names.STEP_SECONDS]) for below, row in zip(base, timed, strict=True)]
    axes.stairs(whole, edges, baseline=base, fill=True, color=OFF_COLOR, label="other")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * max(filter(isfinite, whole), default=1.0)))


def _where_drafted(run: RecordedRun, name: str) -> tuple[list[float], list[float]]:
    """A series without the steps in which nothing was drafted, whose value says nothing."""
    rows = [(row["step"], row[name]) for row in run.history if name in row and row.get("speculation/drafts", 1)]
    return [step for step, _ in rows], [value for _, value in rows]


def _by_position(run: RecordedRun) -> list[float]:
    """Conditional acceptance of the first, second, ... draft token: means over steps, weighted by their drafts."""
    shares: list[float] = []
    while True:
        name = f"{POSITION}{len(shares) + 1}"
        rows = [(row[name], row.get("speculation/drafts", 1.0)) for row in run.history if name in row]
        weight = sum(drafts for _, drafts in rows)
        if not weight:
            return shares
        shares.append(sum(value * drafts for value, drafts in rows) / weight)


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values (fewer at the start)."""
    return [sum(part := values[max(0, at + 1 - width) : at + 1]) / len(part) for at in range(len(values))]
