"""The drafter's formats: bits and quantisation of weights by ModelOpt, treatment of activations, matmuls by device. Pure.

A format is a row of FORMATS. Sizes that it does not divide and devices without a matmul for it are rejected here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from erollout.errors import UserError

if TYPE_CHECKING:
    from erollout.kernels.native import NativeFormat
    from erollout.kernels.weights import WeightFormat

Search = Literal["max", "clip", "awq"]
"""Search for scales: from the largest weight, by the least weighted error over clipped ranges, or after AWQ's scaling."""
Activations = Literal["bf16", "int8_group", "int8_token", "fp8_tensor", "fp8_token"]
"""Activations of the matmul: unchanged, quantised per token (and group of weights), or per tensor."""
NONE = "none"
"""Name of the format of the target's own 16-bit layer."""
AUTO = "auto"
"""Name for the choice of a format per layer, after the first rollout."""
FIRST_FORMAT = "w4a16_clip"
"""Format of `auto` before the first rollout."""
HEAD_FORMAT = "w8a8"
"""Format of a drafter's own LM head."""
_SCALE_BYTES = 2
"""Bytes of a group's scale, and of what goes with its zero point."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of the drafter's linear layers."""

    name: str
    weight: "WeightFormat"
    quantizer: dict[str, Any]
    """Attributes of ModelOpt's weight quantizer; `block_sizes` is filled in with the group size."""
    search: Search = "max"
    activations: Activations = "bf16"
    native: "NativeFormat | None" = None
    """Format of the linear of kernels/native.py; None: only torch's operators on the CPU."""
    cuda: str | None = None
    """Linear of kernels/cuda.py; None: dequantised, which saves no time."""
    asymmetric: bool = False

    @property
    def bits(self) -> int:
        """Bits per weight, without scales."""
        number = self.quantizer["num_bits"]
        return number if isinstance(number, int) else 1 + sum(number)  # sign, exponent and mantissa

    @property
    def grouped(self) -> bool:
        """Whether scales cover groups of a row."""
        return self.weight == "int4"

    @property
    def needs_statistics(self) -> bool:
        """Whether the quantised weights depend on activations."""
        return self.search != "max"

    def weight_bytes(self, group_size: int) -> float:
        """Bytes per weight, including its share of a group's scales; scales of whole rows do not count."""
        scales = _SCALE_BYTES * (1 + self.asymmetric) if self.grouped else 0
        return self.bits / 8 + scales / group_size

    def config(self, group_size: int) -> dict[str, Any]:
        """Configuration for `modelopt.torch.quantization.quantize`, without calibration. The matmuls quantise activations."""
        attributes = dict(self.quantizer)
        if self.grouped:
            attributes["block_sizes"] = {-1: group_size, "type": "static"}
        if self.asymmetric:
            attributes["bias"] = {-1: None, "type": "static", "method": "max_min"}
        rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": attributes}]
        return {"quant_cfg": rules, "algorithm": None}


_INT4 = {"num_bits": 4}
_INT8 = {"num_bits": 8, "axis": 0}
_FP8 = {"num_bits": (4, 3), "axis": None}
_FP8_CHANNEL = {"num_bits": (4, 3), "axis": 0}

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("w4a16", "int4", _INT4, native="int4", cuda="int4"),
        Format("w4a16_asym", "int4", _INT4, native="int4", cuda="int4", asymmetric=True),
        Format("w4a16_clip", "int4", _INT4, search="clip", native="int4", cuda="int4"),
        Format("w4a16_awq", "int4", _INT4, search="awq", native="int4", cuda="int4"),
        Format("w4a8", "int4", _INT4, activations="int8_group", native="int4_a8"),
        Format("w4a8_clip", "int4", _INT4, search="clip", activations="int8_group", native="int4_a8"),
        Format("w8a8", "int8", _INT8, activations="int8_token", native="int8", cuda="int8"),
        Format("fp8", "fp8", _FP8, activations="fp8_tensor", cuda="fp8"),
        Format("fp8_channel", "fp8", _FP8_CHANNEL, activations="fp8_token", cuda="fp8"),
    )
}


def find_format(name: str, key: str = "speculation.drafter.format") -> Format | None:
    """The format with a name; None for `none`, the target's own layer. Raises UserError."""
    if name == NONE:
        return None
    if name in FORMATS:
        return FORMATS[name]
    if name.lower().startswith(("nvfp4", "mxfp", "mxint")):
        raise UserError(
            f"{key} = {name}: ModelOpt quantises it only on CUDA devices, and no drafter matmul takes it; "
            f"use one of {', '.join(FORMATS)}"
        )
    raise UserError(f"{key} = {name} is unknown; known are {', '.join([*FORMATS, NONE])}")


def check_shape(layer: str, format: Format, shape: tuple[int, int], group_size: int) -> None:
    """Raise UserError, naming the layer, if a format can't hold its shard.

    Args:
        shape: [out_features, in_features] of the rank's shard.
        group_size: input features per scale in grouped formats.
    """
    rows, columns = shape
    if not format.grouped:
        return
    if group_size < 2 or columns % group_size:
        fitting = [str(size) for size in (256, 128, 96, 64, 48, 32, 16, 8) if columns % size == 0]
        advice = f"group sizes that fit are {', '.join(fitting)}" if fitting else "no usual group size fits"
        raise UserError(
            f"speculation.drafter.group_size = {group_size} does not divide the {columns} input features of {layer}'s shard: "
            f"{advice}; or give the layer w8a8 or none in speculation.drafter.overrides"
        )
    if rows % 2:
        raise UserError(
            f"drafter layer {layer} has {rows} rows on this rank, and ModelOpt packs int4 in pairs of rows: "
            "give it w8a8 or none in speculation.drafter.overrides"
        )
