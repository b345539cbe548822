"""Microseconds per row of the sampler, with both log-probs, against torch.softmax + torch.multinomial, which gives neither.

One thread, a vocabulary of 49,152, bf16 logits; the arms take turns in one run. Wall time and the thread's own processor
time, each as a median: where they differ, something else was running.

    python benchmarks/sampler.py [--repeats 50]
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from erollout.engine.logits import shard_logits
from erollout.engine.random import gumbel, stream_keys
from erollout.engine.sampler import Sampler, SamplingRow, draw
from erollout.types import SamplingParams

VOCABULARY = 49_152
ROWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Seconds:
    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; 1 thread")
    print("microseconds per row, median wall (median processor)")
    names = list(arms(logits_of("flat", 1)))
    print(f"{'logits':8}{'rows':>5}" + "".join(f"{name:>24}" for name in names))
    for kind in ("flat", "typical", "peaked"):
        for rows in ROWS:
            times = measure(arms(logits_of(kind, rows)), repeats)
            cells = (f"{t.wall / rows * 1e6:.0f} ({t.processor / rows * 1e6:.0f})" for t in times.values())
            print(f"{kind:8}{rows:5}" + "".join(f"{cell:>24}" for cell in cells))


def logits_of(kind: str, rows: int) -> Tensor:
    """bf16 [rows, VOCABULARY]: almost uniform, normal with deviation 3 (an entropy of about 6 nats), or one token at 0.99."""
    noise = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows))
    logits = noise * {"flat": 0.01, "typical": 3.0, "peaked": 1.0}[kind]
    if kind == "peaked":
        logits[:, 777] = 16.0
    return logits.bfloat16()


def arms(logits: Tensor) -> dict[str, Callable[[], object]]:
    rows = [SamplingRow(SamplingParams(), seed=i, position=7) for i in range(len(logits))]
    filtered = [SamplingRow(SamplingParams(temperature=0.8, top_p=0.95), seed=i, position=7) for i in range(len(logits))]
    sampler = Sampler(VOCABULARY)
    shard = shard_logits(logits, VOCABULARY)
    keys = stream_keys(torch.arange(len(logits)), torch.full((len(logits),), 7)).unsqueeze(-1)
    ids = torch.arange(VOCABULARY)
    return {
        "sample": lambda: sampler.sample(logits, rows),
        "of which draw": lambda: draw(shard, rows),
        "T=0.8 top_p=0.95": lambda: sampler.sample(logits, filtered),
        "noise for all, argmax": lambda: (logits + gumbel(keys, ids)).argmax(-1).tolist(),
        "softmax + multinomial": lambda: torch.multinomial(logits.float().softmax(-1), 1).tolist(),
    }


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, Seconds]:
    wall: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            start, start_processor = time.perf_counter(), time.thread_time()
            function()
            processor[name].append(time.thread_time() - start_processor)
            wall[name].append(time.perf_counter() - start)
    median = statistics.median
    return {name: Seconds(median(wall[name][2:]), median(processor[name][2:])) for name in functions}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
