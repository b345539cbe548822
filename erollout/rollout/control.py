"""The engine's control of a decode replica: its toggle and the cluster's decisions, turned into orders."""

import logging
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.coordinator.exchange import Exchange
from erollout.coordinator.migration import Move
from erollout.coordinator.occupancy import Occupancy, OccupancyBuilder
from erollout.coordinator.state_machine import ClusterDecision
from erollout.engine.orders import Arrival, Control, Orders
from erollout.resilience.unattended import ignore, never
from erollout.security.unpickling import load_message
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle
from erollout.types import PartialRollout, RolloutRequest

logger = logging.getLogger(__name__)

SHORTEST_SLEEP, LONGEST_SLEEP = 0.0002, 0.005
"""Seconds between two polls of an idle replica."""
LONGEST_WAIT = 1.0
"""Longest wait in seconds before an idle replica returns to the engine, so that its ranks don't wait longer for orders."""
LOOKS_PER_WINDOW = 2
"""Largest number of polls of a busy replica in the least time between two windows."""


@dataclass(slots=True)
class _Counts:
    """Counts over a rollout's steps so far."""

    steps: int = 0
    arm: int = 0
    """Index of the last step's arm, if it is one of the agreed arms."""
    finished: int = 0
    num_drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, outcome: StepOutcome, arms: Sequence[Arm]) -> None:
        self.steps += 1
        self.arm = arms.index(outcome.arm) if outcome.arm in arms else self.arm
        self.finished += outcome.finished
        self.num_drafts += outcome.drafted_at[0] if outcome.drafted_at else 0
        self.drafted += sum(outcome.drafted_at)
        self.accepted += sum(outcome.accepted_at)


