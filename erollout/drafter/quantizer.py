"""Quantisation of a decode rank's shards by ModelOpt: the definition of the drafter's weights.

A module tree of linear layers holds the shards themselves and is converted by `mtq.quantize` once per format. At every policy
update each weight quantizer is recalibrated, which gives its range (and, if asymmetric, its bias), and ModelOpt's own real
quantisation with that range gives the numbers: for int4 the one with which ModelOpt exports checkpoints, for int8 and fp8 its
quantised tensors. INT4QTensor is not used: it takes each group's largest weight for the range, regardless of calibration, and
rounds in bfloat16, 2 % away from what ModelOpt's quantizers compute.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from erollout.drafter.activation_statistics import InputStatistics
from erollout.drafter.formats import Format
from erollout.drafter.int4_range import CLIP_RATIOS
from erollout.errors import UserError
from erollout.kernels.native import why_unavailable
from erollout.kernels.native_quantize import quantize_int4, quantize_int8
from erollout.kernels.weights import QuantizedWeight


class Quantizer(Protocol):
    """Quantises named layers from their present weights."""

    def quantize(self, layer: str, statistics: InputStatistics | None) -> QuantizedWeight:
        """Quantise a layer. Raises UserError, naming the layer, if its weights are not all finite."""

    def scratch_bytes(self, layer: str) -> int:
        """Upper bound of the memory of `quantize` besides the weight, result included."""


class ModelOptQuantizer:
    def __init__(self, weights: Mapping[str, Tensor], formats: Mapping[str, Format], group_size: int) -> None:
        """
        Args:
            weights: [out_features, in_features] of each layer, by local name; kept, and read at every `quantize`.
            formats: formats of the same layers.
            group_size: group size of the grouped formats, which divides their in_features.

        Raises UserError, naming the format, if ModelOpt is missing or rejects it.
        """
        self._weights = dict(weights)
        self._formats = dict(formats)
        self._group_size = group_size
        self._scaler = AwqScaler(group_size)
        self._quantizers: dict[str, Any] = {}
        for format in {format.name: format for format in formats.values()}.values():
            names = [name for name, chosen in formats.items() if chosen == format]
            self._quantizers |= _convert({name: weights[name] for name in names}, format, group_size)

    @torch.no_grad()
    def quantize(self, layer: str, statistics: InputStatistics | None) -> QuantizedWeight:
        format, weight = self._formats[layer], self._weights[layer]
        pre_scale = self._scaler.pre_scale(layer, weight, format, statistics)
        if pre_scale is not None:
            weight = smoothed(weight, pre_scale)
        quantizer = self._quantizers[layer]
        if format.search == "clip":
            quantizer._calibrator.importance = None if statistics is None else statistics.mean_square
        _calibrate(layer, quantizer, weight)
        if format.weight == "int4":
            return self._int4(quantizer, weight, pre_scale)
        return _wide(quantizer, weight, format)

    def scratch_bytes(self, layer: str) -> int:
        """The peak is in the clip search, which holds errors in float64 (measured: 28 bytes per weight, 12 elsewhere)."""
        return self._weights[layer].numel() * (32 if self._formats[layer].search == "clip" else 16)

    def _int4(self, quantizer: Any, weight: Tensor, pre_scale: Tensor | None) -> QuantizedWeight:
        from modelopt.torch.export.model_config import QUANTIZATION_INT4_AWQ
        from modelopt.torch.export.quant_utils import to_quantized_weight

        rows, columns = weight.shape
        scales = (quantizer.amax.float() / quantizer.maxbound).view(rows, columns // self._group_size)
        zero_points = None
        if quantizer.bias_value is not None:
            bias = quantizer.bias_value.float().view(scales.shape)
            zero_points = (-bias / scales).to(torch.int8)
            weight = weight.float() - bias.repeat_interleave(self._group_size, dim=1)
        packed = to_quantized_weight(weight.float(), scales, QUANTIZATION_INT4_AWQ, block_size=self._group_size)
        low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
        values = torch.stack((low, high), dim=1).view(rows, columns)
        return QuantizedWeight("int4", values, scales.to(torch.bfloat16), self._group_size, zero_points, pre_scale)


class NativeQuantizer:
    """The same numbers from kernels/native_quantize.py; formats that it lacks are left to ModelOpt."""

    def __init__(self, weights: Mapping[str, Tensor], formats: Mapping[str, Format], group_size: int) -> None:
        """As for ModelOptQuantizer. The layers' values share one buffer: a result is valid until the next `quantize`."""
        self._weights = dict(weights)
        self._formats = dict(formats)
        self._group_size = group_size
        self._scaler = AwqScaler(group_size)
        self._natives = {name for name, format in formats.items() if _has_native(format, group_size)}
        largest = max((weights[name].numel() for name in self._natives), default=0)
        self._values = torch.empty(largest, dtype=torch.int8)
        others = {name: format for name, format in formats.items() if name not in self._natives}
        self._modelopt: ModelOptQuantizer | None = None
        if others:
            self._modelopt = ModelOptQuantizer({name: weights[name] for name in others}, others, group_size)

    @torch.no_grad()
    def quantize(self, layer: str, statistics: InputStatistics | None) -> QuantizedWeight:
        if layer not in self._natives:
            assert self._modelopt is not None
            return self._modelopt.quantize(layer, statistics)
        format, weight = self._formats[layer], self._weights[layer]
        pre_scale = self._scaler.pre_scale(layer, weight, format, statistics)
        numbers = self._numbers(format, weight if pre_scale is None else smoothed(weight, pre_scale), statistics)
        if numbers is None:
            raise _not_finite(layer)
        return replace(numbers, pre_scale=pre_scale)

    def scratch_bytes(self, layer: str) -> int:
        """The shared values, the scales, and AWQ's scaled weight."""
        if layer not in self._natives:
            assert self._modelopt is not None
            return self._modelopt.scratch_bytes(layer)
        weight, format = self._weights[layer], self._formats[layer]
        scales = 3 * weight.numel() // self._group_size if format.grouped else 4 * weight.shape[0]
        return self._values.nbytes + scales + (weight.numel() * 6 if format.search == "awq" else 0)

    def _numbers(self, format: Format, weight: Tensor, statistics: InputStatistics | None) -> QuantizedWeight | None:
        values = self._values[: weight.numel()].view(weight.shape)
        threads = torch.get_num_threads()
        if format.weight == "int8":
            return quantize_int8(weight, values, threads)
        clip = format.search == "clip"
        importance = statistics.mean_square if clip and statistics is not None else None
        ratios = CLIP_RATIOS if clip else (1.0,)
        return quantize_int4(weight, self._group_size, ratios, importance, format.asymmetric, values, threads)


