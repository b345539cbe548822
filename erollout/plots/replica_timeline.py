"""Plot of every replica's occupancy over a rollout, with the draft length as colour, and migrated sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erollout.plots.style import ALERT, EMPTY, INK, MUTED, OFF_COLOR, SERIES, draft_colors, figure, plain, say
from erollout.speculation.trace import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

MOST_LANES = 64
"""Largest number of replicas drawn as lanes; more become rows of a heat map."""
MOST_ARROWS = 60
FLOOR = 0.25
"""Share of a lane's height, or of a heat map's colour, for a single sequence, so that it remains visible."""
IDLE_BELOW = 0.02
"""Busy share of a span below which the replica counts as idle in it."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One replica's rollout."""

    name: str
    seconds: float
    """Duration that the bins divide equally, from the start of the rollout."""
    bins: Sequence[Bin]

    @property
    def width(self) -> float:
        """Seconds of a bin."""
        return self.seconds / max(1, len(self.bins))

    @property
    def end(self) -> float:
        """End of its last span with any work."""
        working = [index for index, span in enumerate(self.bins) if span.busy >= IDLE_BELOW]
        return (working[-1] + 1) * self.width if working else 0.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """Migrated sequences."""

    seconds: float
    """Seconds since the rollout began."""
    source: int
    """Index of a lane."""
    target: int
    sequences: int = 1


def occupancy(lanes: Sequence[Lane], transfers: Sequence[Transfer] = (), title: str = "Replicas over the rollout") -> "Figure":
    """One lane per replica, with its decoding sequences as height; above MOST_LANES a heat map, sorted by their ends.

    Colour is num_speculative_tokens, averaged over a span's busy time; grey: off. The top panel sums up all replicas.
    """
    from matplotlib.ticker import MaxNLocator

    as_lanes = len(lanes) <= MOST_LANES
    height = min(0.4, 7.5 / max(1, len(lanes))) * len(lanes) if as_lanes else 6.0
    made = figure(10, 2.9 + max(1.0, height), title)
    together, each = made.subplots(2, 1, sharex=True, height_ratios=[1.3, max(1.0, height)])
    plain(together, ylabel="decoding\nsequences", title="all replicas")
    plain(each, xlabel="seconds since the rollout began")
    each.grid(False)
    if not any(lane.bins and lane.seconds > 0 for lane in lanes):
        say(each, "no steps")
        return made
    each.set_title(_subtitle(lanes, transfers, as_lanes), loc="left", color=INK, fontsize=10)
    scale = _scale(lanes)
    _draw_sum(together, lanes)
    if as_lanes:
        _draw_lanes(each, lanes, scale)
        rows = {index: float(index) for index in range(len(lanes))}
    else:
        rows = _draw_heat_map(each, lanes, scale)
    _draw_transfers(each, transfers, rows)
    each.set_xlim(0, max(lane.seconds for lane in lanes))
    whole, label = MaxNLocator(integer=True), "num_speculative_tokens (grey: off)"
    bar = made.colorbar(scale, ax=[together, each], aspect=35, pad=0.01, ticks=whole, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED)
    bar.ax.yaxis.label.set_color(INK)
    return made


def _subtitle(lanes: Sequence[Lane], transfers: Sequence[Transfer], as_lanes: bool) -> str:
    most = max(span.decoding for lane in lanes for span in lane.bins)
    total = sum(lane.seconds for lane in lanes)
    idle = sum(lane.width * (1 - span.busy) for lane in lanes for span in lane.bins)
    form = "height" if as_lanes else "strength"
    text = f"each replica ({form}: decoding sequences, up to {most:.0f}; white: idle, {idle / total:.0%} of all seconds"
    moved = sum(transfer.sequences for transfer in transfers)
    return f"{text}; red: {moved} sequences move)" if moved else f"{text})"


def _drafts(span: Bin) -> float:
    """Mean num_speculative_tokens over a span's busy time."""
    return span.drafts / span.busy if span.busy > 0 else 0.0


def _scale(lanes: Sequence[Lane]) -> "ScalarMappable":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    most = max(_drafts(span) for lane in lanes for span in lane.bins)
    return ScalarMappable(Normalize(0, max(1.0, most)), draft_colors())


def _color(span: Bin, scale: "ScalarMappable") -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    most = scale.get_clim()[1] or 1.0
    return to_rgba(scale.cmap(_drafts(span) / most))


