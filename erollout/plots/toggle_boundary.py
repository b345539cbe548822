"""Plot of the toggle's boundary in a run: what a token took off and with drafts at each batch size, and what was chosen."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from erollout.plots.style import INK, OFF_COLOR, SERIES, arm_colors, figure, legend_beside, log2_ticks, plain
from erollout.speculation.step import Arm
from erollout.speculation.trace import DecisionTrace
from erollout.tracking.metrics import percentiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = ((False, OFF_COLOR, INK, "off"), (True, SERIES[0], SERIES[0], "with drafts"))
"""Whether it speculates, colour of the band and of the line, name."""


def boundary(traces: Sequence[DecisionTrace], title: str) -> "Figure":
    """Above, measured and predicted times per token by batch size, whose crossing is the boundary; below, seconds by arm.

    Batch sizes are grouped by powers of two. Steps with prompt tokens are left out.
    """
    made = figure(9, 5.6, title)
    times, shares = made.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    plain(times, ylabel="ms per token", title="time in which every decoding sequence gets one token (median, middle half)")
    plain(shares, "decoding sequences of one replica", "seconds, %", "what the toggle chose, probes included")
    _draw_times(times, traces)
    batches = _draw_shares(shares, traces)
    log2_ticks(shares, batches or [1])
    shares.set_ylim(0, 100)
    legend_beside(times)
    legend_beside(shares, reverse=True)
    return made


def _steps(traces: Sequence[DecisionTrace]) -> Iterator[tuple[DecisionTrace, int, int]]:
    """Every step without prompt tokens that gave tokens: trace, index, and the power of two at or above its batch."""
    for trace in traces:
        for step, batch in enumerate(trace.columns["decoding"]):
            if batch and not trace.columns["prefill_tokens"][step] and trace.tokens(step):
                yield trace, step, 1 << (batch - 1).bit_length()


def _draw_times(axes: "Axes", traces: Sequence[DecisionTrace]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    measured: dict[bool, dict[int, list[float]]] = {False: {}, True: {}}
    predicted: dict[bool, dict[int, list[float]]] = {False: {}, True: {}}
    for trace, step, batch in _steps(traces):
        columns, arm = trace.columns, trace.arm(step)
        measured[arm.speculates].setdefault(batch, []).append(1e3 * columns["seconds"][step] / trace.tokens(step))
        for which, value in ((arm, columns["predicted"][step]), (_other(trace, step), columns["other_predicted"][step])):
            if isfinite(value):
                predicted[which.speculates].setdefault(batch, []).append(1e3 * value)
    for speculates, band, color, name in _KINDS:
        if measured[speculates]:
            batches, (low, middle, high) = _quartiles(measured[speculates])
            axes.fill_between(batches, low, high, color=band, alpha=0.35, linewidth=0)
            axes.plot(batches, middle, "o-", color=color, linewidth=1.8, markersize=4, label=f"{name}, measured")
        if predicted[speculates]:
            batches, (_, middle, _) = _quartiles(predicted[speculates])
            axes.plot(batches, middle, color=color, linewidth=1.2, linestyle="--", label=f"{name}, predicted")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_shares(axes: "Axes", traces: Sequence[DecisionTrace]) -> list[int]:
    """Draw stacked bars. Returns the batch sizes."""
    seconds: dict[int, dict[Arm, float]] = {}
    for trace, step, batch in _steps(traces):
        of_arm, arm = seconds.setdefault(batch, {}), trace.arm(step)
        of_arm[arm] = of_arm.get(arm, 0.0) + trace.columns["seconds"][step]
    batches = sorted(seconds)
    base = [0.0] * len(batches)
    colors = arm_colors(arm for of_arm in seconds.values() for arm in of_arm)
    left, width = [batch / 2**0.42 for batch in batches], [batch * (2**0.42 - 2**-0.42) for batch in batches]
    for arm, color in colors.items():
        heights = [100 * seconds[batch].get(arm, 0.0) / sum(seconds[batch].values()) for batch in batches]
        axes.bar(left, heights, width, base, align="edge", color=color, label=str(arm))
        base = [below + height for below, height in zip(base, heights, strict=True)]
    return batches


def _other(trace: DecisionTrace, step: int) -> Arm:
    return trace.arms[trace.columns["other"][step]]


def _quartiles(values: Mapping[int, Sequence[float]]) -> tuple[list[int], tuple[list[float], list[float], list[float]]]:
    """Batch sizes, ascending, and the three quartiles at each."""
    batches = sorted(values)
    low, middle, high = zip(*(percentiles(values[batch], (25, 50, 75)) for batch in batches), strict=True)
    return batches, (list(low), list(middle), list(high))
