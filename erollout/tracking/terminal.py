"""Tables on stdout: at full width in a file or a pipe, folded and never cut on a terminal. Light."""

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 10_000


def print_whole(renderable: RenderableType, console: Console | None = None) -> None:
    """Print a renderable without cutting anything."""
    console = console or Console(highlight=False)
    if isinstance(renderable, Table):
        for column in renderable.columns:
            column.overflow = "fold"
    if not console.is_terminal:
        whole = Measurement.get(console, console.options.update(width=_WIDEST), renderable).maximum
        console.width = max(console.width, whole)
    console.print(renderable)
