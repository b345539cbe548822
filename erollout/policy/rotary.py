"""Inverse frequencies of rotary embeddings, bit-equal to those of transformers, with and without Llama 3's scaling."""

import math

import torch
from torch import Tensor

from erollout.policy.architecture import Architecture, RopeScaling


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """Angle per position of each pair of a head's features: float32 [kv_channels / 2], on the CPU.

    Always computed on the CPU: an accelerator's pow() differs in the last bit.
    """
    size = architecture.kv_channels
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = 1.0 / (architecture.rotary_base**exponents)
    return _llama3(frequencies, architecture.rope_scaling) if architecture.rope_scaling else frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the slow frequencies by `factor`, keep the fast ones, blend linearly (in turns per context) in between."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    keep = (context / wavelengths - low) / (high - low)
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    slow, fast = wavelengths > context / low, wavelengths < context / high
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))
