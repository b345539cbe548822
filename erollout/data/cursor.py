"""How far a run has drawn from its data. Pure."""

from dataclasses import dataclass


@dataclass(slots=True)
class DataCursor:
    """The next item of a run, counted over all epochs: the same on every rank, and in the run's state."""

    position: int = 0

    def take(self, count: int) -> range:
        """Indices of the next items."""
        start, self.position = self.position, self.position + count
        return range(start, self.position)
