"""The cluster's one stream of operations: windows of occupancies, and migrating sequences.

The leaders of all replicas take part in the same operations over a gloo group of their own, in the same order, one after the
other: window 1, the parcels of decision 1 if it migrates sequences, window 2, ... At a step border, a replica polls the pending
operation and posts the next one once it is complete; it never waits. All replicas feed the complete windows to equal state
machines, so all take the same decisions.

An operation is an all-to-all: every two replicas are connected directly, so each notices at once when another's connection
closes. A peer that only stalls costs nothing but time: the operation stays pending, and the replicas keep decoding.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllToAllOptions

from erollout.config import CoordinatorConfig
from erollout.coordinator.occupancy import Occupancy
from erollout.coordinator.state_machine import ClusterDecision, Move, StateMachine
from erollout.types import PartialRollout

BUSY_SHARE = 0.0007
"""Share of a busy replica's time that windows may take: if they cost more, the pause between them grows."""
SLOWEST = 20
"""Longest pause between two windows that the exchange's own cost may impose, in multiples of window_seconds."""


class Stream:
    """Operations over one group, one pending at a time, polled. All ranks post the same ones in the same order."""

    def __init__(self, group: dist.ProcessGroup, stall_seconds: float, patience_seconds: float) -> None:
        """
        Args:
            group: gloo, with a timeout beyond patience_seconds.
            stall_seconds: time after which a pending operation counts as stalled.
            patience_seconds: time after which a pending operation is given up.
        """
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.stall_seconds = stall_seconds
        self.patience_seconds = patience_seconds
        self.error: str | None = None
        """Why the stream is broken for good; None: it is not."""
        self._work: dist.Work | None = None
        self._received = array("d")
        self._options = AllToAllOptions()
        self._options.asyncOp = True
        self._waited = 0.0
        self._polled_at = 0.0

    @property
    def is_free(self) -> bool:
        return self._work is None and self.error is None

    @property
    def is_stalled(self) -> bool:
        """The pending operation has waited for others for longer than stall_seconds."""
        return self._waited > self.stall_seconds

    def gather(self, vector: Sequence[float]) -> None:
        """Post this rank's vector, of equal length on all ranks, to all; `poll` returns all vectors in rank order."""
        self._post(array("d", vector) * self.size, len(vector) * self.size, [], [])

    def swap(self, parcels: Sequence["array[float]"], sizes: Sequence[int]) -> None:
        """Post a parcel (possibly empty) to each rank; `poll` returns the parcels for this rank, of `sizes`, in rank order."""
        sent = array("d")
        for parcel in parcels:
            sent += parcel
        self._post(sent, sum(sizes), list(sizes), [len(parcel) for parcel in parcels])

    def poll(self) -> "array[float] | None":
        """The result of the pending operation, returned once; None while it is pending."""
        if self._work is None:
            return None
        if not self._work.is_completed():
            self._count_waiting()
            return None
        work, self._work, self._waited = self._work, None, 0.0
        try:
            work.wait()
        except RuntimeError as error:  # from gloo: a connection closed, or the group's timeout passed
            self.error = _first_line(error)
            return None
        return self._received

    def _post(self, sent: "array[float]", size: int, sizes: list[int], sent_sizes: list[int]) -> None:
        assert self.is_free
        self._received = array("d", bytes(8 * size))
        self._waited, self._polled_at = 0.0, time.monotonic()
        try:  # the group's own method: the checks in torch.distributed's function take twice as long as the call itself
            self._work = self.group.alltoall_base(_tensor(self._received), _tensor(sent), sizes, sent_sizes, self._options)
        except RuntimeError as error:
            self.error = _first_line(error)

    def _count_waiting(self) -> None:
        """Count the time since the last look, but not all of a long one: then it was this rank that was slow or stopped."""
        now = time.monotonic()
        self._waited += min(now - self._polled_at, self.stall_seconds / 2)
        self._polled_at = now
        if self._waited > self.patience_seconds:
            self._work, self.error = None, f"no answer from some replica within {self.patience_seconds:g} s"


