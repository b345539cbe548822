"""Microseconds of the CUDA linears (INT4, INT8, FP8) against bf16's F.linear, on the layers of two models at 1 to 64 rows.

Every arm is first compared with its dequantised weight in float32. Arms replay a CUDA graph of several calls on several
copies of the weights, more than the L2 cache holds, as a decode step would read them; they take turns, medians are shown.

    python benchmarks/gpu_kernels.py [--models qwen2.5-7b llama-3.1-8b] [--rows 1 4 16 64] [--repeats 30]
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erollout.kernels.cuda import CudaFp8Linear, CudaInt4Linear, CudaInt8Linear, why_unavailable
from erollout.kernels.weights import QuantizedWeight, WeightFormat

SHAPES = {
    "qwen2.5-7b": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
"""(out_features, in_features) of a layer's linears, from the models' published configurations."""

ARMS: dict[str, tuple[WeightFormat, str]] = {
    "int4 g128": ("int4", "symmetric"),
    "int4 g128 asym": ("int4", "asymmetric"),
    "int8": ("int8", "per_channel"),
    "fp8 channel": ("fp8", "per_channel"),
    "fp8 tensor": ("fp8", "per_tensor"),
}
GROUP = 128
BYTES_COLD = 512 * 2**20
"""Copies of an arm's weights add up to at least this: several times the L2 cache of any GPU so far."""
MAX_ERROR = {"int4": 0.005, "int8": 0.02, "fp8": 0.05}
"""Largest relative deviation (Frobenius) from the dequantised weight: roundings of the output and the activations."""


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    run: Callable[[Tensor], Tensor]
    """One call of the linear; calls rotate through the copies of its weights."""
    copies: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu_kernels.py measures CUDA kernels and torch finds no CUDA device here: nothing is measured")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds a call (times bf16)")
    for model in arguments.models:
        for layer, (columns, depth) in SHAPES[model].items():
            print(f"\n{model} {layer}: {columns} x {depth}")
            report(columns, depth, arguments.rows, arguments.repeats)
    return 0


@torch.inference_mode()
def report(columns: int, depth: int, rows: list[int], repeats: int) -> None:
    arms = [bf16_arm(columns, depth)]
    for name, (format, kind) in ARMS.items():
        reason = why_unavailable(format, torch.device("cuda"))
        if reason:
            print(f"{name}: left out: {reason}")
        else:
            arms.append(quantized_arm(name, format, kind, columns, depth))
    print(f"{'rows':>4}" + "".join(f"{arm.name:>22}" for arm in arms))
    for count in rows:
        micros = measure(arms, torch.randn(count, depth, device="cuda").bfloat16(), repeats)
        print(f"{count:4}" + "".join(f"{t:>13.1f} ({micros[0] / t:5.2f}x)" for t in micros))


def bf16_arm(columns: int, depth: int) -> Arm:
    copies = copies_for(columns * depth * 2)
    weights = [torch.randn(columns, depth, device="cuda").bfloat16() for _ in range(copies)]
    turn = itertools.cycle(weights)
    return Arm("bf16", lambda x: F.linear(x, next(turn)), copies)


def quantized_arm(name: str, format: WeightFormat, kind: str, columns: int, depth: int) -> Arm:
    """Raises SystemExit where the linear does not agree with its dequantised weight."""
    weight, dequantized = random_weight(format, kind, columns, depth)
    copies = copies_for(columns * depth // (2 if format == "int4" else 1))
    linears = [build(format, kind, columns, depth) for _ in range(copies)]
    for linear in linears:
        linear.pack_(weight)
    x = torch.randn(33, depth, device="cuda").bfloat16()
    expected = x.float() @ dequantized.t()
    error = ((linears[-1](x).float() - expected).norm() / expected.norm()).item()
    if not error <= MAX_ERROR[format]:
        raise SystemExit(f"{name} at {columns} x {depth} deviates by {error:.4f} from its reference: nothing is measured")
    turn = itertools.cycle(linears)
    return Arm(name, lambda x: next(turn)(x), copies)


def build(format: WeightFormat, kind: str, columns: int, depth: int) -> CudaInt4Linear | CudaInt8Linear | CudaFp8Linear:
    if format == "int4":
        return CudaInt4Linear(columns, depth, GROUP, asymmetric=kind == "asymmetric")
    if format == "int8":
        return CudaInt8Linear(columns, depth)
    return CudaFp8Linear(columns, depth, per_channel=kind == "per_channel")


def random_weight(format: WeightFormat, kind: str, columns: int, depth: int) -> tuple[QuantizedWeight, Tensor]:
    """A weight of random numbers and the same dequantised, float32."""
    if format == "int4":
        groups = (columns, depth // GROUP)
        values = torch.randint(-8, 8, (columns, depth), device="cuda", dtype=torch.int8)
        scales = (torch.rand(groups, device="cuda") * 0.01 + 0.001).bfloat16()
        zeros = torch.randint(-2, 3, groups, device="cuda", dtype=torch.int8) if kind == "asymmetric" else None
        offsets = 0 if zeros is None else zeros.float().repeat_interleave(GROUP, 1)
        weight = QuantizedWeight("int4", values, scales, GROUP, zeros)
        return weight, (values.float() - offsets) * scales.float().repeat_interleave(GROUP, 1)
    scales = torch.rand(1 if kind == "per_tensor" else columns, 1, device="cuda") * 0.001 + 0.0001
    normal = torch.randn(columns, depth, device="cuda")
    values = (
        normal.mul(30).round().clamp(-127, 127).to(torch.int8) if format == "int8" else (normal * 64).to(torch.float8_e4m3fn)
    )
    return QuantizedWeight(format, values, scales, depth), values.float() * scales


def copies_for(size: int) -> int:
    return max(2, -(-BYTES_COLD // size))


def measure(arms: list[Arm], x: Tensor, repeats: int) -> list[float]:
    """Median microseconds of one call of each arm."""
    graphs = [capture(arm, x) for arm in arms]
    times: list[list[float]] = [[] for _ in arms]
    for _ in range(repeats + 2):
        for arm, graph, found in zip(arms, graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e3 / arm.copies)
    return [statistics.median(found[2:]) for found in times]


def capture(arm: Arm, x: Tensor) -> torch.cuda.CUDAGraph:
    """A graph of one call on each copy."""
    arm.run(x)  # compiles, outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(arm.copies):
            arm.run(x)
    return graph


if __name__ == "__main__":
    sys.exit(main())
