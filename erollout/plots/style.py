"""Common style of all plots: fonts, colours, axes. Matplotlib without a display, loaded when a figure is drawn."""

import base64
import io
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.speculation.step import Arm

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED, GRID, EMPTY = "#1f2933", "#616e7c", "#e4e7eb", "#eef1f5"
OFF_COLOR = "#b8c2cc"
"""Colour of steps without drafts."""
ALERT = "#c2410c"
"""Colour of what the reader should look at."""
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#616e7c")
"""Colours distinguishable without colour vision (Okabe and Ito's palette, without black and yellow)."""
_LETTERS_PER_INCH = 9
"""Letters of a title on an inch of width, at most."""
_DPI = 150
_LONGEST_NAME = 44
_LARGEST_SVG = 500_000
"""Bytes of an SVG up to which it is used."""
_HUES = ("Blues", "Oranges", "Greens", "Purples")
"""Colour maps, one per drafter, darker with longer drafts."""


def figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure  # without pyplot: no global state

    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    text = textwrap.fill(title, int(width * _LETTERS_PER_INCH), max_lines=2, placeholder=" ...")
    made.suptitle(_plain_text(text), x=0.01, ha="left", color=INK, fontweight="bold", fontsize=12)
    return made


def save(figure: "Figure", out: str | Path) -> None:
    """Write a figure; the suffix selects the format. Raises UserError if it can't be written."""
    try:
        path = Path(out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _any_letters():
            figure.savefig(path, dpi=_DPI)
    except (OSError, ValueError) as error:
        raise UserError(f"can't write the figure {out}: {' '.join(str(error).split())}") from error


def data_address(figure: "Figure") -> str:
    """A figure as an address with all its data: SVG, its letters drawn as shapes; PNG where that would be too large."""
    kind, content = "svg+xml", _rendered(figure, "svg")
    if len(content) > _LARGEST_SVG:
        kind, content = "png", _rendered(figure, "png")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _rendered(figure: "Figure", format: str) -> bytes:
    buffer = io.BytesIO()
    with _any_letters():
        figure.savefig(buffer, format=format, dpi=_DPI)
    return buffer.getvalue()


@contextmanager
def _any_letters() -> Iterator[None]:
    """Draw letters that the font lacks as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def plain(axes: "Axes", xlabel: str = "", ylabel: str = "", title: str = "") -> None:
    """Style axes: no box, a light grid."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def shortened(text: str) -> str:
    """A name without its middle, if it is too long for a figure."""
    return text if len(text) <= _LONGEST_NAME else f"{text[:8]}...{text[-(_LONGEST_NAME - 11) :]}"


def label(text: str) -> str:
    """A user's name as a label: shortened; never a formula, nor hidden from legends by an underscore at its start."""
    short = shortened(text)
    return _plain_text(f"\u200b{short}" if short.startswith("_") else short)


def steps_below(axes: "Axes") -> None:
    """Number the x axis by steps, which are whole."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def legend_beside(axes: "Axes", reverse: bool = False) -> None:
    """Add a legend to the right of the axes, if there is anything to explain."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=9, reverse=reverse)


def legend_below(figure: "Figure", handles: "Sequence[Artist]", columns: int = 4) -> None:
    """Add a legend of the whole figure below its axes."""
    if handles:
        figure.legend(handles=handles, frameon=False, labelcolor=INK, loc="outside lower left", ncols=columns, fontsize=9)


def say(axes: "Axes", text: str) -> None:
    """Write a text in the middle of empty axes."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def run_colors(count: int) -> Sequence[str]:
    """Colours of runs: those of SERIES while they suffice, else of a rainbow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    rainbow = colormaps["turbo"]
    return SERIES[:count] if count <= len(SERIES) else [to_hex(rainbow(0.05 + 0.9 * i / (count - 1))) for i in range(count)]


def arm_colors(arms: Iterable[Arm]) -> dict[Arm, str]:
    """Colours of arms: grey without drafts; a hue per drafter, darker with longer drafts. Sorted, no drafts first."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    ordered = sorted(set(arms), key=lambda arm: (arm.speculates, arm))
    colors = {arm: OFF_COLOR for arm in ordered if not arm.speculates}
    formats = list(dict.fromkeys(arm.format for arm in ordered if arm.speculates))
    for index, format in enumerate(formats):
        mine = [arm for arm in ordered if arm.speculates and arm.format == format]
        hue = colormaps[_HUES[index % len(_HUES)]]
        for rank, arm in enumerate(mine):
            colors[arm] = to_hex(hue(0.4 + 0.55 * (rank / (len(mine) - 1) if len(mine) > 1 else 0.6)))
    return colors


def draft_colors() -> "Colormap":
    """Colours of draft lengths: grey for 0, then darker from green to violet, hues that remain distinct when pale."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("drafts", [(0, OFF_COLOR), (0.02, "#8ed8c0"), (0.5, "#1f78b4"), (1, "#4a1486")])


def log2_ticks(axes: "Axes", values: Sequence[int]) -> None:
    """Scale the x axis in powers of two, labelled with plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    low, high = min(values), max(values)
    powers = [2**i for i in range(high.bit_length() + 1) if low <= 2**i <= high]
    axes.xaxis.set_major_locator(FixedLocator(powers or [low]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_text(text: str) -> str:
    return text.replace("$", r"\$")
