"""The CUDA linears against fp32 references: on a GPU where there is one, else their Triton kernels in Triton's interpreter.

Triton decides for the interpreter when it is imported, so that this file then runs itself again, in a process of its own.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from erollout.kernels.cuda import (
    CudaFp8Linear,
    CudaInt4Linear,
    CudaInt8Linear,
    _why_incapable,
    why_unavailable,
)
from erollout.kernels.weights import QuantizedWeight

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

kernels = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="no GPU here: test_in_the_interpreter runs it")
gpu = pytest.mark.skipif(not HAS_GPU or INTERPRETED, reason="needs a CUDA device")
fp8 = pytest.mark.skipif(
    not INTERPRETED and HAS_GPU and torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no FP8"
)


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="the kernels run as themselves")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 30, run.stdout[-2000:]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int, depth: int, seed: int = 1) -> Tensor:
    return random(rows, depth, seed=seed).bfloat16().to(DEVICE)


def int4_weight(columns: int, depth: int, group: int, asymmetric: bool = False, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        format="int4",
        values=torch.randint(-8, 8, (columns, depth), generator=generator, dtype=torch.int8).to(DEVICE),
        scales=(torch.rand(columns, depth // group, generator=generator) * 0.1 + 0.01).bfloat16().to(DEVICE),
        group_size=group,
        zero_points=torch.randint(-8, 8, (columns, depth // group), generator=generator, dtype=torch.int8).to(DEVICE)
        if asymmetric
        else None,
    )


def row_scaled_weight(format: str, columns: int, depth: int, scales: int, seed: int = 0) -> QuantizedWeight:
    """An int8 or fp8 weight with `scales` scales: one per row, or one."""
    weight = random(columns, depth, seed=seed)
    values = (
        weight.mul(40).round().clamp(-127, 127).to(torch.int8) if format == "int8" else (weight * 100).to(torch.float8_e4m3fn)
    )
    return QuantizedWeight(
        format=format,  # type: ignore[arg-type]
        values=values.to(DEVICE),
        scales=(random(scales, 1, seed=seed + 1).abs() * 0.02 + 0.01).to(DEVICE),
        group_size=depth,
    )


def dequantized(weight: QuantizedWeight) -> Tensor:
    """float64 [N, K]: the weight that the kernels compute with, to the last bit."""
    values = weight.values.double()
    if weight.zero_points is not None:
        values = values - weight.zero_points.double().repeat_interleave(weight.group_size, 1)
    scales = weight.scales.double()
    return values * (scales.repeat_interleave(weight.group_size, 1) if weight.format == "int4" else scales)


def quantized_rows(x: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """float64: x as a token-wise quantisation leaves it."""
    scales = x.float().abs().amax(1, keepdim=True) / largest
    values = x.float() / scales
    return (values.round() if dtype is torch.int8 else values.to(dtype)).double() * scales.double()


def assert_rounded(y: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """y is the bfloat16 of `exact` but for fp32 sums: half a unit of y's last place plus 2^-18 of the sum of magnitudes."""
    assert y.dtype is torch.bfloat16 and y.shape == exact.shape
    error, allowed = (y.double() - exact).abs(), exact.abs() * 2.0**-8 + magnitude * 2.0**-18
    assert bool((error <= allowed).all()), f"largest error over allowed: {(error / allowed).max():.2f}"


# Columns that do and don't fill tiles; depths with one part and several, the last of them shorter.
INT4_TABLE = [
    (70, 576, 32, True),
    (24, 576, 64, True),
    (24, 1536, 32, False),
    (24, 1536, 128, False),
    (24, 4096, 128, True),
]


@kernels
@pytest.mark.parametrize(("columns", "depth", "group", "asymmetric"), INT4_TABLE)
def test_int4_matches_the_exact_product_for_any_number_of_rows(columns: int, depth: int, group: int, asymmetric: bool) -> None:
    weight = int4_weight(columns, depth, group, asymmetric)
    bias = random(columns).bfloat16().to(DEVICE)
    layer = CudaInt4Linear(columns, depth, group, asymmetric, bias=bias, device=DEVICE)
    layer.pack_(weight)
    x, w = activations(33, depth), dequantized(weight)
    y = layer(x)
    assert_rounded(y, x.double() @ w.t() + bias.double(), x.double().abs() @ w.t().abs())
    for rows in (slice(1), slice(3), slice(16), slice(20, 21)):
        assert torch.equal(layer(x[rows]), y[rows]), "neighbours or its place change a row's bits"


