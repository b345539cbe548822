"""Plots of simulated rollouts: by strategy, and over time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erollout.plots.style import ALERT, INK, MUTED, OFF_COLOR, SERIES, figure, legend_beside, plain, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODE_COLORS = dict(zip(("always", "adaptive", "toggle", "ladder", "oracle"), SERIES, strict=False)) | {"off": OFF_COLOR}


@dataclass(frozen=True, slots=True)
class Bar:
    """Rollout seconds of one strategy."""

    mode: str
    policy: str
    mean: float
    half: float = 0.0
    """Half of the confidence interval."""


def rollout_times(bars: Sequence[Bar], title: str = "Simulated rollouts") -> "Figure":
    """A group of bars per policy, one bar per mode, with its time relative to `off` under the same policy."""
    policies = list(dict.fromkeys(bar.policy for bar in bars))
    modes = list(dict.fromkeys(bar.mode for bar in bars))
    made = figure(min(13.0, max(6.0, 2.5 + 0.7 * len(bars))), 4.2, title)
    axes = made.subplots()
    plain(axes, ylabel="rollout seconds")
    if not bars:
        say(axes, "nothing was simulated")
        return made
    axes.grid(False, axis="x")
    width, of = 0.84 / len(modes), {(bar.policy, bar.mode): bar for bar in bars}
    for column, mode in enumerate(modes):
        mine = [(row, of[policy, mode]) for row, policy in enumerate(policies) if (policy, mode) in of]
        at = [row + (column - (len(modes) - 1) / 2) * width for row, _ in mine]
        means, halves = [bar.mean for _, bar in mine], [bar.half for _, bar in mine]
        error = {"ecolor": INK, "capsize": 2.5, "elinewidth": 1}
        axes.bar(at, means, width * 0.92, yerr=halves, error_kw=error, color=MODE_COLORS.get(mode, MUTED), label=mode)
        for x, (_, bar) in zip(at, mine, strict=True):
            base = of.get((bar.policy, "off"))
            text = f"{bar.mean / base.mean - 1:+.0%}" if base and mode != "off" else f"{bar.mean:.3g} s"
            color = ALERT if base and bar.mean > base.mean * 1.005 else INK
            _above(axes, x, bar.mean + bar.half, text, color)
    axes.set_xticks(range(len(policies)), policies, color=INK)
    axes.margins(y=0.12)
    legend_beside(axes)
    return made


def utilisation(busy: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str = "Work over the rollout") -> "Figure":
    """Share of busy replicas over time, per strategy.

    Args:
        busy: by strategy name, seconds since the rollout began (ascending) and the shares from then on.
    """
    made = figure(8, 3.8, title)
    axes = made.subplots()
    plain(axes, "seconds since the rollout began", "busy replicas, %")
    if not any(len(seconds) for seconds, _ in busy.values()):
        say(axes, "no steps")
        return made
    for index, (name, (seconds, shares)) in enumerate(busy.items()):
        color = _color(name, index)
        axes.step(seconds, [100 * share for share in shares], where="post", color=color, linewidth=1.8, label=name)
        if len(seconds):
            axes.plot(seconds[-1], 100 * shares[-1], "o", color=color, markersize=5)
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)
    legend_beside(axes)
    return made


def _color(name: str, index: int) -> str:
    return MODE_COLORS.get(name, SERIES[index % len(SERIES)])


def _above(axes: "Axes", x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8, color=color)
