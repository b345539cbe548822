"""The compiled CPU kernels (erollout/kernels/cpp), called through their C interface: no torch headers, any Python.

They are compiled twice from the same sources, for AVX-512 and for AVX2, and the better one that the processor has is loaded.
The extensions are optional: they are built where a compiler is. Both make the same promises; their bits differ.
"""

import ctypes
import functools
import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from erollout.environment import max_cpu_isa
from erollout.errors import UserError
from erollout.kernels.native_interface import declare
from erollout.kernels.weights import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Level:
    """An extension and the instructions that setup.py compiles it for, as /proc/cpuinfo calls them; a test compares the two."""

    name: str
    """As EROLLOUT_MAX_CPU_ISA has it."""
    extension: str
    instructions: tuple[str, ...]


LEVELS = (
    Level(
        "avx512",
        "_native",
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "gfni", "fma"),
    ),
    Level("avx2", "_native_avx2", ("avx2", "fma")),
)
"""Best first."""

NativeFormat = Literal["bf16", "int4", "int4_a8", "int8"]
"""int4 is exact weight-only; int4_a8 and int8 quantise the activations to int8, per token and group, and per token."""
FORMATS: tuple[NativeFormat, ...] = ("bf16", "int4", "int4_a8", "int8")
GROUP_SIZES = (32, 64, 128)


class LinearStruct(ctypes.Structure):
    """`Linear` of cpp/linear.h. Its address is stable while the NativeLinear lives."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("asymmetric", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("pre_scale", ctypes.c_void_p),
    )


@functools.cache
def why_unavailable() -> str | None:
    """None if the native kernels can run; otherwise one line that says what is missing."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"native kernels are for x86-64 Linux, and this is {platform.machine()} {platform.system()}"
    allowed = _allowed_levels()
    if not allowed:
        return "EROLLOUT_MAX_CPU_ISA = none switches the native kernels off"
    if level() is None:
        missing = [name for name in allowed[-1].instructions if name not in processor_flags()]
        return f"native kernels need {', '.join(missing)}, which this processor lacks"
    if not _library_path().exists():
        return "the native extension was not built: install a C++ compiler and reinstall erollout"
    try:
        loaded = _load()
    except (OSError, AttributeError) as error:
        return f"the native extension can't be loaded ({error}): reinstall erollout"
    if (sources := _fingerprint()) and sources != loaded.erollout_sources().decode():
        return "the native extension was built from other sources: reinstall erollout (make install, or pip install -e .)"
    return None


