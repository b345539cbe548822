"""The packed linears of erollout/kernels/cpp against torch in float32."""

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erollout.errors import UserError
from erollout.kernels import native, reference
from erollout.kernels.native import NativeFormat, NativeLinear
from erollout.kernels.weights import QuantizedWeight

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 32, 37, 200)
SHAPES: dict[NativeFormat, tuple[tuple[int, int, int], ...]] = {
    "bf16": ((96, 576, 0), (17, 1536, 0), (33, 70, 0), (5, 3, 0), (1, 1, 0)),
    "int8": ((96, 576, 0), (17, 1536, 0), (33, 70, 0), (5, 3, 0), (1, 1, 0)),
    "int4": ((96, 576, 64), (17, 1536, 128), (40, 960, 32), (33, 96, 32), (1, 64, 64)),
    "int4_a8": ((96, 576, 64), (17, 1536, 128), (40, 960, 32), (33, 96, 32), (1, 64, 64), (7, 32, 32)),
}
"""Out and in features, group size: tails everywhere."""
CASES = [(format, *shape, asymmetric) for format, shapes in SHAPES.items() for shape in shapes for asymmetric in (False, True)]
CASES = [case for case in CASES if case[0].startswith("int4") or not case[-1]]


def random_weight(
    out_features: int,
    in_features: int,
    format: NativeFormat,
    group_size: int,
    asymmetric: bool = False,
    pre_scale: bool = False,
) -> Tensor | QuantizedWeight:
    if format == "bf16":
        return torch.randn(out_features, in_features).bfloat16()
    scaling = (torch.rand(in_features) + 0.5).bfloat16() if pre_scale else None
    if format == "int8":
        values = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        return QuantizedWeight("int8", values, torch.rand(out_features, 1) / 100, in_features, pre_scale=scaling)
    values = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
    groups = out_features, in_features // group_size
    zero_points = torch.randint(-8, 8, groups, dtype=torch.int8) if asymmetric else None
    return QuantizedWeight("int4", values, (torch.rand(groups) / 100).bfloat16(), group_size, zero_points, scaling)


def packed(
    weight: Tensor | QuantizedWeight, format: NativeFormat, bias: Tensor | None = None, num_threads: int = 1
) -> NativeLinear:
    shape = weight.shape if isinstance(weight, Tensor) else weight.values.shape
    group_size = weight.group_size if isinstance(weight, QuantizedWeight) and weight.format == "int4" else 0
    asymmetric = isinstance(weight, QuantizedWeight) and weight.zero_points is not None
    has_pre_scale = isinstance(weight, QuantizedWeight) and weight.pre_scale is not None
    linear = NativeLinear(shape[0], shape[1], format, group_size, asymmetric, bias, has_pre_scale, num_threads)
    linear.pack_(weight)
    return linear


def assert_near(result: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding to bfloat16, and for sums in another order."""
    scale = expected.pow(2).mean().sqrt()
    assert result.dtype == torch.bfloat16 and result.shape == expected.shape
    assert torch.all((result.float() - expected).abs() <= expected.abs() * 2**-8 + scale * 1e-4)


@needs_native
@pytest.mark.parametrize(("format", "out_features", "in_features", "group_size", "asymmetric"), CASES)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias and pre_scale"])
def test_matches_the_reference_with_the_same_bits_for_any_rows(
    format: NativeFormat, out_features: int, in_features: int, group_size: int, asymmetric: bool, extras: bool
) -> None:
    torch.manual_seed(1)
    weight = random_weight(out_features, in_features, format, group_size, asymmetric, pre_scale=extras)
    bias = torch.randn(out_features).bfloat16() if extras else None
    linear = packed(weight, format, bias)
    x = torch.randn(max(ROWS), in_features).bfloat16()
    x[:, 0] *= 20
    y = linear(x)
    assert_near(y, reference.linear(x, weight, bias, quantize_x=format in ("int4_a8", "int8")))
    for rows in ROWS:
        first = (rows * 7) % (max(ROWS) - rows + 1)  # another place in the call too
        assert torch.equal(linear(x[first : first + rows]), y[first : first + rows]), rows


@needs_native
@pytest.mark.parametrize("format", native.FORMATS)
def test_threads_change_no_bits(format: NativeFormat) -> None:
    torch.manual_seed(2)
    weight = random_weight(200, 192, format, 64, format.startswith("int4"))
    one, three = packed(weight, format), packed(weight, format, num_threads=3)
    assert torch.equal(one._weight, three._weight)  # type: ignore[arg-type]
    for rows in (1, 5, 64):
        x = torch.randn(rows, 192).bfloat16()
        assert torch.equal(one(x), three(x))


@needs_native
@pytest.mark.parametrize("format", native.FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_so_and_touches_no_other(format: NativeFormat, bad: float) -> None:
    torch.manual_seed(3)
    linear = packed(random_weight(40, 128, format, 32), format)
    x = torch.randn(9, 128).bfloat16()
    clean = linear(x)
    x[4, 77] = bad
    y = linear(x)
    assert not y[4].isfinite().any()
    if format in ("int4_a8", "int8") or bad != bad:
        assert y[4].isnan().all()
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@needs_native
@pytest.mark.parametrize("format", native.FORMATS)
def test_packing_again_changes_the_weights_and_no_address(format: NativeFormat) -> None:
    torch.manual_seed(4)
    old, new = (random_weight(33, 96, format, 32, pre_scale=True) for _ in range(2))
    linear = packed(old, format)
    addresses = [linear.address, linear.struct.weight, linear.struct.scale, linear.struct.pre_scale]
    linear.pack_(new)
    assert addresses == [linear.address, linear.struct.weight, linear.struct.scale, linear.struct.pre_scale]
    x = torch.randn(3, 96).bfloat16()
    assert torch.equal(linear(x), packed(new, format)(x))
    assert not torch.equal(linear(x), packed(old, format)(x))


@needs_native
def test_release_frees_until_the_next_pack() -> None:
    weight = torch.randn(8, 8).bfloat16()
    linear = packed(weight, "bf16")
    x = torch.randn(2, 8).bfloat16()
    y = linear(x)
    linear.release()
    assert linear.struct.weight is None
    with pytest.raises(AssertionError, match="pack_"):
        linear(x)
    linear.pack_(weight)
    assert torch.equal(linear(x), y)


@needs_native
@pytest.mark.parametrize("format", native.FORMATS)
def test_strides_alignment_and_leading_dimensions(format: NativeFormat) -> None:
    torch.manual_seed(5)
    linear = packed(random_weight(33, 64, format, 32), format)
    wide = torch.randn(6, 131).bfloat16()
    part = wide[:, 3:67]  # rows 262 bytes apart, and none on a cache line
    assert torch.equal(linear(part), linear(part.contiguous()))
    assert torch.equal(linear(part.t().contiguous().t()), linear(part))
    assert torch.equal(linear(part.reshape(2, 3, 64)), linear(part).view(2, 3, 33))
    assert linear(part[:0]).shape == (0, 33)


@needs_native
def test_a_strided_weight_is_packed_as_it_is() -> None:
    weight = torch.randn(40, 80).bfloat16()
    x = torch.randn(2, 33).bfloat16()
    assert torch.equal(packed(weight[:, 5:38], "bf16")(x), packed(weight[:, 5:38].contiguous(), "bf16")(x))


@needs_native
@pytest.mark.parametrize("format", ["int4_a8", "int8"])
def test_activations_of_zero_and_next_to_it_give_zero(format: NativeFormat) -> None:
    linear = packed(random_weight(16, 64, format, 32), format)
    x = torch.zeros(2, 64).bfloat16()
    x[1] = 1e-38
    assert torch.equal(linear(x), torch.zeros(2, 16).bfloat16())


@needs_native
def test_a_bias_is_read_where_it_is() -> None:
    weight, bias = torch.randn(8, 8).bfloat16(), torch.zeros(8).bfloat16()
    linear, x = packed(weight, "bf16", bias), torch.zeros(1, 8).bfloat16()
    bias.fill_(3)
    assert torch.equal(linear(x), torch.full((1, 8), 3.0).bfloat16())


@needs_native
def test_the_struct_is_the_same_on_both_sides() -> None:
    struct = native.LinearStruct
    assert struct.weight.offset == 24 and native.library().erollout_linear_struct_bytes() == 56
    assert ctypes.sizeof(struct) == 56


@needs_native
@pytest.mark.parametrize(
    ("in_features", "group_size", "named"),
    [(96, 64, r"in_features \(96\).*group_size \(64\)"), (96, 16, "32, 64 and 128, not 16")],
)
def test_groups_without_a_kernel_are_refused_by_name(in_features: int, group_size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        NativeLinear(32, in_features, "int4", group_size)


@needs_native
def test_weights_of_another_shape_or_format_are_refused() -> None:
    linear = NativeLinear(8, 32, "int4", 32)
    for wrong in (
        random_weight(8, 64, "int4", 32),
        random_weight(8, 32, "int4", 32, asymmetric=True),
        random_weight(8, 32, "int4", 32, pre_scale=True),
        random_weight(8, 32, "int8", 0),
        torch.zeros(8, 32).bfloat16(),
    ):
        with pytest.raises(AssertionError):
            linear.pack_(wrong)


def test_missing_instructions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor_flags", lambda: {"avx", "avx2", "avx512f"})
    assert "need fma," in str(native.why_unavailable.__wrapped__())


def test_the_environment_lowers_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor_flags", lambda: {name for level in native.LEVELS for name in level.instructions})
    monkeypatch.setattr(native, "_path", lambda level: Path(__file__))
    monkeypatch.delenv("EROLLOUT_MAX_CPU_ISA", raising=False)
    assert native.level() == native.LEVELS[0]
    monkeypatch.setenv("EROLLOUT_MAX_CPU_ISA", "avx2")
    assert native.level() == native.LEVELS[1]
    monkeypatch.setenv("EROLLOUT_MAX_CPU_ISA", "none")
    assert "EROLLOUT_MAX_CPU_ISA = none" in str(native.why_unavailable.__wrapped__())
    monkeypatch.setenv("EROLLOUT_MAX_CPU_ISA", "sse9")
    with pytest.raises(UserError, match="EROLLOUT_MAX_CPU_ISA = sse9 is unknown; known are avx512, avx2, none"):
        native.level()


def test_what_is_compiled_for_is_what_is_checked_for() -> None:
    match = re.search(r"INSTRUCTION_SETS = (\{.*?\})", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert match
    checked = {level.extension: tuple(name.replace("_", "") for name in level.instructions) for level in native.LEVELS}
    assert ast.literal_eval(match[1]) == checked


@needs_native
def test_a_forked_child_starts_its_own_threads() -> None:
    linear = packed(torch.randn(256, 64).bfloat16(), "bf16", num_threads=2)
    x = torch.randn(4, 64).bfloat16()
    y = linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), y) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(linear(x), y)


@pytest.mark.full
@needs_native
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    """tests/native/linear.cpp: odd shapes between guard pages, and AMX's kernels on tiles in software."""
    level = native.level()
    assert level is not None
    flags = [f"-m{name.replace('_', '')}" for name in level.instructions]
    flags.append("-O0" if level.name == "avx512" else "-O1")  # avx2.h hands immediates through functions
    kernels = ROOT / "erollout" / "kernels" / "cpp"
    sources = sorted(kernels.glob("linear*.cpp")) + [kernels / name for name in ("activations.cpp", "pack.cpp", "threads.cpp")]
    program = tmp_path / "linear"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEROLLOUT_EMULATE_TILES"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    command = ["g++", "-std=c++17", "-ffp-contract=off", "-pthread", *flags, *sanitize, *warnings]
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    for source, target in zip(sources, objects, strict=True):
        subprocess.run([*command, "-c", str(source), "-o", target], check=True, timeout=200)
    main = str(ROOT / "tests" / "native" / "linear.cpp")
    subprocess.run([*command, f"-I{kernels}", main, *objects, "-o", str(program)], check=True, timeout=200)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def reason_in(copy: Path) -> str:
    """What a copy of the package says about its native extension, in an interpreter of its own."""
    code = "from erollout.kernels.native import why_unavailable; print(why_unavailable())"
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_native
def test_an_extension_that_does_not_belong_to_the_sources_is_not_used(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "erollout", tmp_path / "erollout", ignore=shutil.ignore_patterns("__pycache__"))
    assert reason_in(tmp_path) == "None"
    with (tmp_path / "erollout/kernels/cpp/linear.h").open("a") as header:
        header.write("// changed\n")
    assert "built from other sources" in reason_in(tmp_path)
    extensions = list((tmp_path / "erollout/kernels").glob("_native*.so"))
    for extension in extensions:
        extension.write_bytes(b"not a shared library")
    assert "can't be loaded" in reason_in(tmp_path)
    for extension in extensions:
        extension.unlink()
    assert "was not built" in reason_in(tmp_path)
