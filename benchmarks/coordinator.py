"""What the coordination of decode replicas costs, how fast it answers, and what both would be with thousands of them.

    python benchmarks/coordinator.py                     # 8 replicas on this machine
    python benchmarks/coordinator.py --replicas 2 4 8

Real processes run the real control, toggle, state machine and exchange. Their decode steps are sleeps of 10 ms, so that more
replicas than cores can be looked at; sequences end at random and prompts are handed out dynamically throughout.

Cost: CPU seconds per step of the thread that steps (`orders`, less what the same control takes without an exchange), and of the
whole process with gloo's threads, against the same process without an exchange. Only the first delays a step where a core is
free for the threads. Both counters include the scheduler's work to wake the process, and cold caches after a sleep.

Latency: from the end of any step of any replica until the decision of the first window that shows it is in force there.

At 16,384 replicas: decoding and deciding are measured here, in one process. The exchange is a model, an all-to-all whose time
grows with the number of peers: seconds = alpha + beta * (replicas - 1) + bytes / bandwidth, alpha and beta fitted to this
machine's gloo over loopback (its processes share the cores, so beta is rather too large), and a network of 10 GB/s.
"""

import argparse
import multiprocessing as mp
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decode import machine

from erollout.config import CoordinatorConfig
from erollout.configuration.speculation import SpeculationConfig, ToggleConfig
from erollout.coordinator.exchange import Exchange, Stream
from erollout.coordinator.occupancy import CURVE_BATCHES, Occupancy
from erollout.coordinator.state_machine import ClusterDecision, StateMachine
from erollout.engine.orders import Orders
from erollout.environment import stay_on_loopback
from erollout.rollout.control import ReplicaControl
from erollout.speculation.cost.cost_model import CalibratedCost, PassTimes
from erollout.speculation.cost.roofline import ModelSize, PassCost, Roofline
from erollout.speculation.step import Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle
from erollout.types import RolloutRequest, SamplingParams

FORMAT = "w4a16_clip"
STEP_SECONDS = 0.010
SLOTS, GROUP_SIZE, MAX_TOKENS = 16, 8, 2048
MEAN_TOKENS = 400
MANY = 16384
NETWORK_BANDWIDTH = 10e9


def toggle() -> Toggle:
    """Over the roofline of a model of 0.5 GB on a device of 50 GB/s: 9 arms."""
    size = ModelSize(0.5e9, {FORMAT: 0.15e9}, 5e8, 1e5, 2e4)
    cost = PassCost(50e9, 1e11, per_sequence=2e-4)
    roofline = Roofline(size, cost, cost, {FORMAT: cost})
    options: Any = SpeculationConfig
    return Toggle(options(mode="adaptive", toggle=ToggleConfig()), (FORMAT,), CalibratedCost(PassTimes(roofline)))


@dataclass
class Sequences:
    """What an engine would hold: so many responses, which end at random."""

    generator: random.Random
    queued: int = 0

    def load(self, step: int) -> Load:
        running = min(self.queued, SLOTS)
        return Load(running, 300.0 + step % 100, waiting=self.queued - running)

    def take(self, orders: Orders) -> None:
        self.queued += sum(request.group_size for request in orders.requests) + len(orders.arrivals)

    def step(self, arm: Arm, step: int) -> StepOutcome:
        load = self.load(step)
        finished = sum(self.generator.random() < 1 / MEAN_TOKENS for _ in range(load.decoding))
        self.queued -= finished
        drafted = (load.decoding,) * arm.num_speculative_tokens
        accepted = tuple(int(0.9 ** (1 + i) * n) for i, n in enumerate(drafted))
        return StepOutcome(arm, load, STEP_SECONDS, 0.0, load.decoding + sum(accepted), drafted, accepted, finished)


@dataclass
class Costs:
    """CPU seconds of one process, per step."""

    thread: list[float] = field(default_factory=list)
    """Thread seconds of `orders` and `observe`, per step."""
    process: float = 0.0
    """Everything, gloo's threads too."""


