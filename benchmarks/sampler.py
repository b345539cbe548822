"""Microseconds per row of the sampler, with both log-probs, against torch.softmax + torch.multinomial, which gives neither.

One thread, bf16 logits (normal, deviation 3: an entropy of about 6 nats at 49,152); the arms take turns in one run. Wall time
and the thread's own processor time, each as a median: where they differ, something else was running.

    python benchmarks/sampler.py [--repeats 50]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.doctor.cpu import processor
from erollout.engine.sampling.sampler import Sampler, SamplingRow
from erollout.kernels import native
from erollout.types import SamplingParams

VOCABULARIES = (49_152, 151_936)
ROWS = (1, 4, 16)
SETTINGS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "temperature 0.7": SamplingParams(temperature=0.7),
    "top_p 0.95": SamplingParams(top_p=0.95),
    "top_k 50, top_p 0.95": SamplingParams(top_k=50, top_p=0.95),
}


@dataclass(frozen=True, slots=True)
class Seconds:
    wall: float
    processor: float


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{processor()[1]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; 1 thread")
    print(f"native kernels: {native.why_unavailable() or 'available'}; microseconds per row, median wall (median processor)")
    names = ["torch", *(["native", "native draft"] if native.why_unavailable() is None else []), "softmax + multinomial"]
    print(f"{'vocabulary':>10} {'setting':22}{'rows':>5}" + "".join(f"{name:>24}" for name in names))
    for vocabulary in VOCABULARIES:
        for name, params in SETTINGS.items():
            for rows in ROWS:
                times = measure(arms(names, params, logits_of(rows, vocabulary)), repeats)
                cells = (f"{times[n].wall / rows * 1e6:.0f} ({times[n].processor / rows * 1e6:.0f})" for n in names)
                print(f"{vocabulary:10} {name:22}{rows:5}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def logits_of(rows: int, vocabulary: int) -> Tensor:
    noise = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows))
    return (3.0 * noise).bfloat16()


def arms(names: list[str], params: SamplingParams, logits: Tensor) -> dict[str, Callable[[], object]]:
    """The peer is given the temperature but no filter: torch has none."""
    rows = [SamplingRow(params, seed=i, position=7) for i in range(len(logits))]
    plain = Sampler(logits.shape[1])
    divisor = params.temperature or 1.0
    made: dict[str, Callable[[], object]] = {
        "torch": lambda: plain.sample(logits, rows),
        "softmax + multinomial": lambda: torch.multinomial((logits.float() / divisor).softmax(-1), 1).tolist(),
    }
    if "native" in names:
        sampler = Sampler(logits.shape[1], kernel="native")
        prepared = sampler.prepare(rows, logits.device)
        made["native"] = lambda: sampler.sample(logits, rows)
        made["native draft"] = lambda: sampler.draw_ids_on_device(logits, prepared)
    return {name: made[name] for name in names}


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


if __name__ == "__main__":
    main()
