"""Decode replicas under the coordinator: real processes, real engines; every sample once, as one engine alone gives it."""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import RankFailure, RankPool
from test_engine import by_sample
from tiny_decode import make_engine, prompts
from tiny_speculation import DRAFTER, make_speculative_engine

from erollout.config import CoordinatorConfig
from erollout.configuration.speculation import SpeculationConfig
from erollout.coordinator.exchange import Exchange
from erollout.coordinator.occupancy import Occupancy
from erollout.coordinator.state_machine import ClusterDecision, StateMachine
from erollout.engine.orders import Control, Orders
from erollout.rollout.control import AgreedControl, ReplicaControl
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle
from erollout.types import PartialRollout, RolloutRequest, SamplingParams

GROUP_SIZE = 2
SLOTS = 4
PATIENCE = 30.0
DRAFT = Arm(DRAFTER, 2)


@dataclass
class Costs:
    """A cost model in which each sequence costs as much as a step with one, and drafting pays for up to two."""

    def step_seconds(self, arm: Arm, load: Load, proposed: float = 1.0) -> float:
        sequences = 0.2 * max(0, load.decoding - 2) if arm.speculates else 0.01 * load.decoding
        return 0.01 + sequences + 1e-4 * load.prefill_tokens

    def observe(self, arm: Arm, load: Load, seconds: float, drafting: float = 0.0, proposed: float = 1.0) -> None:
        pass

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


class RecordingMachine(StateMachine):
    """Keeps what it decided."""

    decisions: list[ClusterDecision]

    def start(self) -> ClusterDecision:
        self.decisions = [super().start()]
        return self.decisions[0]

    def advance(self, window: Sequence[Occupancy]) -> ClusterDecision:
        self.decisions.append(super().advance(window))
        return self.decisions[-1]


@dataclass(frozen=True)
class Event:
    """What happens to a rank."""

    rank: int
    kind: str
    """`slow`: waits before every step; `stop`: once, before the sixth; `kill`: when the first sequences arrive."""
    seconds: float = 0.0