class AwqScaler:
    """AWQ's scales of each layer's activations: searched when there are new statistics, kept in between."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self._known: dict[str, tuple[int, Tensor]] = {}

    def pre_scale(self, layer: str, weight: Tensor, format: Format, statistics: InputStatistics | None) -> Tensor | None:
        """Scales, bfloat16 [in_features], which are ones without statistics; None for other formats."""
        if format.search != "awq":
            return None
        if statistics is None or statistics.samples is None:
            return torch.ones(weight.shape[1], dtype=torch.bfloat16, device=weight.device)
        known = self._known.get(layer)
        if known is None or known[0] != statistics.generation:
            scale = _search_awq(weight, statistics.samples, format, self._group_size)
            known = self._known[layer] = (statistics.generation, scale)
        return known[1]


def build_quantizer(kind: str, weights: Mapping[str, Tensor], formats: Mapping[str, Format], group_size: int) -> Quantizer:
    """The quantizer of these layers: `modelopt`, or `auto`: the native one if available, which gives the same numbers."""
    assert kind in ("auto", "modelopt"), kind
    on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
    if kind == "modelopt" or not on_cpu or why_unavailable() is not None:
        return ModelOptQuantizer(weights, formats, group_size)
    return NativeQuantizer(weights, formats, group_size)


def smoothed(weight: Tensor, pre_scale: Tensor) -> Tensor:
    """The weight for activations multiplied by `pre_scale`, in the weight's dtype, by ModelOpt's arithmetic."""
    return (weight * (1.0 / pre_scale.float())).to(weight.dtype)


def _convert(weights: Mapping[str, Tensor], format: Format, group_size: int) -> dict[str, Any]:
    """The weight quantizer of each layer, from a module tree converted by ModelOpt."""
    mtq = _import_modelopt()
    from erollout.drafter.calibrators import install_calibrators

    tree = nn.ModuleDict({name.replace(".", "/"): _linear(weight) for name, weight in weights.items()})
    with _quiet():
        try:
            mtq.quantize(tree, format.config(group_size))
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            layers = ", ".join(weights)
            raise UserError(f"ModelOpt can't quantise {layers} as {format.name} on this device: {error}") from error
    quantizers = {name: tree[name.replace(".", "/")].weight_quantizer for name in weights}
    for quantizer in quantizers.values():
        install_calibrators(quantizer, format)
    return quantizers


def _linear(weight: Tensor) -> nn.Linear:
    """A linear module that holds the given tensor itself."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _calibrate(layer: str, quantizer: Any, weight: Tensor) -> None:
    from modelopt.torch.quantization.model_calib import max_calibrate

    if not torch.isfinite(weight).all():
        raise _not_finite(layer)
    quantizer._calibrator.reset()
    max_calibrate(quantizer, lambda quantizer: quantizer(weight), distributed_sync=False)
    if not torch.isfinite(quantizer.amax).all():  # the span of huge finite weights
        raise _not_finite(layer)