@dataclass(slots=True)
class News:
    """What the stream brought since the last poll."""

    decision: ClusterDecision | None = None
    release: int = 0
    """Number of sequences to send (`Exchange.give`), which the stream waits for."""
    arrivals: list[PartialRollout] = field(default_factory=list)


class Exchange:
    """One replica's endpoint of the stream in one rollout."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        machine: StateMachine,
        num_arms: int,
        max_tokens: int,
        options: CoordinatorConfig,
        patience_seconds: float,
    ) -> None:
        """
        Args:
            group: the replicas' leaders, in replica order; not used by anything else, with no operation pending.
            machine: state machine with the same arguments on every replica.
            max_tokens: longest response of the rollout.
            patience_seconds: how long to wait for a replica that does not answer, once there is nothing else to do.
        """
        self.stream = Stream(group, options.stall_seconds, patience_seconds)
        self.replica = group.rank()
        self.decision = machine.start()
        self.machine = machine
        self.window_seconds = options.window_seconds
        self.windows = self.moves_out = self.moves_in = self.sequences_out = self.sequences_in = 0
        self.seconds = 0.0
        """Seconds that this thread spent in `poll`."""
        self._num_arms = num_arms
        self._width = parcel_width(max_tokens)
        self._given: list[PartialRollout] = []
        """Sequences sent in the last moves, kept until a window shows that their targets received them."""
        self._release_asked = self._swap_due = False
        self._spent = 0.0
        """CPU seconds of this thread for the present window."""
        self._pause = 0.0
        self._decided_at = -inf

    @property
    def has_ended(self) -> bool:
        """Whether all replicas have agreed that every response is complete or that the rollout is interrupted."""
        return self.decision.is_last

    @property
    def is_alone(self) -> bool:
        """Whether nothing arrives from the other replicas, for the moment or for good."""
        return self.stream.error is not None or self.stream.is_stalled

    def poll(self, occupancy: Callable[[], Occupancy], pause: float | None = None) -> News:
        """Advance the stream as far as possible without waiting.

        Args:
            occupancy: called when a window is posted.
            pause: least seconds between the last window and the next; None: long enough that the exchange costs little.
        """
        started = time.perf_counter()
        news = News()
        result = self.stream.poll()
        if result is not None and self._swap_due:
            news.arrivals = self._swapped(result)
        elif result is not None:
            news.decision = self._gathered(result)
        elif self.stream.is_free and not self.has_ended:  # only after the caller has carried out the last result
            news.release = self._advance(occupancy, self._pause if pause is None else pause)
        self.seconds += time.perf_counter() - started
        return news

    def give(self, partials: list[PartialRollout]) -> None:
        """Send the released sequences to their targets in order, to each the number decided."""
        rest = list(partials)
        parcels = [array("d") for _ in range(self.stream.size)]
        for move in self.decision.moves:
            if move.source == self.replica:
                part, rest = rest[: move.num_sequences], rest[move.num_sequences :]
                parcels[move.target] += encode(part, move.num_sequences, self._width)
                self.moves_out += 1
        assert not rest, f"{len(partials)} sequences released for {self.decision.moves}"
        self.sequences_out += len(partials)
        self._given = partials
        self._post_swap(parcels)

    def take_back(self) -> list[PartialRollout]:
        """The sequences sent away that may have reached no replica, returned once, after the stream broke."""
        assert self.stream.error is not None
        partials, self._given = self._given, []
        return partials

    def _gathered(self, result: "array[float]") -> ClusterDecision:
        """Take the next decision, from a complete window."""
        started = time.thread_time()
        self.windows += 1
        window = []
        length = len(result) // self.stream.size
        for replica in range(self.stream.size):
            row = result[replica * length : (replica + 1) * length]
            assert row[0] == self.windows, (
                f"replica {replica} is in window {row[0]:.0f}, replica {self.replica} in {self.windows}"
            )
            window.append(Occupancy.from_vector(row[1:], self._num_arms))
        self._given = []  # every replica that posted this window has received what the previous decision sent it
        self.decision = self.machine.advance(window)
        self._swap_due, self._release_asked = bool(self.decision.moves), False
        spent = self._spent + time.thread_time() - started
        self._pause = min(max(self.window_seconds, spent / BUSY_SHARE), SLOWEST * self.window_seconds)
        self._decided_at = time.monotonic()
        return self.decision

    def _advance(self, occupancy: Callable[[], Occupancy], pause: float) -> int:
        """Post the next operation if it is due. Returns the number of sequences to release first; 0: none."""
        if self._swap_due:
            return self._swap()
        if time.monotonic() >= self._decided_at + pause:
            started = time.thread_time()
            self.stream.gather([self.windows + 1, *occupancy().to_vector()])
            self._spent = time.thread_time() - started
        return 0

    def _swap(self) -> int:
        """Post this replica's part of the decided moves. Returns the number of sequences to release first; 0: none."""
        wanted = sum(move.num_sequences for move in self.decision.moves if move.source == self.replica)
        if not wanted:
            self._post_swap([array("d")] * self.stream.size)
        elif not self._release_asked:
            self._release_asked = True
            return wanted
        return 0

    def _post_swap(self, parcels: Sequence["array[float]"]) -> None:
        if self.stream.is_free:
            self.stream.swap(parcels, [sum(self._parcel_size(m) for m in moves) for moves in self._moves_to_here()])

    def _swapped(self, result: "array[float]") -> list[PartialRollout]:
        """The sequences that the last decision's moves brought to this replica."""
        self._swap_due = False
        partials, start = [], 0
        for moves in self._moves_to_here():
            for move in moves:
                size = self._parcel_size(move)
                partials += decode(result[start : start + size], self._width)
                start += size
                self.moves_in += 1
        self.sequences_in += len(partials)
        return partials

    def _moves_to_here(self) -> list[list[Move]]:
        """The last decision's moves to this replica, by source."""
        here = [move for move in self.decision.moves if move.target == self.replica]
        return [[move for move in here if move.source == source] for source in range(self.stream.size)]

    def _parcel_size(self, move: Move) -> int:
        return 1 + move.num_sequences * self._width


