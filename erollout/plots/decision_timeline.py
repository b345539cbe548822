"""Plot of one replica's decisions step by step: predictions, measurements and savings."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import isfinite, nan
from statistics import median
from typing import TYPE_CHECKING

from erollout.plots.style import ALERT, INK, MUTED, SERIES, arm_colors, figure, legend_beside, plain, say
from erollout.speculation.step import Arm, Load
from erollout.speculation.trace import DecisionTrace, Reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 60
"""Number of spans in which a rollout's measured times are shown by their medians."""


def decisions(
    trace: DecisionTrace, step_seconds: Callable[[Arm, Load], float] | None = None, title: str = "Decisions of one replica"
) -> "Figure":
    """The batch with the chosen arm as colour; predicted and measured times per token; seconds saved so far.

    Args:
        step_seconds: predictions for an arm at a load, to estimate the time of autoregressive steps instead.
    """
    made = figure(11, 7.5 if step_seconds else 5.5, title)
    axes = made.subplots(3 if step_seconds else 2, 1, sharex=True, height_ratios=[1, 1.4, 0.9] if step_seconds else [1, 1.4])
    if not len(trace):
        for panel in axes:
            plain(panel)
            say(panel, "no steps")
        return made
    _draw_batch(axes[0], trace)
    _draw_times(axes[1], trace)
    if step_seconds is not None:
        _draw_saved(axes[2], trace, step_seconds)
    axes[-1].set_xlabel("decode step", color=INK)
    axes[-1].set_xlim(0, len(trace))
    return made


def _runs(trace: DecisionTrace) -> list[tuple[int, int, Arm]]:
    """Runs of steps with the same arm: (first, end, arm). Single probes are only marked."""
    runs: list[tuple[int, int, Arm]] = []
    for step in range(len(trace)):
        arm = trace.arm(step)
        if runs and (runs[-1][2] == arm or trace.columns["reason"][step] == Reason.PROBE):
            runs[-1] = (runs[-1][0], step + 1, runs[-1][2])
        else:
            runs.append((step, step + 1, arm))
    return runs


def _draw_batch(axes: "Axes", trace: DecisionTrace) -> None:
    plain(axes, ylabel="sequences", title="load, and what was chosen")
    colors, named = arm_colors(trace.arms[index] for index in set(trace.columns["arm"])), set[Arm]()
    decoding = trace.columns["decoding"]
    for first, end, arm in sorted(_runs(trace), key=lambda run: (run[2].speculates, run[2])):
        edges = range(first, end + 1)
        label = str(arm) if arm not in named else None
        axes.stairs(decoding[first:end], edges, fill=True, color=colors[arm], label=label)
        named.add(arm)
    edges = range(len(trace) + 1)
    axes.stairs(decoding, edges, color=INK, linewidth=0.8, label="decoding")
    if any(trace.columns["waiting"]):
        axes.stairs(trace.columns["waiting"], edges, color=ALERT, linewidth=1, linestyle=":", label="waiting")
    axes.set_ylim(bottom=0)
    legend_beside(axes)


def _draw_times(axes: "Axes", trace: DecisionTrace) -> None:
    plain(axes, ylabel="ms per token", title="time in which every decoding sequence gets one token")
    steps = [step for step in range(len(trace)) if trace.tokens(step) and not trace.columns["prefill_tokens"][step]]
    measured = {step: 1e3 * trace.columns["seconds"][step] / trace.tokens(step) for step in steps}
    predicted = [1e3 * value for value in trace.columns["predicted"]]
    other = [1e3 * value for value in trace.columns["other_predicted"]]
    colors = arm_colors(trace.arms[index] for index in set(trace.columns["arm"]))
    probes = [step for step in steps if trace.columns["reason"][step] == Reason.PROBE]
    usual = [step for step in steps if trace.columns["reason"][step] != Reason.PROBE]
    axes.scatter(usual, [measured[s] for s in usual], s=5, c=[colors[trace.arm(s)] for s in usual], alpha=0.5, linewidths=0)
    x, y = _medians(usual, measured, len(trace))
    axes.plot(x, y, color=INK, linewidth=1.6, label="measured (median)")
    axes.plot(predicted, color=SERIES[0], linewidth=1.2, label="predicted for the chosen arm")
    axes.plot(other, color=SERIES[1], linewidth=1.2, linestyle="--", label="predicted for the best other")
    if probes:
        style = {"s": 26, "marker": "^", "edgecolors": ALERT, "facecolors": "none", "linewidths": 1.0}
        axes.scatter(probes, [measured[s] for s in probes], label=f"probe ({len(probes)})", zorder=4, **style)  # type: ignore[arg-type]
    axes.set_ylim(0, _top([*measured.values(), *predicted, *other]))
    legend_beside(axes)


def _draw_saved(axes: "Axes", trace: DecisionTrace, step_seconds: Callable[[Arm, Load], float]) -> None:
    plain(axes, ylabel="seconds", title="saved so far against decoding without drafts, by the model's times for that")
    saved = list(accumulate(trace.gain(step, step_seconds) for step in range(len(trace))))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    at = range(1, len(trace) + 1)
    axes.fill_between(at, saved, 0, where=[s >= 0 for s in saved], color=SERIES[2], alpha=0.35, linewidth=0)
    axes.fill_between(at, saved, 0, where=[s < 0 for s in saved], color=ALERT, alpha=0.35, linewidth=0)
    total = trace.seconds + saved[-1]
    label = f"{saved[-1]:.2f} s of {total:.2f} s\n({saved[-1] / total:.1%})"
    axes.plot(at, saved, color=INK, linewidth=1.4, label=label)
    legend_beside(axes)


def _medians(steps: Sequence[int], values: dict[int, float], length: int) -> tuple[list[float], list[float]]:
    """Medians of spans of equal length, with nan for spans without values."""
    width = max(1, -(-length // SMOOTHING))
    spans: dict[int, list[float]] = {}
    for step in steps:
        spans.setdefault(step // width, []).append(values[step])
    count = -(-length // width)
    return [(i + 0.5) * width for i in range(count)], [median(spans[i]) if i in spans else nan for i in range(count)]


def _top(values: Sequence[float]) -> float:
    """Upper limit of the axis, above nearly all values; single slow steps are cut off."""
    finite = sorted(value for value in values if isfinite(value))
    return 1.25 * finite[int(0.97 * (len(finite) - 1))] if finite else 1.0