class TimedExchange(Exchange):
    """Knows when each window was posted and decided."""

    def __init__(self, *args: Any) -> None:
        self.posted: list[float] = []
        self.decided: list[float] = []
        super().__init__(*args)

    def poll(self, occupancy: Callable[[], Occupancy], pause: float | None = None) -> Any:
        def posted() -> Occupancy:
            self.posted.append(time.monotonic())
            return occupancy()

        news = super().poll(posted, pause)
        if news.decision is not None:
            self.decided.append(time.monotonic())
        return news


def drive(control: ReplicaControl, steps: int, seed: int) -> tuple[Costs, list[float]]:
    """So many steps of a replica; its costs and the ends of its steps."""
    sequences, costs, ends = Sequences(random.Random(seed)), Costs(), []
    for step in range(steps + 100):
        if step == 100:  # warm
            costs, began = Costs(), time.process_time()
        before = time.thread_time()
        orders = control.orders(sequences.load(step))
        spent = time.thread_time() - before
        sequences.take(orders)
        time.sleep(STEP_SECONDS)
        outcome = sequences.step(orders.arm, step)
        ends.append(time.monotonic())
        before = time.thread_time()
        control.observe(outcome)
        costs.thread.append(spent + time.thread_time() - before)
    costs.process = (time.process_time() - began) / steps
    return costs, ends[100:]


def requests(count: int) -> list[RolloutRequest]:
    return [RolloutRequest(i, (1,) * 64, GROUP_SIZE, SamplingParams(max_tokens=MAX_TOKENS), i) for i in range(count)]


def coordinate(options: CoordinatorConfig, steps: int) -> dict[str, Any]:
    """One rank: the loop without and with an exchange, in turns."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)), timeout=timedelta(days=1), backend="gloo")
    prompts = requests(size * (8 + steps // 20))
    alone = toggle()
    alone.begin_rollout(True)
    without, _ = drive(ReplicaControl(prompts[:: size * 2], SLOTS, alone, None), steps, rank)
    ours = toggle()
    ours.begin_rollout(True)
    machine = StateMachine(options, size, len(prompts), GROUP_SIZE, SLOTS, [MEAN_TOKENS] * 64, MAX_TOKENS)
    exchange = TimedExchange(group, machine, len(ours.arms), MAX_TOKENS, options, 600.0)
    dist.barrier()
    costs, ends = drive(ReplicaControl(prompts, SLOTS, ours, exchange), steps, rank)
    return {
        "thread": statistics.mean(costs.thread) - statistics.mean(without.thread),
        "median": statistics.median(costs.thread) - statistics.median(without.thread),
        "process": costs.process - without.process,
        "windows": exchange.windows,
        "latencies": latencies(exchange.posted, exchange.decided, ends),
        "interval": statistics.median(b - a for a, b in pairwise(exchange.decided)),
    }


def latencies(posted: Sequence[float], decided: Sequence[float], ends: Sequence[float]) -> list[float]:
    """From the end of each step until the decision of the first window posted after it."""
    found, window = [], 0
    for end in ends:
        while window < len(decided) and posted[window] < end:
            window += 1
        if window < len(decided):
            found.append(decided[window] - end)
    return found


def exchange_times(count: int) -> list[float]:
    """Seconds of bare all-to-alls of one occupancy each, back to back."""
    stream = Stream(dist.distributed_c10d._get_default_group(), 60.0, 600.0)
    vector = Occupancy(seconds_per_token=(0.0,) * 9, curve=(0.0,) * len(CURVE_BATCHES)).to_vector()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        stream.gather(vector)
        while stream.poll() is None:
            time.sleep(5e-5)
        times.append(time.perf_counter() - started)
    return times


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function on every rank of a new gloo world, each a process."""
    context = mp.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=_rank, args=(store, rank, size, answers, function, args)) for rank in range(size)]
        for process in processes:
            process.start()
        found = dict(answers.get(timeout=600) for _ in processes)
        for process in processes:
            process.join(60)
    return [found[rank] for rank in range(size)]