@dataclass
class Recorder:
    """Passes everything on, keeps the orders, lets the events happen."""

    control: Control
    events: list[Event]
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    steps: int = 0

    def orders(self, load: Load) -> Orders:
        self._slow_or_stop()
        orders = self.control.orders(load)
        if orders.arrivals and any(event.kind == "kill" for event in self.events):
            os.kill(os.getpid(), signal.SIGKILL)
        taken = [request.prompt_index for request in orders.requests], [arrival.partial for arrival in orders.arrivals]
        self.calls.append((str(orders.arm), *taken, orders.release, orders.is_last))
        return orders

    def released(self, partials: list[PartialRollout]) -> None:
        self.control.released(partials)

    def observe(self, outcome: StepOutcome) -> None:
        self.steps += 1
        self.control.observe(outcome)

    def _slow_or_stop(self) -> None:
        for event in list(self.events):
            if event.kind == "slow":
                time.sleep(event.seconds)
            elif event.kind == "stop" and self.steps == 5:
                self.events.remove(event)
                # only once it stands still, or it would stay so
                script = f"until grep -q '^State:.T' /proc/{os.getpid()}/status; do sleep 0.02; done; sleep {event.seconds}"
                subprocess.Popen(["sh", "-c", f"{script}; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What a logger is told meanwhile."""
    messages: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def make_requests(lengths: Sequence[int]) -> list[RolloutRequest]:
    """One prompt for each response length."""
    ids = prompts(*(5 + 3 * (i % 4) for i in range(len(lengths))))
    return [
        RolloutRequest(100 + i, ids[i], GROUP_SIZE, SamplingParams(max_tokens=length, ignore_eos=True), seed=i)
        for i, length in enumerate(lengths)
    ]


def expected(lengths: Sequence[int]) -> dict[tuple[int, int], tuple[Any, ...]]:
    return by_sample(make_engine("llama").generate(make_requests(lengths)))


def replica(
    lengths: Sequence[int],
    coordinator: dict[str, Any],
    speculation: dict[str, Any],
    events: Sequence[Event] = (),
    tensor: int = 1,
    folder: str | None = None,
    patience: float = PATIENCE,
    drafter: str = "good",
) -> dict[str, Any]:
    """One rank's part of a rollout; what came of it, also as a file where a folder is named. See make_speculative_engine."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tensor_groups = [dist.new_group(list(range(first, first + tensor))) for first in range(0, world, tensor)]
    leaders = dist.new_group(list(range(0, world, tensor)))
    group = tensor_groups[rank // tensor] if tensor > 1 else None
    requests = make_requests(lengths)
    options, speculation_options = CoordinatorConfig(**coordinator), SpeculationConfig(**speculation)
    formats = () if speculation_options.mode == "off" else (DRAFTER,)
    toggle = Toggle(speculation_options, formats, Costs())
    signs = [time.monotonic()]

    def sign() -> None:
        signs.append(time.monotonic())

    leader, machine, exchange = None, None, None
    if rank % tensor == 0:
        max_tokens = max(lengths)
        machine = RecordingMachine(options, world // tensor, len(lengths), GROUP_SIZE, SLOTS, lengths, max_tokens)
        exchange = Exchange(leaders, machine, len(toggle.arms), max_tokens, options, patience) if world > tensor else None
        toggle.begin_rollout(True)
        leader = ReplicaControl(requests, SLOTS, toggle, exchange, options.lock_step, alive=sign)
    control = Recorder(
        AgreedControl(leader, group, toggle.arms, requests, speculation_options.decision_interval, sign),
        [event for event in events if event.rank == rank],
    )
    engine = make_speculative_engine(drafter, "coupled", 2, group, max_num_seqs=SLOTS)
    dist.barrier()
    with logged("erollout.rollout.control") as messages:
        rollouts = engine.run(control)
    result = {
        "samples": by_sample(rollouts),
        "steps": control.steps,
        "calls": control.calls,
        "report": leader.report() if leader is not None else {},
        "decisions": machine.decisions if machine is not None and exchange is not None else [],
        "messages": messages,
        "error": exchange.stream.error if exchange is not None else None,
        "signs": len(signs),
        "longest_silence": max(later - sooner for sooner, later in pairwise(signs)),
    }
    if folder is not None:
        summary = {"samples": sorted(result["samples"]), "error": result["error"], "report": result["report"]}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(summary))
    return result


def check(results: list[dict[str, Any]], lengths: Sequence[int], duplicates: bool = False) -> None:
    """All samples, as one engine gives them, and one history of decisions."""
    samples: dict[tuple[int, int], tuple[Any, ...]] = {}
    for result in results:
        samples |= result["samples"]
    assert samples == expected(lengths)
    if not duplicates:
        assert sum(len(result["samples"]) for result in results) == len(samples)
    decisions = [result["decisions"] for result in results if result["decisions"]]
    assert all(d == decisions[0] for d in decisions)


def tokens(results: list[dict[str, Any]]) -> dict[tuple[int, int], Any]:
    """Token ids by sample: with drafts, log-probabilities differ in their last bits."""
    return {place: sample[0] for result in results for place, sample in result["samples"].items()}


def calls_after_an_arrival(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A replica's orders from those on in which the first sequences came to it."""
    first = next((number for number, call in enumerate(result["calls"]) if call[2]), len(result["calls"]))
    return result["calls"][first:]  # type: ignore[no-any-return]


UNEVEN = [40, 4] * 8
"""In turns: replica 0 of two gets all long responses."""
QUICK: dict[str, Any] = {"window_seconds": 0.005, "stall_seconds": 25.0}
"""No replica seems to stall, unless a test means it to."""
OFF_MODE: dict[str, Any] = {"mode": "off"}
ADAPTIVE: dict[str, Any] = {"mode": "toggle", "num_speculative_tokens": 2}


def test_one_replica_takes_everything_and_asks_nobody() -> None:
    requests = make_requests(UNEVEN)
    toggle = Toggle(SpeculationConfig(), (), Costs())
    toggle.begin_rollout(True)
    control = ReplicaControl(requests, SLOTS, toggle, None)
    assert by_sample(make_engine("llama", max_num_seqs=SLOTS).run(control)) == expected(UNEVEN)
    assert control.report() == {}


@pytest.mark.distributed
@pytest.mark.quick(every=3)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("speculation", [OFF_MODE, ADAPTIVE], ids=["off", "toggle"])
def test_dynamic_dispatch_gives_every_prompt_once(rank_pool: RankPool, world_size: int, speculation: dict[str, Any]) -> None:
    check(rank_pool.run(world_size, replica, UNEVEN, {**QUICK, "policy": "replica"}, speculation), UNEVEN)


@pytest.mark.distributed
def test_dynamic_dispatch_takes_fewer_steps(rank_pool: RankPool) -> None:
    """In lock step: a replica that this machine lets stand still would leave its prompts to the other."""
    steps = {}
    for dispatch in ("static", "dynamic"):
        policy = {**QUICK, "policy": "cluster", "dispatch": dispatch, "lock_step": True}
        results = rank_pool.run(2, replica, UNEVEN, policy, OFF_MODE)
        check(results, UNEVEN)
        steps[dispatch] = [result["steps"] for result in results]
    assert max(steps["dynamic"]) < max(steps["static"])


@pytest.mark.distributed
@pytest.mark.parametrize(("speculation", "drafter"), [(OFF_MODE, "good"), (ADAPTIVE, "ngram")], ids=["off", "ngram"])
def test_a_tail_moves_to_an_idle_replica(speculation: dict[str, Any], drafter: str, rank_pool: RankPool) -> None:
    lengths = [150, 4, 150, 4]
    policy = {**QUICK, "policy": "makespan", "dispatch": "static"}
    arguments = (policy, speculation, [Event(0, "slow", 0.01)], 1, None, PATIENCE, drafter)
    results = rank_pool.run(2, replica, lengths, *arguments)
    if speculation is OFF_MODE:
        check(results, lengths)
    else:
        assert tokens(results) == {place: sample[0] for place, sample in expected(lengths).items()}
        assert any(str(DRAFT) in [call[0] for call in calls_after_an_arrival(result)] for result in results)
    assert results[0]["report"]["sequences_out"] == results[1]["report"]["sequences_in"] >= 2
    assert results[1]["report"]["sequences_out"] == results[0]["report"]["sequences_in"]
    assert any(index in (100, 102) for index, _ in results[1]["samples"])


@pytest.mark.distributed
def test_a_replica_that_steps_far_more_slowly_delays_no_one(rank_pool: RankPool) -> None:
    results = rank_pool.run(3, replica, [12] * 24, QUICK, OFF_MODE, [Event(2, "slow", 0.1)])
    check(results, [12] * 24)
    assert len(results[2]["samples"]) < len(results[0]["samples"])


@pytest.mark.distributed
def test_others_go_on_without_a_stopped_replica(rank_pool: RankPool) -> None:
    lengths = [20] * 40
    options = {**QUICK, "stall_seconds": 0.2}
    results = rank_pool.run(3, replica, lengths, options, OFF_MODE, [Event(2, "stop", 2.0)])
    check(results, lengths, duplicates=True)
    assert all(result["report"]["stalls"] >= 1 for result in results[:2])
    assert any(result["report"]["claims"] >= 1 for result in results[:2])
    assert all(result["calls"][-1][-1] for result in results)


@pytest.mark.distributed
def test_a_peer_that_is_always_slow_is_not_warned_about_at_each_stall(rank_pool: RankPool) -> None:
    results = rank_pool.run(2, replica, [8] * 16, {**QUICK, "stall_seconds": 0.02}, OFF_MODE, [Event(1, "slow", 0.2)])
    check(results, [8] * 16, duplicates=True)
    warnings = ["decides for itself" in message for message in results[0]["messages"]]
    assert warnings[0] and all(earlier != later for earlier, later in pairwise(warnings)), "again only after it was not slow"
    assert sum(warnings) < results[0]["report"]["stalls"]


@pytest.mark.distributed
def test_the_end_of_a_stall_is_told(rank_pool: RankPool) -> None:
    lengths = [60] * 24
    results = rank_pool.run(2, replica, lengths, {**QUICK, "stall_seconds": 0.2}, OFF_MODE, [Event(1, "stop", 3.0)])
    check(results, lengths, duplicates=True)
    kinds = ["decides for itself" in message for message in results[0]["messages"]]
    assert kinds[:2] == [True, False] and "follows the cluster again" in results[0]["messages"][1]


@pytest.mark.distributed
def test_who_waits_for_a_stopped_replica_gives_no_sign_of_life(rank_pool: RankPool) -> None:
    """Its watchdog counts, although its engine asks for orders again and again."""
    options = {**QUICK, "dispatch": "static", "policy": "replica", "stall_seconds": 0.2}
    results = rank_pool.run(4, replica, [4, 60] * 2, options, OFF_MODE, [Event(2, "stop", 5.0)], 2)
    assert results[0]["longest_silence"] > 3.0


@pytest.mark.distributed
def test_who_waits_for_replicas_that_go_on_gives_signs_of_life(rank_pool: RankPool) -> None:
    """In a replica that has finished, the leader shows life at each window, and the other rank at each of its messages."""
    options = {**QUICK, "dispatch": "static", "policy": "replica"}
    results = rank_pool.run(4, replica, [4, 60] * 2, options, OFF_MODE, [Event(2, "slow", 0.05)], 2)
    assert all(result["steps"] < 10 for result in results[:2])
    assert all(result["signs"] > result["steps"] + 2 for result in results[:2])


@pytest.mark.distributed
def test_others_end_without_a_killed_replica_and_lose_nothing_to_it(tmp_path: Path) -> None:
    lengths = [150, 150, 4] * 2
    options = {**QUICK, "policy": "makespan", "dispatch": "static"}
    events = [Event(0, "slow", 0.02), Event(1, "slow", 0.02), Event(2, "kill")]  # not so fast that nothing moves to rank 2
    pool = RankPool()
    with pytest.raises(RankFailure, match="rank 2 died"):
        pool.run(3, replica, lengths, options, OFF_MODE, events, 1, str(tmp_path), timeout=240)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(result["report"]["sequences_out"] for result in results) > 0
    for rank, result in enumerate(results):
        assert "onnection" in result["error"]
        assert result["report"]["stalls"] == 1
        home = {(100 + prompt, sample) for prompt in range(rank, len(lengths), 3) for sample in range(GROUP_SIZE)}
        assert home <= {tuple(sample) for other in results for sample in other["samples"]}


def failure(*args: Any) -> str:
    """What a rank's part of a rollout fails with."""
    with pytest.raises(RuntimeError) as caught:
        replica(*args)
    return str(caught.value)


@pytest.mark.distributed
def test_in_lock_step_a_stopped_replica_ends_the_rollout(rank_pool: RankPool) -> None:
    options = {"policy": "cluster", "lock_step": True, "dispatch": "static", "stall_seconds": 0.2}
    errors = rank_pool.run(2, failure, [20] * 4, options, OFF_MODE, [Event(1, "stop", 3.0)], 1, None, 0.5)
    assert errors[0] == "replicas in lock step lost each other: no answer from some replica within 0.5 s"
    assert errors[1].startswith("replicas in lock step lost each other")


@pytest.mark.distributed
def test_in_lock_step_a_slow_replica_is_waited_for(rank_pool: RankPool) -> None:
    options = {"policy": "cluster", "lock_step": True, "dispatch": "static", "stall_seconds": 0.2}
    results = rank_pool.run(2, replica, [20] * 4, options, OFF_MODE, [Event(1, "stop", 3.0)])
    check(results, [20] * 4)
    assert results[0]["report"]["stalls"] >= 1 and "replica 0 waits: window" in results[0]["messages"][0]


@pytest.mark.distributed
@pytest.mark.parametrize("interval", [1, 3])
def test_in_lock_step_all_change_arms_at_the_same_step(rank_pool: RankPool, interval: int) -> None:
    lengths = [30, 10, 10, 10, 10, 10]
    options = {"policy": "cluster", "lock_step": True, "dispatch": "static"}
    results = rank_pool.run(3, replica, lengths, options, {**ADAPTIVE, "decision_interval": interval})
    check(results, lengths)
    arms = [[call[0] for call in result["calls"]] for result in results]
    assert arms[0] == arms[1] == arms[2]
    assert arms[0][0] == str(OFF) and str(DRAFT) in arms[0]
    changes = [step for step in range(1, len(arms[0])) if arms[0][step] != arms[0][step - 1]]
    assert all(step % interval == 0 for step in changes)


@pytest.mark.distributed
@pytest.mark.parametrize(("interval", "drafter"), [(1, "good"), (3, "good"), (1, "ngram")])
def test_ranks_of_a_replica_agree_at_every_step(rank_pool: RankPool, interval: int, drafter: str) -> None:
    lengths = [60, 4, 4, 4, 12, 8, 40, 4]
    speculation = {**ADAPTIVE, "decision_interval": interval}
    results = rank_pool.run(4, replica, lengths, QUICK, speculation, (), 2, None, PATIENCE, drafter)
    for leader, member in ((0, 1), (2, 3)):
        assert results[leader]["calls"] == results[member]["calls"]
        assert results[leader]["samples"] == results[member]["samples"]
    assert tokens(results) == {place: sample[0] for place, sample in expected(lengths).items()}
    assert results[0]["decisions"] == results[2]["decisions"]
    assert {str(OFF), str(DRAFT)} <= {call[0] for result in results for call in result["calls"]}


def test_a_response_that_is_here_is_not_taken_in_again() -> None:
    """Two replicas that had lost each other may have begun the same one; a move then brings it to where it was made."""
    requests = [RolloutRequest(index, (1, 2), 2, SamplingParams(max_tokens=8), 0) for index in range(2)]
    control = ReplicaControl(requests, 4, Toggle(SpeculationConfig(), (), Costs()), None)
    assert len(control.orders(Load(0, 0.0)).requests) == 2
    control._arrive([PartialRollout(1, 0, (5,), (0.0,), (0.0,))])
    assert control.orders(Load(4, 2.0)).arrivals == ()