@kernels
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_values_zeros_and_scales_are_packed_to_the_bit(asymmetric: bool) -> None:
    weight = int4_weight(70, 64, 32, asymmetric)
    layer = CudaInt4Linear(70, 64, 32, asymmetric, device=DEVICE)
    layer.pack_(weight)
    one_hot = torch.eye(64, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(layer(one_hot), dequantized(weight).t().bfloat16())


@kernels
@pytest.mark.parametrize("columns,depth", [(70, 576), (24, 4096), (40, 200)])
def test_int8_matches_its_reference_for_any_number_of_rows(columns: int, depth: int) -> None:
    weight = row_scaled_weight("int8", columns, depth, columns)
    bias = random(columns).bfloat16().to(DEVICE)
    layer = CudaInt8Linear(columns, depth, bias=bias, device=DEVICE)
    layer.pack_(weight)
    x, w = activations(33, depth), dequantized(weight)
    y, quantized = layer(x), quantized_rows(x, 127.0, torch.int8)
    assert_rounded(y, quantized @ w.t() + bias.double(), quantized.abs() @ w.t().abs())
    for rows in (1, 3, 16):
        assert torch.equal(layer(x[:rows]), y[:rows])


@kernels
@fp8
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("columns,depth,rows", [(24, 576, 1), (20, 40, 17)])
def test_fp8_matches_its_reference(columns: int, depth: int, rows: int, per_channel: bool) -> None:
    weight = row_scaled_weight("fp8", columns, depth, columns if per_channel else 1)
    bias = random(columns).bfloat16().to(DEVICE)
    layer = CudaFp8Linear(columns, depth, per_channel, bias=bias, device=DEVICE)
    layer.pack_(weight)
    x, w = activations(rows, depth), dequantized(weight)
    quantized = quantized_rows(x, 448.0, torch.float8_e4m3fn)
    exact, magnitude = quantized @ w.t(), quantized.abs() @ w.t().abs()
    # FP8 tensor cores sum with fewer bits than fp32; per channel, the product is rounded before the bias is added
    assert_rounded(
        layer(x), exact + bias.double(), magnitude * (1 if INTERPRETED else 64) + exact.abs() * 2.0**10 * per_channel
    )


@kernels
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_quantized_as_by_torch_and_padded_with_zeros(dtype: torch.dtype) -> None:
    from erollout.kernels.triton_rows import LARGEST, quantize_rows

    x = activations(5, 1100)
    x[2] = 0
    values, scales = quantize_rows(x, dtype, multiple=16)
    assert values.shape == (16, 1104) and values.dtype is dtype and scales.shape == (16,)
    expected = x.float().abs().amax(1) / LARGEST[dtype]
    torch.testing.assert_close(scales[:5], torch.where(expected == 0, 1.0, expected), rtol=3e-7, atol=0)
    quotients = x.float() / scales[:5, None]
    differ = values[:5, :1100].float() != (quotients.round() if dtype is torch.int8 else quotients.to(dtype).float())
    assert differ.float().mean() <= (0 if INTERPRETED else 0.001), "a GPU's division is an ulp off: few ties may fall otherwise"
    assert not values[5:].float().any() and not values[:, 1100:].float().any()


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_shows_it_and_leaves_its_neighbours(bad: float) -> None:
    layers = [
        (CudaInt4Linear(24, 64, 32, device=DEVICE), int4_weight(24, 64, 32)),
        (CudaInt8Linear(24, 64, device=DEVICE), row_scaled_weight("int8", 24, 64, 24)),
    ]
    x = activations(3, 64)
    broken = x.clone()
    broken[1, 7] = bad
    for layer, weight in layers:
        weight.values[:, 7] = 3
        layer.pack_(weight)
        y, clean = layer(broken), layer(x)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])