class ReplicaControl:
    """Control of a replica's leader in one rollout: chooses arms, takes prompts, and migrates sequences."""

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        max_num_seqs: int,
        toggle: Toggle,
        exchange: Exchange | None,
        lock_step: bool = False,
        stop_requested: Callable[[], bool] = never,
        alive: Callable[[], None] = ignore,
    ) -> None:
        """
        Args:
            requests: requests of the whole cluster, the same on every replica.
            toggle: this replica's toggle.
            exchange: new exchange; None for the only replica, which takes all requests.
            lock_step: whether every call of `orders` waits for one window: all replicas call equally often.
            stop_requested: whether a stop was requested in this process; all replicas then interrupt the rollout at the next
                window.
            alive: called at each window as a sign of life, but not while waiting for a silent peer.
        """
        self.requests = requests
        self.max_num_seqs = max_num_seqs
        self.toggle = toggle
        self.exchange = exchange
        self.lock_step = lock_step
        self.stop_requested = stop_requested
        self.alive = alive
        self.interrupted = False
        """Whether the remaining responses are aborted."""
        self.stalls = self.claims = self.decisions = 0
        self.moves: list[tuple[float, Move]] = []
        """Moves between all replicas, with the seconds since the rollout began."""
        self._arm: Arm | None = None
        """The cluster's arm; None: the toggle decides."""
        self._arms = toggle.arms
        self._by_index = {request.prompt_index: request for request in requests}
        self._new: list[RolloutRequest] = []
        self._arrivals: list[Arrival] = []
        self._known: set[tuple[int, int]] = set()
        """Prompt and sample indices of the responses that are, or were completed, here."""
        self._release = 0
        self._outstanding = 0
        """Number of responses to complete here."""
        self._occupancies = OccupancyBuilder(
            max_num_seqs, toggle.seconds_per_token, lambda load: toggle.cost.step_seconds(OFF, load)
        )
        self._alone = self._broken = False
        self._late: int | None = None
        """Number of windows before the last stalled one, until one does not stall: a slow peer may stall every one."""
        self._started = time.monotonic()
        self._last_work = self._started
        self._load = Load(0, 0.0)
        self._counts = _Counts()
        self._next_look = 0.0
        if exchange is None:
            self._take(requests)
        else:
            self._carry_out(exchange.decision)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes from the cluster."""
        return self.exchange is None or self.exchange.has_ended or self._broken

    @property
    def has_lost_others(self) -> bool:
        """Whether an operation of the exchange failed or was abandoned, so that its group can't be used any more."""
        return self.exchange is not None and self.exchange.stream.error is not None

    def orders(self, load: Load) -> Orders:
        """Orders for the next step; an idle replica waits for up to LONGEST_WAIT."""
        self._load = load
        if self.exchange is not None:
            if self.lock_step:
                self._window_in_lock_step(self.exchange)
            else:
                self._follow(self.exchange)
        arm = self.toggle.decide(load, None if self._alone and not self.lock_step else self._arm)
        new, arrivals, release = tuple(self._new), tuple(self._arrivals), self._release
        self._new, self._arrivals, self._release = [], [], 0
        self.interrupted = self._is_interrupted()
        return Orders(arm, new, arrivals, release, self.has_ended, self.interrupted)

    def released(self, partials: list[PartialRollout]) -> None:
        assert self.exchange is not None
        self._outstanding -= len(partials)
        self._known -= {(part.prompt_index, part.sample_index) for part in partials}
        self.exchange.give(partials)

    def observe(self, outcome: StepOutcome) -> None:
        self.toggle.observe(outcome)
        self._outstanding -= outcome.finished
        self._counts.add(outcome, self._arms)
        self._last_work = time.monotonic()

    def report(self) -> dict[str, float]:
        """Metrics of coordination in this rollout: counts, seconds, share of the rollout's time."""
        exchange, now = self.exchange, time.monotonic()
        if exchange is None:
            return {}
        return {
            "windows": float(exchange.windows),
            "decisions": float(self.decisions),
            "moves_out": float(exchange.moves_out),
            "moves_in": float(exchange.moves_in),
            "sequences_out": float(exchange.sequences_out),
            "sequences_in": float(exchange.sequences_in),
            "stalls": float(self.stalls),
            "claims": float(self.claims),
            "exchange_seconds": exchange.seconds,
            "exchange_share": exchange.seconds / max(now - self._started, 1e-9),
            "idle_seconds": now - self._last_work,
        }

    def _is_interrupted(self) -> bool:
        if self.exchange is None or self._broken:
            return self._outstanding > 0 and self.stop_requested()
        return self.exchange.decision.interrupted

    def _follow(self, exchange: Exchange) -> None:
        """Take in what the stream brought; an idle replica waits for something."""
        now = time.monotonic()
        if self._outstanding and now < self._next_look and not self.stop_requested():
            return
        self._next_look = now + exchange.window_seconds / LOOKS_PER_WINDOW
        until, sleep = now + LONGEST_WAIT, SHORTEST_SLEEP
        self._look(exchange)
        while not self._outstanding and not self._release and not self.has_ended and time.monotonic() < until:
            time.sleep(sleep)
            sleep = min(2 * sleep, LONGEST_SLEEP)
            self._look(exchange)

    def _window_in_lock_step(self, exchange: Exchange) -> None:
        """Complete one window. Raises RuntimeError if it fails: replicas in lock step can't continue without each other."""
        before, sleep = exchange.windows, SHORTEST_SLEEP
        while exchange.windows == before and not exchange.has_ended:
            self._look(exchange, pause=0.0)
            if exchange.stream.error is not None:
                raise RuntimeError(f"replicas in lock step lost each other: {exchange.stream.error}")
            if not exchange.stream.is_free:
                time.sleep(sleep)
                sleep = min(2 * sleep, LONGEST_SLEEP)
        self._look(exchange, pause=inf)  # sequences to be moved leave before the step

    def _look(self, exchange: Exchange, pause: float | None = None) -> None:
        """Poll the stream once, and act on the result. An idle replica does not save polls."""
        if pause is None and (self.stop_requested() or not self._outstanding):
            pause = 0.0 if self.stop_requested() else exchange.window_seconds
        windows = exchange.windows
        news = exchange.poll(self._occupancy, pause)
        if exchange.windows > windows:
            self.alive()
        self._release += news.release
        self._arrive(news.arrivals)
        if news.decision is not None:
            self._carry_out(news.decision)
        if exchange.is_alone != self._alone or (exchange.stream.error is not None and not self._broken):
            self._change_company(exchange)
        if self._alone and not self.lock_step:
            self._claim(exchange)
        if self._late is not None and exchange.windows >= self._late + 2:
            self._late = None
            logger.info("replica %d follows the cluster again, from window %d", exchange.replica, exchange.windows)

    def _carry_out(self, decision: ClusterDecision) -> None:
        assert self.exchange is not None
        arm = None if decision.arm is None else self._arms[decision.arm]
        mine = self.exchange.machine.mine(decision, self.exchange.replica)
        self.moves += [(time.monotonic() - self._started, move) for move in decision.moves]
        self.decisions += arm != self._arm or any(decision.dispatched) or bool(decision.moves)
        self._arm = arm
        self._take([self.requests[position] for position in mine])

    def _change_company(self, exchange: Exchange) -> None:
        """Handle the loss or the return of the other replicas."""
        was_alone, self._alone = self._alone, exchange.is_alone
        if exchange.stream.error is not None:
            self._broken = True
            self._arrive(exchange.take_back())
            logger.warning(
                "replica %d is on its own for the rest of the rollout, after window %d: %s",
                exchange.replica,
                exchange.windows,
                exchange.stream.error,
            )
        elif self._alone:
            if self._late is None:
                logger.warning(
                    "replica %d %s: window %d has waited for others for %g s",
                    exchange.replica,
                    "waits" if self.lock_step else "decides for itself",
                    exchange.windows + 1,
                    exchange.stream.stall_seconds,
                )
            self._late = exchange.windows
        self.stalls += self._alone and not was_alone

    def _claim(self, exchange: Exchange) -> None:
        """Claim prompts to keep the slots filled while no window arrives."""
        while self._outstanding < self.max_num_seqs:
            position = exchange.machine.claim(exchange.replica)
            if position is None:
                return
            self.claims += 1
            self._take([self.requests[position]])

    def _take(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            self._new.append(request)
            self._known |= {(request.prompt_index, sample) for sample in range(request.group_size)}
            self._count_samples(request, request.num_open)

    def _arrive(self, partials: Sequence[PartialRollout]) -> None:
        for part in partials:
            request = self._by_index[part.prompt_index]
            if (part.prompt_index, part.sample_index) in self._known:
                continue  # begun by two replicas that had lost each other, and here already
            self._known.add((part.prompt_index, part.sample_index))
            self._arrivals.append(Arrival(request, part))
            self._count_samples(request, 1)

    def _count_samples(self, request: RolloutRequest, count: int) -> None:
        self._outstanding += count
        self._occupancies.given(len(request.prompt_ids), count)

    def _occupancy(self) -> Occupancy:
        """This replica's present occupancy, including all that was dispatched to it."""
        counts = self._counts
        assert self.exchange is not None
        return self._occupancies.build(
            self._load,
            self._outstanding,
            steps=counts.steps,
            arm=counts.arm,
            finished=counts.finished,
            num_drafts=counts.num_drafts,
            drafted=counts.drafted,
            accepted=counts.accepted,
            seconds=time.monotonic() - self._started,
            claimed=self.exchange.machine.claimed,
            stop_requested=self.stop_requested(),
        )


class AgreedControl:
    """A control that gives the orders of a replica's leader on all of its ranks: new ones every `interval` steps, and only the
    last arm in between.

    The steps with new orders need no communication to agree on: the ranks' engines call equally often.
    """

    def __init__(
        self,
        leader: Control | None,
        group: dist.ProcessGroup | None,
        arms: Sequence[Arm],
        requests: Sequence[RolloutRequest],
        interval: int,
        alive: Callable[[], None] = ignore,
    ) -> None:
        """
        Args:
            leader: the leader's control on the group's first rank; None on the others.
            group: the replica's ranks, over gloo; None for one rank.
            arms: OFF and all arms that the leader may order, the same on all ranks.
            requests: requests of the whole cluster, the same on all ranks.
            interval: steps between new orders.
            alive: called after each step, and on a rank without steps at each message of its leader.
        """
        self.leader = leader
        self.alive = alive
        self.group = group
        self.arms = (OFF, *(arm for arm in arms if arm != OFF))
        self.requests = {request.prompt_index: request for request in requests}
        self.interval = interval
        self._calls = 0
        self._last = Orders()

    def orders(self, load: Load) -> Orders:
        at_border = self._calls % self.interval == 0
        self._calls += 1
        if at_border:
            orders = self._agreed(load)
            self._last = Orders(orders.arm, is_last=orders.is_last)
            return orders
        return self._last

    def released(self, partials: list[PartialRollout]) -> None:
        if self.leader is not None:
            self.leader.released(partials)

    def observe(self, outcome: StepOutcome) -> None:
        self.alive()
        if self.leader is not None:
            self.leader.observe(outcome)

    def _agreed(self, load: Load) -> Orders:
        if self.group is None:
            assert self.leader is not None
            return self.leader.orders(load)
        return self._send(self.leader.orders(load)) if self.leader is not None else self._receive()

    def _send(self, orders: Orders) -> Orders:
        """Send orders to the other ranks: a header, then prompts and sequences, if any."""
        payload = b""
        if orders.requests or orders.arrivals:
            prompts = [request.prompt_index for request in orders.requests]
            payload = pickle.dumps((prompts, [arrival.partial for arrival in orders.arrivals]))
        header = [self.arms.index(orders.arm), orders.release, orders.is_last, orders.interrupts, len(payload)]
        self._broadcast(torch.tensor(header, dtype=torch.int64))
        if payload:
            self._broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        return orders

    def _receive(self) -> Orders:
        arm, release, is_last, interrupts, size = self._broadcast(torch.zeros(5, dtype=torch.int64)).tolist()
        self.alive()
        prompts: list[int] = []
        partials: list[PartialRollout] = []
        if size:
            prompts, partials = load_message(self._broadcast(torch.empty(size, dtype=torch.uint8)).numpy().tobytes())
        requests = tuple(self.requests[index] for index in prompts)
        arrivals = tuple(Arrival(self.requests[part.prompt_index], part) for part in partials)
        return Orders(self.arms[arm], requests, arrivals, release, bool(is_last), bool(interrupts))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor
