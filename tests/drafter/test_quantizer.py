"""The drafter's numbers are ModelOpt's: against its quantizers, in the hard cases, and from the native path bit for bit."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erollout.drafter.activation_statistics import InputStatistics
from erollout.drafter.formats import FORMATS, Format
from erollout.drafter.int4_range import TINIEST
from erollout.drafter.quantizer import ModelOptQuantizer, NativeQuantizer, Quantizer
from erollout.errors import UserError
from erollout.kernels import native as native_kernels
from erollout.kernels.native import why_unavailable
from erollout.kernels.weights import QuantizedWeight, dequantize

GROUP = 32
LAYER = "layers.0.o_proj"
SHAPE = (24, 160)


def hard_weights(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Heavy tails; rows of zeros, of one sign, of tiny, huge and subnormal numbers, and of halves of whole numbers (ties)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * torch.randn(SHAPE, generator=generator).exp()
    weight[0, : 3 * GROUP] = 0
    weight[1] *= 1e-9
    weight[2] *= 1e30
    weight[3] *= 1e-40
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs()
    weight[6] = torch.randint(-15, 16, (SHAPE[1],), generator=generator) / 2
    weight[7] = torch.rand(SHAPE[1], generator=generator) * 3 * TINIEST
    weight[8, 5] = 3e38
    weight[9, 1:] = 0
    return weight.to(dtype)


def statistics(generation: int = 0) -> InputStatistics:
    """A few inputs matter much more than the others."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(SHAPE[1], generator=generator).mul(1.5).exp()
    samples = torch.randn(48, SHAPE[1], generator=generator) * spread
    return InputStatistics(samples.square().mean(0), samples.bfloat16(), generation)


def modelopt(name: str, weight: Tensor, group_size: int = GROUP) -> ModelOptQuantizer:
    return ModelOptQuantizer({LAYER: weight}, {LAYER: FORMATS[name]}, group_size)


def native(name: str, weight: Tensor, group_size: int = GROUP) -> NativeQuantizer:
    return NativeQuantizer({LAYER: weight}, {LAYER: FORMATS[name]}, group_size)


def fake_quantized(format: Format, weight: Tensor, inputs: InputStatistics | None) -> Tensor:
    """What the weight becomes in a model that ModelOpt quantised with the format's config, in float32."""
    import modelopt.torch.quantization as mtq

    from erollout.drafter.calibrators import ClipCalibrator, install_calibrators

    linear: Any = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    tree = nn.ModuleDict({"linear": linear})
    mtq.quantize(tree, format.config(GROUP))
    install_calibrators(linear.weight_quantizer, format)
    if isinstance(linear.weight_quantizer._calibrator, ClipCalibrator) and inputs is not None:
        linear.weight_quantizer._calibrator.importance = inputs.mean_square
    mtq.calibrate(tree, "max")
    return linear.weight_quantizer(linear.weight)


def spread_scales(weight: QuantizedWeight) -> Tensor:
    return weight.scales.float().expand(SHAPE[0], -1).repeat_interleave(SHAPE[1] // weight.scales.shape[1], dim=1)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "w4a16_awq"])
def test_the_numbers_dequantise_to_what_modelopt_fake_quantises(name: str) -> None:
    weight, inputs = hard_weights(), statistics()
    numbers = modelopt(name, weight).quantize(LAYER, inputs)
    actual, expected = dequantize(numbers), fake_quantized(FORMATS[name], weight, inputs)
    scales = spread_scales(numbers)
    visible = spread_scales(numbers) * 7 > TINIEST  # below, fake quantisation gives zeros at once
    differs = visible & ((actual - expected).abs() > expected.abs() * 1e-6 + scales * 1e-5)
    if numbers.format == "fp8":  # what lies halfway between two numbers of fp8 may go either way
        assert differs.sum() <= 0.002 * differs.numel()
        torch.testing.assert_close(actual[differs], expected[differs], rtol=0.14, atol=0)
    else:
        exact = weight.float() / scales
        assert (exact - exact.floor() - 0.5).abs()[differs].le(1e-5).all(), "only ties may round differently"
        assert ((actual - expected).abs() <= scales * 1.001)[visible].all()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_have_their_types_shapes_and_ranges(name: str) -> None:
    format = FORMATS[name]
    numbers = modelopt(name, hard_weights()).quantize(LAYER, statistics())
    assert numbers.format == format.weight and numbers.values.shape == SHAPE
    assert numbers.scales.float().isfinite().all() and (numbers.scales.float() > 0).all()
    assert (numbers.zero_points is not None) == format.asymmetric and (numbers.pre_scale is not None) == (name == "w4a16_awq")
    if format.weight == "int4":
        assert numbers.values.dtype == torch.int8 and numbers.scales.dtype == torch.bfloat16
        assert numbers.values.min() >= -8 and numbers.values.max() == 7
        assert numbers.scales.shape == (SHAPE[0], SHAPE[1] // GROUP) and numbers.group_size == GROUP
    else:
        assert numbers.scales.dtype == torch.float32 and numbers.group_size == SHAPE[1]
        assert numbers.scales.shape == (1 if name == "fp8" else SHAPE[0], 1)
        assert numbers.values.dtype == (torch.int8 if format.weight == "int8" else torch.float8_e4m3fn)
        assert numbers.values.float().abs().max() == (127 if format.weight == "int8" else 448)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("fp8", "w4a16_awq")])
def test_zeros_stay_zeros(name: str) -> None:
    numbers = modelopt(name, hard_weights()).quantize(LAYER, None)
    assert (dequantize(numbers)[0, : 3 * GROUP] == 0).all() and (dequantize(numbers)[9, 1:] == 0).all()
    assert dequantize(numbers)[9, 0] != 0
    if numbers.format == "int4":
        assert (numbers.scales[0, :3] == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w4a16_clip", "w4a16_awq", "w8a8", "fp8", "fp8_channel"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, bad: float) -> None:
    weight = hard_weights()
    weight[11, 77] = bad
    makers = [modelopt] if why_unavailable() or name.startswith("fp8") else [modelopt, native]
    for make in makers:
        with pytest.raises(UserError, match=r"layers\.0\.o_proj has weights that are not finite"):
            make(name, weight).quantize(LAYER, None)


def test_a_span_beyond_float32_is_refused() -> None:
    weight = torch.zeros(SHAPE, dtype=torch.bfloat16)
    weight[0, :2] = torch.tensor([3e38, -3e38])
    for make in [modelopt] if why_unavailable() else [modelopt, native]:
        with pytest.raises(UserError, match="not finite"):
            make("w4a16_asym", weight).quantize(LAYER, None)


def group_errors(numbers: QuantizedWeight, weight: Tensor, importance: Tensor) -> Tensor:
    error = (weight.double() - dequantize(numbers).double()).square() * importance.double()
    return error.view(SHAPE[0], -1, GROUP).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_clip_search_never_loses_and_mostly_wins_against_rounding(weighted: bool) -> None:
    weight, inputs = hard_weights(), statistics() if weighted else None
    importance = inputs.mean_square if inputs is not None else torch.ones(SHAPE[1])
    clipped = group_errors(modelopt("w4a16_clip", weight).quantize(LAYER, inputs), weight, importance)
    rounded = group_errors(modelopt("w4a16", weight).quantize(LAYER, inputs), weight, importance)
    assert (clipped <= rounded).all()
    assert (clipped < 0.98 * rounded).float().mean() > 0.5


def test_activations_decide_over_the_clip() -> None:
    weight, inputs = hard_weights(), statistics()
    quantizer = modelopt("w4a16_clip", weight)
    weighted, plain = quantizer.quantize(LAYER, inputs), quantizer.quantize(LAYER, None)
    errors = [group_errors(numbers, weight, inputs.mean_square)[10:] for numbers in (weighted, plain)]
    assert (errors[0] <= errors[1]).all() and errors[0].sum() < 0.97 * errors[1].sum()


def test_awq_lowers_the_error_of_outputs_and_is_searched_once_per_collection() -> None:
    weight = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) * 0.05).bfloat16()
    before, inputs = weight.clone(), statistics()
    quantizer = modelopt("w4a16_awq", weight)
    plain = quantizer.quantize(LAYER, None)
    assert plain.pre_scale is not None and (plain.pre_scale == 1).all()
    scaled = quantizer.quantize(LAYER, inputs)
    assert inputs.samples is not None and scaled.pre_scale is not None
    x = inputs.samples.float()
    exact = x @ weight.float().T
    error, plain_error = (
        (x * n.pre_scale.float()) @ dequantize(n).T - exact for n in (scaled, plain) if n.pre_scale is not None
    )
    assert error.norm() < 0.9 * plain_error.norm()
    assert torch.equal(weight, before), "the shard itself was scaled"
    other = InputStatistics(inputs.mean_square, inputs.samples.flip(1), generation=0)
    kept = quantizer.quantize(LAYER, other)
    assert kept.pre_scale is not None and torch.equal(kept.pre_scale, scaled.pre_scale)
    anew = quantizer.quantize(LAYER, InputStatistics(other.mean_square, other.samples, generation=1))
    assert anew.pre_scale is not None and not torch.equal(anew.pre_scale, scaled.pre_scale)