def level() -> Level | None:
    """Level of the extension to load: the best one that the processor supports, that was built and that is allowed.

    None if the processor supports none; if none was built, the best supported one. Raises UserError for an unknown level.
    """
    flags = processor_flags()
    possible = [level for level in _allowed_levels() if flags.issuperset(level.instructions)]
    return next((level for level in possible if _path(level).exists()), possible[0] if possible else None)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded extension. Raises UserError if why_unavailable() gives a reason."""
    if reason := why_unavailable():
        raise UserError(reason)
    return _load()


@functools.cache
def threads(count: int) -> int:
    """Handle (C++ `Threads*`) of this process's pool of `count` threads, the caller included; it lives as long as the process.

    One caller at a time may use it. A forked child may use its parent's handle: its threads start anew.
    """
    assert count >= 1, count
    return library().erollout_threads_create(count)


class NativeLinear:
    """y = x W^T + bias on packed weights, in bfloat16: x [..., in_features] -> [..., out_features].

    A row's bits depend on that row of x alone: not on the other rows, their number or the number of threads. With a format that
    quantises activations, a row with an infinite or NaN activation becomes NaN as a whole.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        format: NativeFormat,
        group_size: int = 0,
        asymmetric: bool = False,
        bias: Tensor | None = None,
        has_pre_scale: bool = False,
        num_threads: int = 1,
    ) -> None:
        """`pack_` must run before the first call. `bias` is read where it is. Raises UserError for what no kernel does."""
        _check_shape(out_features, in_features, format, group_size, asymmetric)
        if bias is not None:
            assert bias.shape == (out_features,) and bias.dtype == torch.bfloat16 and bias.is_contiguous(), bias
        self.out_features = out_features
        self.in_features = in_features
        self.format = format
        self.group_size = group_size
        self.asymmetric = asymmetric
        self.has_pre_scale = has_pre_scale
        self.struct = LinearStruct(FORMATS.index(format), out_features, in_features, group_size, int(asymmetric))
        self.address = ctypes.addressof(self.struct)
        self._run = library().erollout_linear
        self._threads = threads(num_threads)
        self._bias = bias
        self.struct.bias = None if bias is None else bias.data_ptr()
        self._weight: Tensor | None = None
        self._scale: Tensor | None = None
        self._pre_scale: Tensor | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight, which a call reads once."""
        return library().erollout_linear_packed_bytes(self.address)

    def pack_(self, weight: Tensor | QuantizedWeight) -> None:
        """Pack into the same buffers, at the same addresses; the first call, and the first after release, makes them."""
        if self._weight is None:
            self._allocate()
        assert self._weight is not None
        if isinstance(weight, Tensor):
            self._pack_bf16(weight)
        else:
            self._pack_quantized(weight)

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16 and x.shape[-1] == self.in_features, (x.dtype, x.shape)
        assert self._weight is not None, "pack_ must run before the first call, and after release"
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, self.in_features).contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self._run(self.address, rows.data_ptr(), rows.stride(0), rows.shape[0], y.data_ptr(), self.out_features, self._threads)
        return y

    def release(self) -> None:
        """Free the packed buffers: `pack_` must run before the next call."""
        self._weight = self._scale = self._pre_scale = None
        self.struct.weight = self.struct.scale = self.struct.pre_scale = None

    def _pack_bf16(self, weight: Tensor) -> None:
        assert self.format == "bf16", self.format
        assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu", (weight.dtype, weight.device)
        assert weight.shape == (self.out_features, self.in_features) and weight.stride(1) == 1, weight.shape
        address, stride = weight.data_ptr(), weight.stride(0)
        library().erollout_linear_pack_bf16(self.address, address, stride, self.struct.weight, self._threads)

    def _pack_quantized(self, weight: QuantizedWeight) -> None:
        assert self.format != "bf16" and self.format.startswith(weight.format), (self.format, weight.format)
        assert (weight.zero_points is not None) == self.asymmetric, self.asymmetric
        assert (weight.pre_scale is not None) == self.has_pre_scale, self.has_pre_scale
        shape = (self.out_features, self.in_features)
        values = _plain(weight.values, torch.int8, shape)
        if self.format == "int8":
            assert self._scale is not None
            self._scale.copy_(_plain(weight.scales, torch.float32, (self.out_features, 1)).view(-1))
            library().erollout_linear_pack_int8(self.address, values.data_ptr(), self.struct.weight, self._threads)
        else:
            groups = (self.out_features, self.in_features // self.group_size)
            assert weight.group_size == self.group_size, (weight.group_size, self.group_size)
            scales = _plain(weight.scales, torch.bfloat16, groups)
            zeros = None if weight.zero_points is None else _plain(weight.zero_points, torch.int8, groups)
            zero_points = None if zeros is None else zeros.data_ptr()
            library().erollout_linear_pack_int4(
                self.address, values.data_ptr(), scales.data_ptr(), zero_points, self.struct.weight, self._threads
            )
        if self._pre_scale is not None and weight.pre_scale is not None:
            self._pre_scale.copy_(_plain(weight.pre_scale, torch.bfloat16, (self.in_features,)))

    def _allocate(self) -> None:
        self._weight = _aligned_bytes(self.packed_bytes)
        self.struct.weight = self._weight.data_ptr()
        if self.format == "int8":
            self._scale = torch.empty(self.out_features)
            self.struct.scale = self._scale.data_ptr()
        if self.has_pre_scale:
            self._pre_scale = torch.empty(self.in_features, dtype=torch.bfloat16)
            self.struct.pre_scale = self._pre_scale.data_ptr()


def _check_shape(out_features: int, in_features: int, format: str, group_size: int, asymmetric: bool) -> None:
    assert format in FORMATS, format
    assert out_features > 0 and in_features > 0, (out_features, in_features)
    if not format.startswith("int4"):
        assert group_size in (0, in_features) and not asymmetric, (format, group_size, asymmetric)
        return
    if group_size not in GROUP_SIZES:
        raise UserError(f"native {format} kernels have groups of 32, 64 and 128, not {group_size}: choose one of them")
    if in_features % group_size:
        raise UserError(
            f"native {format} kernels need in_features ({in_features}) to be a multiple of group_size ({group_size}): "
            "use a smaller group or less tensor parallelism"
        )


def _plain(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`tensor` as the C side reads it: contiguous on the CPU."""
    assert tensor.dtype == dtype and tensor.shape == shape and tensor.device.type == "cpu", (tensor.dtype, tensor.shape)
    return tensor.contiguous()


def _aligned_bytes(count: int) -> Tensor:
    """uint8 [count] that starts on a cache line."""
    buffer = torch.empty(count + 64, dtype=torch.uint8)
    offset = -buffer.data_ptr() % 64
    return buffer[offset : offset + count]


def processor_flags() -> set[str]:
    """Flags of the processor; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _allowed_levels() -> tuple[Level, ...]:
    limit = max_cpu_isa()
    if limit is None:
        return LEVELS
    names = [level.name for level in LEVELS]
    if limit not in (*names, "none"):
        raise UserError(f"EROLLOUT_MAX_CPU_ISA = {limit} is unknown; known are {', '.join(names)}, none")
    return LEVELS[names.index(limit) :] if limit in names else ()


def _path(level: Level) -> Path:
    return Path(__file__).with_name(f"{level.extension}{sysconfig.get_config_var('EXT_SUFFIX')}")


def _library_path() -> Path:
    return _path(level() or LEVELS[0])


@functools.cache
def _load() -> ctypes.CDLL:
    """Load the extension. Raises OSError or AttributeError for a file that is not this extension."""
    loaded = ctypes.CDLL(str(_library_path()))
    declare(loaded)
    return loaded


def _fingerprint() -> str:
    """Fingerprint of the sources, as computed by setup.py; empty: the sources are not installed."""
    sources = Path(__file__).with_name("cpp")
    paths = sorted((path for pattern in ("*.cpp", "*.h") for path in sources.glob(pattern)), key=lambda path: path.name)
    contents = hashlib.sha256()
    for path in paths:
        contents.update(path.read_bytes())
    return contents.hexdigest() if paths else ""
