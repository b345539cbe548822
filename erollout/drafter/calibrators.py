"""Calibrators for ModelOpt's weight quantizers, installed through its hooks.

They return ranges (amax) whose scales the kernels represent exactly: int4 scales in bfloat16, others in float32. So ModelOpt's
integers and the scales in a QuantizedWeight are the drafter's one definition, without rounding in between. Groups without a
weight above 2^-24 (ModelOpt's own threshold) get scale 1 and zeros.

Imports ModelOpt, which takes many seconds: import this module where it is used.
"""

import torch
from modelopt.torch.quantization.calib import BiasCalibrator, MaxCalibrator, MseCalibrator
from modelopt.torch.quantization.calib.calibrator import _Calibrator
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.tensor_quant import fake_tensor_quant
from torch import Tensor

from erollout.drafter.formats import Format
from erollout.drafter.int4_range import CLIP_RATIOS, TINIEST
from erollout.kernels.weights import WeightFormat

_INT4_BOUND = 7.0


def install_calibrators(quantizer: TensorQuantizer, format: Format) -> None:
    """Replace a weight quantizer's calibrators by those of its format."""
    axis = quantizer._calibrator._axis
    if format.asymmetric:
        bias = ZeroPointCalibrator()
        quantizer._bias_calibrator = bias
        quantizer._calibrator = ZeroPointRange(bias)
    elif format.search == "clip":
        quantizer._calibrator = ClipCalibrator(axis)
    else:
        quantizer._calibrator = RangeCalibrator(axis, format.weight)


class RangeCalibrator(MaxCalibrator):
    """The largest absolute weight of a group, row or tensor."""

    def __init__(self, axis: tuple[int, ...] | int | None, weight: WeightFormat) -> None:
        super().__init__(num_bits=None, axis=axis, unsigned=None)
        self._weight = weight

    def compute_amax(self) -> Tensor | None:
        """float32 ranges, in the shape of the quantizer's axis."""
        if self._calib_amax is None:
            return None
        amax = self._calib_amax.float()
        if self._weight == "int4":
            return on_grid(amax)
        return torch.where(amax <= TINIEST, _BOUNDS[self._weight], amax)


class ClipCalibrator(MseCalibrator):
    """The clipped range of each group with the least sum of importance * (weight - quantised weight)^2.

    `importance` is E[x_k^2] of the layer's input features, float32 [in_features]; None: uniform. ModelOpt's own search sums
    losses in float32; in float64 the sum does not depend on its order, so that kernels can agree with it.
    """

    importance: Tensor | None = None

    def __init__(self, axis: tuple[int, ...] | int | None) -> None:
        super().__init__(amax=None, axis=axis, quant_func=_fake_quantize, error_func=self._error)

    def collect(self, x: Tensor) -> None:
        self._initial_amax = x.float().abs().amax(-1, keepdim=True)
        super().collect(x)

    def _generate_candidates(self, device: torch.device) -> Tensor:
        return torch.tensor(CLIP_RATIOS, dtype=torch.float32, device=device)

    def _compute_candidate_amax(self, candidates: Tensor) -> Tensor:
        return on_grid(super()._compute_candidate_amax(candidates))

    def _error(self, x: Tensor, quantized: Tensor) -> Tensor:
        error = (x - quantized).double().square_()
        if self.importance is not None:
            error.view(-1, self.importance.numel()).mul_(self.importance.double())
        return error


class ZeroPointCalibrator(BiasCalibrator):
    """ModelOpt's affine bias, on the grid: minus an integer zero point in [-8, 7] times the scale; the range includes zero."""

    def __init__(self) -> None:
        super().__init__(method="max_min", axis=(-1,))
        self.scale: Tensor | None = None

    def collect(self, x: Tensor) -> None:
        wide = x.float()
        low, high = wide.amin(-1, keepdim=True).clamp_(max=0), wide.amax(-1, keepdim=True).clamp_(min=0)
        span = high - low
        scale = (span / 15).to(torch.bfloat16).float()
        self.scale = torch.where((span <= TINIEST) | (scale == 0), 1.0, scale)
        self._calib_bias = -(-8 - (low / self.scale).round_()).clamp_(-8, 7) * self.scale

    def reset(self) -> None:
        super().reset()
        self.scale = None


class ZeroPointRange(_Calibrator):
    """The range that belongs to a ZeroPointCalibrator, which sees the weights first."""

    def __init__(self, bias: ZeroPointCalibrator) -> None:
        super().__init__(num_bits=None, axis=None, unsigned=None)
        self._bias = bias

    def collect(self, x: Tensor) -> None:
        pass

    def compute_amax(self) -> Tensor | None:
        return None if self._bias.scale is None else self._bias.scale * _INT4_BOUND

    def reset(self) -> None:
        self._bias.reset()


def on_grid(amax: Tensor) -> Tensor:
    """The int4 range nearest to `amax` whose scale is a bfloat16 number."""
    scale = (amax / _INT4_BOUND).to(torch.bfloat16).float()
    return torch.where((amax <= TINIEST) | (scale == 0), 1.0, scale) * _INT4_BOUND


def _fake_quantize(x: Tensor, amax: Tensor) -> Tensor:
    return fake_tensor_quant(x, amax, None, 4, False, False)


_BOUNDS = {"int8": 127.0, "fp8": 448.0}
