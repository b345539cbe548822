"""One item of a task before it is tokenized, and what every task offers."""

from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class TaskItem:
    """A question with everything that is known about its answer."""

    question: str | tuple[Message, ...]
    """Plain text, or chat messages that end with the user's."""
    solution: str | None
    """A perfect response, for supervised training; None where the task has none in writing."""
    task: str
    record: dict[str, Any] = field(default_factory=dict)
    """What the scorer needs; picklable."""
    origin: str = ""
    """Where it comes from, for messages: `train.jsonl:17`, `chain_sum item 20000003`."""


class Source(Protocol):
    """A task or dataset. `item` is a pure function of the index, so a position is all that resuming needs."""

    def __len__(self) -> int:
        """Items in one epoch."""
        ...

    def item(self, index: int) -> TaskItem:
        """Item at a global index; indices beyond the first epoch go round again."""
        ...
