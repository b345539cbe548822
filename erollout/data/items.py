"""Items of a task before tokenization, and the interface of tasks."""

from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class TaskItem:
    """A question with all known data about its answer."""

    question: str | tuple[Message, ...]
    """Plain text, or chat messages that end with the user's."""
    solution: str | None
    """A perfect response, for supervised training; None: the task has none."""
    task: str
    record: dict[str, Any] = field(default_factory=dict)
    """Data for the scorer; picklable."""
    origin: str = ""
    """Origin, for messages: `train.jsonl:17`, `chain_sum item 20000003`."""


class Source(Protocol):
    """A task or dataset. `item` is a pure function of the index, so resuming needs only a position."""

    def __len__(self) -> int:
        """Items in one epoch."""
        ...

    def item(self, index: int) -> TaskItem:
        """The item at a global index; indices beyond the first epoch wrap around."""
        ...
