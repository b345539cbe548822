"""Plots of a run from its history (`journal.read_history`), by matplotlib without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.tracking import metrics as names
from erollout.tracking.journal import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[dict[str, float]]
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2563eb", "#d97706"
BANDS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#7b8794")
LENGTHS = (("p99", "#93c5fd"), ("p90", "#3b82f6"), ("p50", "#1e40af"), ("mean", ORANGE))


def reward_curve(history: History) -> "Figure":
    """Mean reward per step, its moving average, and held-out accuracy at the steps that measured it."""
    figure, axes = _figure("Reward", "mean reward of the step's samples")
    steps, rewards = _series(history, names.REWARD)
    axes.plot(steps, rewards, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(steps, _moving_average(rewards, max(1, len(rewards) // 20)), color=BLUE, linewidth=2, label="training reward")
    evaluated, accuracy = _series(history, names.ACCURACY)
    if evaluated:
        axes.plot(evaluated, accuracy, "o--", color=ORANGE, linewidth=1.2, markersize=6, label="held-out accuracy (pass@1)")
        for at in (0, -1):
            axes.annotate(
                f"{accuracy[at]:.0%}",
                (evaluated[at], accuracy[at]),
                (0, 9),
                textcoords="offset points",
                ha="center",
                color=ORANGE,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
            )
    _legend(axes)
    return figure


def response_lengths(history: History) -> "Figure":
    """Percentiles and mean of the response lengths per step."""
    figure, axes = _figure("Response length", "tokens")
    for name, color in LENGTHS:
        steps, values = _series(history, f"{names.RESPONSE_LENGTH}/{name}")
        if steps:
            axes.plot(steps, values, color=color, linewidth=1.8, label=name)
    axes.set_ylim(bottom=0)
    _legend(axes, beside=True)
    return figure


def phase_seconds(history: History) -> "Figure":
    """Seconds per phase and step, stacked; phases beyond the six largest are summed up as `other`."""
    figure, axes = _figure("Where the time goes", "seconds per step")
    prefix = f"{names.SECONDS}/"
    timed = [row for row in history if names.STEP_SECONDS in row]
    totals: dict[str, float] = {}
    for row in timed:
        for name, value in row.items():
            if name.startswith(prefix) and name != names.STEP_SECONDS:
                totals[name] = totals.get(name, 0.0) + value
    largest = sorted(totals, key=lambda name: -totals[name])[: len(BANDS) - 1]
    bands = [[row.get(name, 0.0) for row in timed] for name in largest]
    rest = [max(0.0, row[names.STEP_SECONDS] - sum(band[at] for band in bands)) for at, row in enumerate(timed)]
    labels = [name.removeprefix(prefix) for name in largest]
    if timed:
        axes.stackplot(
            [row["step"] for row in timed],
            *bands,
            rest,
            labels=[*labels, "other"],
            colors=[*BANDS[: len(bands)], BANDS[-1]],
            alpha=0.85,
        )
    _legend(axes, beside=True, stacked=True)
    return figure


def save(figure: "Figure", out: str | Path) -> None:
    """Write the figure; the suffix selects the format. Raises UserError if it can't be written."""
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"can't write the figure {out}: {' '.join(str(error).split())}") from error


def plot_run(run: str | Path, out: str | Path) -> None:
    """Save the reward curve of a run, named by its output directory or its journal, as PNG, SVG or PDF. Raises UserError."""
    history = read_metrics(run)
    if not any(names.REWARD in row for row in history):
        raise UserError(f"{run} holds no {names.REWARD}: the run has not finished a step of training yet")
    save(reward_curve(history), out)


def _figure(title: str, ylabel: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display, and only when a figure is drawn

    figure = Figure(figsize=(8, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    return figure, axes


def _legend(axes: "Axes", beside: bool = False, stacked: bool = False) -> None:
    """Add a legend inside or to the right of the axes; for stacked bands, topmost first."""
    if not axes.get_legend_handles_labels()[1]:
        return
    if beside:
        axes.legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=stacked)
    else:
        axes.legend(frameon=False, labelcolor=INK, loc="best")


def _series(history: History, name: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[name]) for row in history if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def _moving_average(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values (fewer at the start)."""
    return [sum(part := values[max(0, at + 1 - width) : at + 1]) / len(part) for at in range(len(values))]