def _wide(quantizer: Any, weight: Tensor, format: Format) -> QuantizedWeight:
    """Quantise to int8 or fp8 with one scale per row or per tensor."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor

    scales = (quantizer.amax.float() / quantizer.maxbound).view(-1, 1)
    tensor = INT8QTensor if format.weight == "int8" else FP8QTensor
    quantized, _ = tensor.quantize(weight.float(), scales=scales)
    return QuantizedWeight(format.weight, quantized._quantized_data, scales, weight.shape[1])


def _search_awq(weight: Tensor, samples: Tensor, format: Format, group_size: int) -> Tensor:
    """Scales of activations by ModelOpt's awq_lite on a copy of the layer: bfloat16 [in_features].

    Only this rank's shard counts: ModelOpt would take the world for a layer's data-parallel group and average over it.
    """
    mtq = _import_modelopt()
    from modelopt.torch.utils.distributed import ParallelState

    layer: Any = _linear(weight.clone())  # awq_lite scales the weight itself
    tree = nn.ModuleDict({"layer": layer})
    with _quiet():
        mtq.quantize(tree, {**format.config(group_size), "algorithm": None})
        layer.parallel_state = ParallelState(data_parallel_group=-1, tensor_parallel_group=-1)
        mtq.calibrate(tree, {"method": "awq_lite"}, lambda _: layer(samples.to(weight.dtype)))
    return layer.input_quantizer.pre_quant_scale.to(torch.bfloat16).view(-1).clone()


def _has_native(format: Format, group_size: int) -> bool:
    return format.weight == "int8" or (format.weight == "int4" and group_size % 16 == 0)


def _not_finite(layer: str) -> UserError:
    return UserError(f"the policy's {layer} has weights that are not finite: no drafter can be made of them")


def _import_modelopt() -> Any:
    with _quiet():
        try:
            import modelopt.torch.quantization as mtq
        except ImportError as error:
            raise UserError(
                f"speculation.drafter quantises with NVIDIA ModelOpt, which can't be imported ({error}); "
                "install it: pip install 'erollout[modelopt]'"
            ) from error
    return mtq


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context that suppresses ModelOpt's output and warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