def _draw_sum(axes: "Axes", lanes: Sequence[Lane]) -> None:
    """Draw the decoding sequences of all replicas: those in steps with drafts below, the others on top."""
    end, count = max(lane.seconds for lane in lanes), max(len(lane.bins) for lane in lanes)
    edges = [end * index / count for index in range(count + 1)]
    drafting, others = [0.0] * count, [0.0] * count
    for lane in lanes:
        for index in range(count):
            at = int((edges[index] + edges[index + 1]) / 2 / lane.width) if lane.bins and lane.seconds > 0 else count
            if at < len(lane.bins):
                span = lane.bins[at]
                share = span.speculating / span.busy if span.busy > 0 else 0.0
                drafting[index] += span.decoding * share
                others[index] += span.decoding * (1 - share)
    total = [a + b for a, b in zip(drafting, others, strict=True)]
    axes.stairs(drafting, edges, fill=True, color=SERIES[0], label="with drafts")
    axes.stairs(total, edges, baseline=drafting, fill=True, color=OFF_COLOR, label="off")
    axes.set_ylim(0, max(1.0, max(total)) * 1.05)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.0, 0.98), fontsize=8, ncols=2)


def _draw_lanes(axes: "Axes", lanes: Sequence[Lane], scale: "ScalarMappable") -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Rectangle

    most = max(1.0, max((span.decoding for lane in lanes for span in lane.bins), default=1.0))
    boxes, colors = [], []
    for row, lane in enumerate(lanes):
        axes.add_patch(Rectangle((0, row - 0.45), lane.end, 0.9, color=EMPTY, linewidth=0))
        for index, span in enumerate(lane.bins):
            if span.busy >= IDLE_BELOW and span.decoding > 0:
                left, right = index * lane.width, (index + 1) * lane.width
                top = row + 0.45 - 0.9 * _strength(span, most)
                boxes.append([(left, row + 0.45), (left, top), (right, top), (right, row + 0.45)])
                colors.append(_color(span, scale))
    axes.add_collection(PolyCollection(boxes, facecolors=colors, edgecolors="face", linewidths=0.2))
    rows = range(len(lanes))
    axes.vlines([lane.end for lane in lanes], [row - 0.45 for row in rows], [row + 0.45 for row in rows], INK, lw=1)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    step = 1 if len(lanes) <= 24 else -(-len(lanes) // 16)
    axes.set_yticks(range(0, len(lanes), step), [lane.name for lane in lanes[::step]], fontsize=8)
    axes.tick_params(axis="y", length=0)


def _draw_heat_map(axes: "Axes", lanes: Sequence[Lane], scale: "ScalarMappable") -> dict[int, float]:
    """Draw a heat map, last replica to end first. Returns the row of each lane."""
    order = sorted(range(len(lanes)), key=lambda index: -lanes[index].end)
    most = max(1.0, max(span.decoding for lane in lanes for span in lane.bins))
    end, count = max(lane.seconds for lane in lanes), max(len(lane.bins) for lane in lanes)
    image = []
    for index in order:
        lane, row = lanes[index], []
        for column in range(count):
            at = int((column + 0.5) * end / count / lane.width) if lane.bins and lane.seconds > 0 else count
            span = lane.bins[at] if at < len(lane.bins) else None
            row.append(_shade(span, most, scale))
        image.append(row)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, end, len(lanes) - 0.5, -0.5))
    axes.set_ylabel(f"{len(lanes)} replicas, last to end first", color=INK)
    return {index: float(row) for row, index in enumerate(order)}


def _strength(span: Bin, most: float) -> float:
    """Strength of a span's colour: FLOOR to 1 with its decoding sequences."""
    return FLOOR + (1 - FLOOR) * min(1.0, span.decoding / most)


def _shade(span: Bin | None, most: float, scale: "ScalarMappable") -> tuple[float, float, float]:
    """A span's colour, paler with fewer sequences; white where it is idle."""
    if span is None or span.busy < IDLE_BELOW or span.decoding <= 0:
        return 1.0, 1.0, 1.0
    strength = _strength(span, most)
    red, green, blue, _ = _color(span, scale)
    return 1 - strength * (1 - red), 1 - strength * (1 - green), 1 - strength * (1 - blue)


def _draw_transfers(axes: "Axes", transfers: Sequence[Transfer], rows: dict[int, float]) -> None:
    """Draw an arrow for each move; if there are too many, a mark at both ends."""
    if not transfers:
        return
    at = [t.seconds for t in transfers]
    sources, targets = [rows[t.source] for t in transfers], [rows[t.target] for t in transfers]
    if len(transfers) <= MOST_ARROWS:
        for transfer, source, target in zip(transfers, sources, targets, strict=True):
            width = 0.8 + 0.3 * min(4, transfer.sequences)
            arrow = {"arrowstyle": "-|>", "color": ALERT, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (transfer.seconds, target), (transfer.seconds, source), arrowprops=arrow)
    else:
        axes.scatter(at, targets, s=9, marker="v", color=ALERT, linewidths=0)
    axes.scatter(at, sources, s=12, color=ALERT, zorder=4)