def _rank(store: str, rank: int, size: int, answers: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    stay_on_loopback()
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    answer = function(*args)
    dist.barrier()
    answers.put((rank, answer))
    dist.destroy_process_group()


def report_cost(sizes: Sequence[int], steps: int, options: CoordinatorConfig) -> None:
    print(f"\nCost per decode step of {STEP_SECONDS * 1e3:.0f} ms (mean of the replicas), latency of decisions")
    print("| replicas | median step, us | mean, us | share | all threads, us | share | window, ms | p50, ms | p99, ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in sizes:
        results = in_ranks(size, coordinate, options, steps)
        names = ("median", "thread", "process", "interval")
        median, thread, process, interval = (statistics.mean(result[name] for result in results) for name in names)
        waits = sorted(wait for result in results for wait in result["latencies"])
        p50, p99 = waits[len(waits) // 2], waits[int(0.99 * len(waits))]
        costs = f"{median * 1e6:.1f} | {thread * 1e6:.1f} | {thread / STEP_SECONDS:.3%}"
        everything = f"{process * 1e6:.1f} | {process / STEP_SECONDS:.3%}"
        print(f"| {size} | {costs} | {everything} | {interval * 1e3:.0f} | {p50 * 1e3:.0f} | {p99 * 1e3:.0f} |", flush=True)


def report_many(sizes: Sequence[int]) -> None:
    """One window of MANY replicas: measured on this process, the exchange by its model."""
    medians = [(size, statistics.median(t for times in in_ranks(size, exchange_times, 200) for t in times)) for size in sizes]
    beta, alpha = statistics.linear_regression([size - 1 for size, _ in medians], [seconds for _, seconds in medians])
    print("\nBare exchanges, median ms: " + ", ".join(f"{size} replicas {seconds * 1e3:.2f}" for size, seconds in medians))
    vector = example(0, 0).to_vector()
    received = 8 * MANY * (len(vector) + 1)
    exchanging = max(alpha, 0.0) + beta * (MANY - 1) + received / NETWORK_BANDWIDTH
    print(
        f"Model at {MANY} replicas: alpha {alpha * 1e3:.2f} ms, beta {beta * 1e6:.0f} us per peer, "
        f"{received / 1e6:.1f} MB a window: {exchanging:.2f} s"
    )
    for policy in ("replica", "cluster", "makespan"):
        decoding, deciding = decide_many(policy)
        print(f"Policy {policy}: occupancies out of the vectors {decoding * 1e3:.0f} ms, decision {deciding * 1e3:.0f} ms")


def decide_many(policy: str) -> tuple[float, float]:
    """Median CPU seconds to decode and to decide about windows of MANY replicas."""
    options: Any = CoordinatorConfig
    machine = StateMachine(options(policy=policy), MANY, 4 * MANY, GROUP_SIZE, SLOTS, [MEAN_TOKENS] * 64, MAX_TOKENS)
    machine.start()
    decoding, deciding = [], []
    for window in range(5):
        rows = torch.tensor([example(replica, window).to_vector() for replica in range(MANY)], dtype=torch.float64)
        started = time.thread_time()
        occupancies = [Occupancy.from_vector(row, 9) for row in rows.tolist()]
        decoded = time.thread_time()
        decision: ClusterDecision = machine.advance(occupancies)
        assert not decision.finished
        decoding.append(decoded - started)
        deciding.append(time.thread_time() - decoded)
    return statistics.median(decoding), statistics.median(deciding)


def example(replica: int, window: int) -> Occupancy:
    """Occupancy of a replica whose slots are nearly full, with a few responses completed since the last window."""
    running = SLOTS - (replica * 7 + window) % 5
    curve = tuple(0.012 + 0.001 * batch for batch in CURVE_BATCHES)
    arms = tuple(0.02 + 0.001 * ((replica + arm) % 3) for arm in range(9))
    finished = 3 * window + replica % 2
    return Occupancy(
        100 * window, 0, running, 2, 600.0, 250.0, finished, seconds=1.0 * window, seconds_per_token=arms, curve=curve
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--window-seconds", type=float, default=0.05)
    arguments = parser.parse_args()
    options: Any = CoordinatorConfig
    torch.set_num_threads(1)
    for line in machine():
        print(line)
    report_cost(arguments.replicas, arguments.steps, options(window_seconds=arguments.window_seconds))
    report_many(arguments.replicas)


if __name__ == "__main__":
    main()