@pytest.mark.parametrize("make", [modelopt, native])
def test_weights_are_read_where_they_lie(make: Any) -> None:
    if make is native and why_unavailable():
        pytest.skip(str(why_unavailable()))
    weight = hard_weights()
    quantizer: Quantizer = make("w4a16_clip", weight)
    quantizer.quantize(LAYER, None)
    weight.copy_(hard_weights().flip(0))
    changed = quantizer.quantize(LAYER, None)
    expected = modelopt("w4a16_clip", hard_weights().flip(0)).quantize(LAYER, None)
    assert torch.equal(changed.values, expected.values) and torch.equal(changed.scales, expected.scales)


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [16, 32, 80])
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("fp8")])
def test_the_native_path_makes_the_same_numbers(name: str, group_size: int, dtype: torch.dtype) -> None:
    weight = hard_weights(dtype)
    if dtype == torch.float32:
        weight[10:] *= 1.0001  # not bfloat16 numbers
    if name == "w4a16_awq":
        weight = weight[10:].contiguous()  # where scaled weights don't overflow
    for inputs in (None, statistics()):
        expected = modelopt(name, weight, group_size).quantize(LAYER, inputs)
        actual = native(name, weight, group_size).quantize(LAYER, inputs)
        assert (actual.format, actual.group_size) == (expected.format, expected.group_size)
        for field in ("values", "scales", "zero_points", "pre_scale"):
            mine, theirs = getattr(actual, field), getattr(expected, field)
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), field


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_threads_change_no_number() -> None:
    from erollout.kernels.native_quantize import quantize_int4

    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    one, three = (quantize_int4(weight, 32, (0.8, 1.0), num_threads=count) for count in (1, 3))
    assert one is not None and three is not None
    assert torch.equal(one.values, three.values) and torch.equal(one.scales, three.scales)


@pytest.mark.full
@pytest.mark.end_to_end
@pytest.mark.skipif(why_unavailable() is not None or shutil.which("g++") is None, reason="needs g++ and the native kernels")
def test_native_quantisation_under_sanitizers(tmp_path: Path) -> None:
    root, program = Path(__file__).parents[2], tmp_path / "quantize"
    kernels = root / "erollout" / "kernels" / "cpp"
    sources = [kernels / "quantize.cpp", kernels / "threads.cpp", root / "tests" / "native" / "quantize.cpp"]
    level = native_kernels.level()
    assert level is not None
    flags = [*(f"-m{name.replace('_', '')}" for name in level.instructions), "-ffp-contract=off", "-pthread"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]
    checks += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own intrinsics
    command = ["g++", "-std=c++17", "-O1", *flags, *checks, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, timeout=200)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
