"""Collective check: all nodes of a job meet, test that they reach each other, and all-reduce some numbers; bad ones are named.

The head decides after each phase and the others follow, so that all end in the same way. Every wait is bounded.
"""

import json
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from erollout.doctor.judgement import Attendance, NodeVerdict, judge_arrivals, judge_reach, judge_sums
from erollout.doctor.reachability import Peer, answering, unreached
from erollout.doctor.report import Finding
from erollout.environment import set_default
from erollout.errors import UserError
from erollout.launch.addresses import interface_variables
from erollout.launch.meeting import Meeting, joined, meeting

if TYPE_CHECKING:
    from torch.distributed import Store

REACH_SECONDS = 30
COLLECTIVE_SECONDS = 60
_LEAVE_SECONDS = 5
_POLL_SECONDS = 0.05
_NUMBERS = 2**20
"""Number of float32 values: 4 MiB, like a gradient bucket."""
_REPEATS = 5
_CLOCK_SECONDS = 1.0
"""Allowed difference of a node's clock from the others'."""


@dataclass(frozen=True, slots=True)
class CollectiveResult:
    """Result of the collective check, on one node."""

    findings: list[Finding]
    """Findings about this node."""
    problem: str = ""
    """Problem of all nodes together; empty: none."""
    others: dict[str, str] = field(default_factory=dict)
    """Reasons by name for other bad nodes; only on the head."""


def check_collective(
    head: str, interface: str | None, run_id: str, wait_seconds: int, attendance: Attendance, secret: str = ""
) -> CollectiveResult:
    """Run the check. `head`, `interface`: as on the command line. Gives up some time after wait_seconds, whatever hangs.

    `secret`: equal on all nodes; empty: the run id suffices to take part.
    """
    outcomes: list[CollectiveResult] = []

    def run() -> None:
        try:
            outcomes.append(_take_part(meeting(head, interface, run_id, wait_seconds), interface, attendance, secret))
        except UserError as error:
            outcomes.append(_failed(str(error)))
        except dist.DistError as error:
            outcomes.append(_failed(f"the store of --head = {head} is lost ({_first_line(error)}); look at its output"))

    seconds = 2 * wait_seconds + REACH_SECONDS + COLLECTIVE_SECONDS + _LEAVE_SECONDS
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else _failed(f"no answer of --head = {head} within {seconds} s")


def _take_part(place: Meeting, chosen: str | None, attendance: Attendance, secret: str) -> CollectiveResult:
    for name, value in interface_variables(place.interface, chosen).items():
        set_default(name, value)
    greeting = f"{place.run_id:.16}".encode()[:16].ljust(16)
    nodes = attendance.nodes
    with answering(place.address, greeting) as port, joined(place, secret, nodes) as access:
        table = Table(_client(access.port), access.holds, nodes)
        try:
            if table.number >= nodes:
                raise UserError(f"{nodes} nodes have come before this one; start one process on each node")
            return _phases(table, place.wait_seconds, attendance, Peer(attendance.name, place.address, port), greeting)
        finally:
            table.leave()


class Table:
    """Messages that the nodes exchange through the head's store, by node number in order of arrival."""

    def __init__(self, store: "Store", is_head: bool, nodes: int) -> None:
        self._store = dist.PrefixStore("doctor", store)
        self.is_head, self._nodes = is_head, nodes
        self.number = self._store.add("came", 1) - 1

    def tell(self, phase: str, text: str) -> None:
        self._store.set(f"{phase}/{self.number}", text)

    def told(self, phase: str, seconds: float) -> dict[int, str]:
        """Messages by number, of all nodes or of those that answered in time."""
        keys = {number: f"{phase}/{number}" for number in range(self._nodes)}
        _wait(lambda: self._store.check(list(keys.values())), seconds)
        return {number: self._store.get(key).decode() for number, key in keys.items() if self._store.check([key])}

    def decide(self, phase: str, seconds: float, decide: Callable[[dict[int, str]], NodeVerdict]) -> NodeVerdict:
        """The head's decision, on all nodes. `decide`: maps the messages that arrived in time to a decision."""
        key = f"{phase}/decision"
        if self.is_head:
            self._store.set(key, json.dumps(asdict(decide(self.told(phase, seconds)))))
        elif not _wait(lambda: self._store.check([key]), seconds + REACH_SECONDS):
            raise UserError(f"the head does not decide ({phase}); look at its output")
        return NodeVerdict(**json.loads(self._store.get(key)))

    def world(self) -> "Store":
        return dist.PrefixStore("world", self._store)

    def leave(self) -> None:
        """Leave; the head leaves last, because the store ends with it."""
        with suppress(dist.DistError):
            self._store.add("left", 1)
            if self.is_head:
                _wait(lambda: self._store.add("left", 0) >= self._store.add("came", 0), _LEAVE_SECONDS)