@kernels
def test_packing_again_keeps_addresses_and_takes_the_new_numbers() -> None:
    pairs = [
        (CudaInt4Linear(24, 64, 32, True, device=DEVICE), [int4_weight(24, 64, 32, True, seed=s) for s in (0, 7)]),
        (CudaInt8Linear(24, 64, device=DEVICE), [row_scaled_weight("int8", 24, 64, 24, seed=s) for s in (0, 7)]),
    ]
    x = activations(4, 64)
    for layer, (first, second) in pairs:
        layer.pack_(first)
        before, old = addresses(layer), layer(x)
        layer.release()
        with pytest.raises(AssertionError, match="released"):
            layer(x)
        layer.pack_(second)
        assert addresses(layer) == before
        assert not torch.equal(layer(x), old)
        layer.pack_(first)
        assert torch.equal(layer(x), old)


def addresses(layer: object) -> dict[str, int]:
    """Addresses of all tensors that the layer, or its packed part, owns."""
    owners = [vars(layer), vars(getattr(layer, "_packed", object))]
    found = {
        f"{i}.{name}": v.data_ptr() for i, owner in enumerate(owners) for name, v in owner.items() if isinstance(v, Tensor)
    }
    assert len(found) >= 2
    return found


@kernels
def test_the_pre_scale_multiplies_activations_first() -> None:
    weight = int4_weight(24, 64, 32)
    scaled = QuantizedWeight("int4", weight.values, weight.scales, 32, pre_scale=activations(1, 64, seed=5)[0])
    plain, layer = CudaInt4Linear(24, 64, 32, device=DEVICE), CudaInt4Linear(24, 64, 32, has_pre_scale=True, device=DEVICE)
    plain.pack_(weight)
    layer.pack_(scaled)
    x = activations(3, 64)
    assert torch.equal(layer(x), plain(x * scaled.pre_scale))


@kernels
def test_activations_may_be_columns_of_a_wider_tensor_and_rows_may_be_none() -> None:
    x = activations(5, 200)[:, 8:136]
    for layer, weight in (
        (CudaInt4Linear(24, 128, 32, device=DEVICE), int4_weight(24, 128, 32)),
        (CudaInt8Linear(24, 128, device=DEVICE), row_scaled_weight("int8", 24, 128, 24)),
    ):
        layer.pack_(weight)
        assert torch.equal(layer(x), layer(x.contiguous()))
        assert layer(x[:0]).shape == (0, 24)


@kernels
@pytest.mark.parametrize(("depth", "group"), [(576, 128), (96, 64), (64, 16), (512, 256)])
def test_a_group_size_without_a_kernel_or_not_dividing_is_refused(depth: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"group size {group} with {depth} in_features"):
        CudaInt4Linear(24, depth, group, device=DEVICE)


@pytest.mark.parametrize(
    ("format", "capability", "message"),
    [
        ("fp8", (8, 0), "the fp8 CUDA kernels need compute capability 8.9, but A has 8.0"),
        ("int4", (7, 5), "the int4 CUDA kernels need compute capability 8.0, but A has 7.5"),
        ("fp8", (8, 9), None),
        ("fp8", (10, 0), None),
        ("int8", (8, 0), None),
    ],
)
def test_a_device_without_the_format_is_named(format: str, capability: tuple[int, int], message: str | None) -> None:
    assert _why_incapable(format, capability, "A") == message  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_a_cpu_is_no_cuda_device(format: str) -> None:
    assert why_unavailable(format, torch.device("cpu")) == (  # type: ignore[arg-type]
        f"the {format} CUDA kernels need a CUDA device, but the device is cpu"
    )


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_named() -> None:
    assert "torch finds none" in (why_unavailable("int4", torch.device("cuda")) or "")


@gpu
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_a_captured_graph_follows_a_new_packing_without_waiting_for_the_host(format: str) -> None:
    reason = why_unavailable(format, DEVICE)  # type: ignore[arg-type]
    if reason:
        pytest.skip(reason)
    layer = {"int4": lambda: CudaInt4Linear(256, 1024, 128), "int8": lambda: CudaInt8Linear(256, 1024)}.get(
        format, lambda: CudaFp8Linear(256, 1024)
    )()
    first, second = (
        int4_weight(256, 1024, 128, seed=s) if format == "int4" else row_scaled_weight(format, 256, 1024, 256, seed=s)
        for s in (0, 7)
    )
    x = activations(8, 1024)
    layer.pack_(first)
    layer(x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.pack_(first)
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for weight in (first, second):
        layer.pack_(weight)
        graph.replay()
        assert torch.equal(y, layer(x))
