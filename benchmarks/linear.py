"""Milliseconds of one decode step's linear layers: oneDNN (prepacked bf16) against the native kernels.

The chain is SmolLM2-135M's: 30 layers of 4 matrices, each with weights of its own, and the LM head; random weights. The arms
take turns in one run, so that each finds the caches as another's weights left them; medians. GB/s counts an arm's weights once.

    python benchmarks/linear.py [--repeats 15] [--rows 1 2 4 8 16 32] [--threads 1]
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
from erollout.kernels.native import GROUP_SIZES, NativeFormat, NativeLinear
from erollout.kernels.weights import QuantizedWeight

LAYERS = 30
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Out and in features: QKV, attention output, gate and up, down."""
HEAD = (49_152, 576)


@dataclass(frozen=True, slots=True)
class Arm:
    """The linears of one kernel in the order of a step, the head last."""

    linears: list[Callable[[Tensor], Tensor]]
    weight_bytes: list[int]
    pack_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=64, choices=GROUP_SIZES)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{processor()[1]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}",
        end="; ",
    )
    print(f"threads {options.threads}; int4 in groups of {options.group_size}")
    shapes = [*(SHAPES * options.layers), HEAD]
    arms = {"oneDNN": onednn_arm(shapes)}
    for format in ("bf16", "int4", "int4_a8", "int8"):
        arms[format] = native_arm(shapes, format, options.group_size, options.threads)
    print("repack, ms: " + ", ".join(f"{name} {arm.pack_seconds * 1e3:.0f}" for name, arm in arms.items()))
    print("ms of all layers (GB/s) | of the head (GB/s)")
    print(f"{'rows':>5}" + "".join(f"{name:>30}" for name in arms))
    for rows in options.rows:
        times = measure(list(arms.values()), rows, options.repeats)
        print(
            f"{rows:5}" + "".join(f"{cell(arm, *time):>30}" for arm, time in zip(arms.values(), times, strict=True)), flush=True
        )


def cell(arm: Arm, layers: float, head: float) -> str:
    rates = sum(arm.weight_bytes[:-1]) / layers / 1e9, arm.weight_bytes[-1] / head / 1e9
    return f"{layers * 1e3:.2f} ({rates[0]:.1f}) | {head * 1e3:.2f} ({rates[1]:.1f})"


def onednn_arm(shapes: list[tuple[int, int]]) -> Arm:
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    start = time.perf_counter()
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    seconds = time.perf_counter() - start

    def bind(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return Arm([bind(weight) for weight in packed], [weight.numel() * 2 for weight in weights], seconds)


def native_arm(shapes: list[tuple[int, int]], format: NativeFormat, group_size: int, num_threads: int) -> Arm:
    group = group_size if format.startswith("int4") else 0
    linears = [NativeLinear(*shape, format, group, num_threads=num_threads) for shape in shapes]
    weights = [random_weight(shape, format, group_size) for shape in shapes]
    seconds = 0.0
    for _ in range(2):  # the second pack is in place, as at every update of the policy
        start = time.perf_counter()
        for linear, weight in zip(linears, weights, strict=True):
            linear.pack_(weight)
        seconds = time.perf_counter() - start
    return Arm(list(linears), [linear.packed_bytes for linear in linears], seconds)


def random_weight(shape: tuple[int, int], format: NativeFormat, group_size: int) -> Tensor | QuantizedWeight:
    rows, inputs = shape
    if format == "bf16":
        return torch.randn(shape).bfloat16()
    if format == "int8":
        return QuantizedWeight("int8", torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(rows, 1) / 100, inputs)
    scales = (torch.rand(rows, inputs // group_size) / 100).bfloat16()
    return QuantizedWeight("int4", torch.randint(-8, 8, shape, dtype=torch.int8), scales, group_size)


def measure(arms: list[Arm], rows: int, repeats: int) -> list[tuple[float, float]]:
    """Median seconds of the layers and of the head, for each arm."""
    inputs = {width: torch.randn(rows, width).bfloat16() for width in {inputs for _, inputs in (*SHAPES, HEAD)}}
    layer_inputs = [inputs[width] for _, width in SHAPES]
    samples: list[list[tuple[float, float]]] = [[] for _ in arms]
    for repeat in range(repeats + 2):
        for index in range(len(arms)):
            arm_index = (index + repeat) % len(arms)
            linears = arms[arm_index].linears
            start = time.perf_counter()
            for i, linear in enumerate(linears[:-1]):
                linear(layer_inputs[i % len(SHAPES)])
            middle = time.perf_counter()
            linears[-1](inputs[HEAD[1]])
            samples[arm_index].append((middle - start, time.perf_counter() - middle))
    return [(statistics.median(s[0] for s in arm[2:]), statistics.median(s[1] for s in arm[2:])) for arm in samples]


if __name__ == "__main__":
    main()
