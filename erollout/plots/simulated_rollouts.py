"""Plots of simulated rollouts: by strategy, over time, by size of the cluster, and against measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erollout.plots.style import ALERT, INK, MUTED, OFF_COLOR, SERIES, figure, legend_beside, plain, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODE_COLORS = dict(zip(("always", "adaptive", "toggle", "ladder", "oracle"), SERIES, strict=False)) | {"off": OFF_COLOR}
NEAR = 0.1
"""Allowed relative error of a simulated time."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Rollout seconds of one strategy."""

    mode: str
    policy: str
    mean: float
    half: float = 0.0
    """Half of the confidence interval."""


@dataclass(frozen=True, slots=True)
class Size:
    """Rollout seconds of one mode on a cluster of some size."""

    gpus: int
    mean: float
    half: float = 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """A simulated value and its reference."""

    label: str
    simulated: float
    reference: float
    half: float = 0.0
    """Half of the simulation's confidence interval."""
    source: str = "measured"
    """Origin of the reference: `measured`, `published`."""


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


def scaling(sizes: Mapping[str, Sequence[Size]], title: str = "Rollout time by size of the cluster") -> "Figure":
    """Left: seconds of the rollout by number of GPUs, per mode; right: saving against `off`."""
    from matplotlib.ticker import NullLocator

    made = figure(11, 4.2, title)
    seconds, saved = made.subplots(1, 2)
    plain(seconds, "GPUs", "rollout seconds")
    plain(saved, "GPUs", "saved against off, %")
    if not any(sizes.values()):
        say(seconds, "nothing was simulated")
        say(saved, "")
        return made
    base = {size.gpus: size.mean for size in sizes.get("off", ())}
    for index, (mode, some) in enumerate(sizes.items()):
        color, gpus = _color(mode, index), [size.gpus for size in some]
        means = [size.mean for size in some]
        style = {"marker": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.6, "color": color}
        seconds.errorbar(gpus, means, yerr=[size.half for size in some], label=mode, **style)
        mine = [size for size in some if size.gpus in base and mode != "off"]
        gains = [100 * (1 - size.mean / base[size.gpus]) for size in mine]
        errors = [100 * size.half / base[size.gpus] for size in mine]
        saved.errorbar([size.gpus for size in mine], gains, yerr=errors, label=mode, **style)
    counts = sorted({size.gpus for some in sizes.values() for size in some})
    for axes in (seconds, saved):
        axes.set_xscale("log")
        axes.set_xticks(_thinned(counts), [f"{count:,}" for count in _thinned(counts)])
        axes.xaxis.set_minor_locator(NullLocator())
    seconds.set_ylim(bottom=0)
    saved.axhline(0, color=MUTED, linewidth=0.8)
    legend_beside(saved)
    return made


def agreement(checks: Sequence[Check], unit: str = " s", title: str = "Simulated against known") -> "Figure":
    """Each pair as a row: the reference as a line with its NEAR band, the simulated value as a point with its interval."""
    made = figure(8.5, 1.6 + 0.42 * max(1, len(checks)), title)
    axes = made.subplots()
    plain(axes, f"simulated, % of the reference (band: within {NEAR:.0%})")
    if not checks:
        say(axes, "nothing to compare")
        return made
    axes.grid(False, axis="y")
    axes.axvspan(100 * (1 - NEAR), 100 * (1 + NEAR), color=SERIES[2], alpha=0.13, linewidth=0)
    axes.axvline(100, color=INK, linewidth=1)
    sources = list(dict.fromkeys(check.source for check in checks))
    for source in sources:
        mine = [(row, check) for row, check in enumerate(checks) if check.source == source]
        values = [100 * check.simulated / check.reference for _, check in mine]
        errors = [100 * check.half / check.reference for _, check in mine]
        marker, color = "os^D"[sources.index(source) % 4], SERIES[sources.index(source) % len(SERIES)]
        axes.errorbar(values, [row for row, _ in mine], xerr=errors, fmt=marker, color=color, capsize=3, label=source)
    for row, check in enumerate(checks):
        text = f"{check.simulated:.3g}{unit}, {check.source} {check.reference:.3g}{unit}"
        axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=MUTED)
    axes.set_yticks(range(len(checks)), [check.label for check in checks], color=INK)
    axes.set_ylim(len(checks) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 85), max(high, 115))
    return made


def _color(name: str, index: int) -> str:
    return MODE_COLORS.get(name, SERIES[index % len(SERIES)])


def _above(axes: "Axes", x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8, color=color)


def _thinned(counts: Sequence[int]) -> Sequence[int]:
    """Ticks that do not overlap on a logarithmic axis: at most nine."""
    kept, factor = [counts[0]], (counts[-1] / counts[0]) ** 0.125
    for count in counts[1:]:
        if count >= factor * kept[-1] * 0.999:
            kept.append(count)
    return kept
