"""Map of where speculation pays: the best arm by batch and context, its speed-up, and measured points."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from erollout.plots.style import ALERT, INK, arm_colors, figure, log2_ticks, plain
from erollout.speculation.step import OFF, Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = (0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
"""Speed-ups with a contour, besides 1: few, so that their labels have room."""
_PALE = 0.75
"""Opacity of the regions."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predictions on a grid; rows are contexts, columns batches."""

    batches: Sequence[int]
    contexts: Sequence[int]
    best: Sequence[Sequence[Arm]]
    """The arm with the least time per token."""
    speed_up: Sequence[Sequence[float]]
    """Speed-up of the best arm that drafts over autoregressive decoding."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Measured and predicted best arm at one batch and context."""

    batch: int
    context: int
    best: Arm
    """Best arm by measured times."""
    predicted: Arm
    """Best arm by the cost model."""


def boundary(prediction: Prediction, measured: Sequence[Measurement] = (), title: str = "Where speculation pays") -> "Figure":
    """Regions by best arm, contours of the speed-up with 1 in bold, and measured points in the colour of their best arm.

    A cross marks a point at which the model is wrong on whether speculation pays; a ring, one at which only the arm differs.
    """
    made = figure(9, 5, title)
    axes = made.subplots()
    plain(axes, "decoding sequences of one replica", "context length in tokens")
    axes.grid(False)
    colors = arm_colors([OFF, *(arm for row in prediction.best for arm in row), *(m.best for m in measured)])
    _draw_regions(axes, prediction, colors)
    _draw_contours(axes, prediction)
    _draw_measured(axes, measured, colors)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    log2_ticks(axes, [*prediction.batches, *(m.batch for m in measured)])
    _explain(axes, prediction, measured, colors)
    return made


def _draw_regions(axes: "Axes", prediction: Prediction, colors: dict[Arm, str]) -> None:
    from matplotlib.colors import ListedColormap

    arms = list(colors)
    index = {arm: number for number, arm in enumerate(arms)}
    cells = [[index[arm] for arm in row] for row in prediction.best]
    edges = _edges(prediction.batches), _edges(prediction.contexts)
    axes.pcolormesh(*edges, cells, cmap=ListedColormap(list(colors.values())), vmin=-0.5, vmax=len(arms) - 0.5, alpha=_PALE)


def _draw_contours(axes: "Axes", prediction: Prediction) -> None:
    if len(prediction.batches) < 2 or len(prediction.contexts) < 2:
        return
    from matplotlib.patheffects import withStroke

    values = [value for row in prediction.speed_up for value in row]
    for levels, width in ((LEVELS, 0.8), ((1.0,), 2.4)):
        inside = [level for level in levels if min(values) < level < max(values)]
        if inside:
            lines = axes.contour(
                prediction.batches, prediction.contexts, prediction.speed_up, levels=inside, colors=INK, linewidths=width
            )
            if levels is LEVELS:
                for text in axes.clabel(lines, fmt="%g×", fontsize=9, inline=False):
                    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
                    text.set_zorder(6)  # above the measured points


def _draw_measured(axes: "Axes", measured: Sequence[Measurement], colors: dict[Arm, str]) -> None:
    def draw(points: Sequence[Measurement], **style: object) -> None:
        if points:
            axes.scatter([m.batch for m in points], [m.context for m in points], clip_on=False, zorder=5, **style)  # type: ignore[arg-type]

    draw(measured, s=64, c=[colors[m.best] for m in measured], edgecolors="white", linewidths=1.4)
    draw([m for m in measured if _other_arm(m)], s=130, facecolors="none", edgecolors=INK, linewidths=1.0)
    draw([m for m in measured if _wrong(m)], s=110, marker="x", color=ALERT, linewidths=1.8)


def _wrong(m: Measurement) -> bool:
    return m.best.speculates != m.predicted.speculates


def _other_arm(m: Measurement) -> bool:
    return m.best != m.predicted and not _wrong(m)


def _explain(axes: "Axes", prediction: Prediction, measured: Sequence[Measurement], colors: dict[Arm, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(label: str, **style: object) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **style)  # type: ignore[arg-type]

    shown = {arm for row in prediction.best for arm in row} | {m.best for m in measured}
    handles: list[Patch | Line2D] = [Patch(color=colors[arm], alpha=_PALE, label=str(arm)) for arm in colors if arm in shown]
    handles.append(Line2D([], [], color=INK, linewidth=2.4, label="drafting breaks even"))
    if measured:
        wrong, other = sum(map(_wrong, measured)), sum(map(_other_arm, measured))
        count = len(measured)
        handles.append(mark(f"{count} measured, best", marker="o", color=list(colors.values())[-1], markeredgecolor="white"))
        handles.append(mark(f"{other} best with another arm", marker="o", color="none", markeredgecolor=INK, markersize=10))
        handles.append(mark(f"{wrong} on the wrong side", marker="x", color=ALERT, markeredgewidth=2.2, markersize=8))
    axes.legend(handles=handles, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=9)


def _edges(values: Sequence[int]) -> list[float]:
    """Cell borders around these values, midway between neighbours on a logarithmic axis."""
    if len(values) == 1:
        return [values[0] / 2**0.5, values[0] * 2**0.5]
    inner = [(low * high) ** 0.5 for low, high in pairwise(values)]
    return [values[0] ** 2 / inner[0], *inner, values[-1] ** 2 / inner[-1]]