def _phases(table: Table, seconds: float, attendance: Attendance, own: Peer, greeting: bytes) -> CollectiveResult:
    with _canary(attendance.shared if table.is_head else None) as canary:
        table.tell("arrival", json.dumps([own.name, own.address, own.port, canary]))
        decision = table.decide("arrival", seconds, lambda told: judge_arrivals(_names(told), own.name, attendance, seconds))
        if decision.problem:
            return _ended(decision, own.name, table.is_head)
        arrivals = [json.loads(text) for text in table.told("arrival", 0).values()]
        peers = [Peer(name, address, port) for name, address, port, _ in arrivals]
        seen = all(Path(path).exists() for *_, path in arrivals if path)
        table.tell("reach", json.dumps({"unreached": unreached(peers, greeting), "shared": seen}))
        decision = table.decide("reach", REACH_SECONDS, lambda told: judge_reach(peers, told, attendance.shared))
    if decision.problem:
        return _ended(decision, own.name, table.is_head)
    finding, wrong = _try_to_add_up(table.world(), table.number, len(peers))
    table.tell("sum", wrong)
    decision = table.decide("sum", COLLECTIVE_SECONDS, lambda told: judge_sums(peers, told))
    if dist.is_initialized():
        dist.destroy_process_group()  # only once all have answered, so that no connections are needed any more
    ended = _ended(decision, own.name, table.is_head)
    return CollectiveResult([*finding, *_gpus(), *ended.findings], ended.problem, ended.others)


def _try_to_add_up(store: "Store", rank: int, world_size: int) -> tuple[list[Finding], str]:
    """Finding with the time taken, and a problem."""
    try:
        return [add_up(store, rank, world_size)], ""
    except RuntimeError as error:  # from gloo: a peer is gone or does not answer in time
        return [], f"the collective fails: {_first_line(error)}"


def add_up(store: "Store", rank: int, world_size: int) -> Finding:
    """All-reduce and time it. Leaves the process group. Raises RuntimeError if a peer is gone or late, or sums are wrong."""
    timeout = timedelta(seconds=COLLECTIVE_SECONDS / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    ahead = clock_ahead(rank, world_size)
    latency = min(_timed(dist.barrier) for _ in range(_REPEATS))
    seconds = min(_add_numbers(rank, world_size) for _ in range(_REPEATS))
    size = 4 * _NUMBERS
    speed = 2 * (world_size - 1) / world_size * size / seconds
    text = (
        f"{world_size} nodes, barrier {latency * 1e3:.2f} ms, all_reduce of {size / 2**20:g} MiB {seconds * 1e3:.1f} ms "
        f"({speed / 1e9:.2f} GB/s each way), clock {ahead:+.3f} s from the median"
    )
    if abs(ahead) > _CLOCK_SECONDS:
        return Finding("collective", text, "warning", "set this node's clock: chronyd or systemd-timesyncd")
    return Finding("collective", text)


def clock_ahead(rank: int, world_size: int) -> float:
    """Seconds from the median of all clocks to this node's: the least of several, because a paused node looks late."""
    found = []
    for _ in range(_REPEATS):
        dist.barrier()
        clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(world_size)]
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64))
        found.append(clocks[rank].item() - statistics.median(clock.item() for clock in clocks))
    return min(found, key=abs)


def _add_numbers(rank: int, world_size: int) -> float:
    """Seconds of an all-reduce whose sum float32 represents exactly up to some thousand ranks."""
    pattern = (torch.arange(_NUMBERS) % 97).float()
    numbers = pattern * (rank + 1)
    seconds = _timed(lambda: dist.all_reduce(numbers))
    if not torch.equal(numbers, pattern * (world_size * (world_size + 1) // 2)):
        raise RuntimeError("all_reduce gives wrong sums")
    return seconds


def _ended(decision: NodeVerdict, name: str, is_head: bool) -> CollectiveResult:
    own = [Finding("collective", decision.bad[name], "error")] if name in decision.bad else []
    others = {other: reason for other, reason in decision.bad.items() if other != name} if is_head else {}
    return CollectiveResult(own, decision.problem, others)


def _failed(text: str) -> CollectiveResult:
    return CollectiveResult([Finding("collective", text, "error")])


def _gpus() -> list[Finding]:
    if not torch.cuda.device_count():
        return []
    return [Finding("NCCL", "not tested: the nodes communicated by gloo, on the CPU")]


@contextmanager
def _canary(directory: Path | None) -> Iterator[str | None]:
    """Context with a temporary file in the directory, whose path is yielded."""
    if directory is None:
        yield None
        return
    path = directory.absolute() / f".erollout-shared-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"can't write in {directory}: {error.strerror}; choose another directory") from error
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _client(port: int) -> "Store":
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=REACH_SECONDS))


def _names(told: Mapping[int, str]) -> list[str]:
    return [json.loads(text)[0] for text in told.values()]


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