def parcel_width(max_tokens: int) -> int:
    """Numbers of one response in a parcel: its place, and for each token id, two log-probs and loss mask."""
    return 3 + 4 * max_tokens


def encode(partials: Sequence[PartialRollout], num_sequences: int, width: int) -> "array[float]":
    """Pack up to num_sequences responses, [1 + num_sequences * width]: their number, then index, tokens, log-probs, mask."""
    parcel = array("d", bytes(8 * (1 + num_sequences * width)))
    parcel[0] = len(partials)
    for index, part in enumerate(partials):
        place = part.prompt_index, part.sample_index, len(part.response_ids)
        values = array("d", [*place, *part.response_ids, *part.logprobs, *part.raw_logprobs, *part.loss_mask])
        start = 1 + index * width
        parcel[start : start + len(values)] = values
    return parcel


def decode(parcel: "array[float]", width: int) -> list[PartialRollout]:
    """The inverse of `encode`."""
    partials = []
    for index in range(int(parcel[0])):
        row = parcel[1 + index * width : 1 + (index + 1) * width]
        prompt_index, sample_index, length = (int(value) for value in row[:3])
        ids, logprobs, raw, mask = (tuple(row[3 + part * length : 3 + (part + 1) * length]) for part in range(4))
        ids, mask = (tuple(int(value) for value in column) for column in (ids, mask))
        partials.append(PartialRollout(prompt_index, sample_index, ids, logprobs, raw, loss_mask=mask))
    return partials


def _tensor(values: "array[float]") -> Tensor:
    """A float64 tensor over the same memory."""
    return torch.frombuffer(values, dtype=torch.float64) if values else torch.empty(0, dtype=torch.float64)


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].partition(". This is typically")[0]
