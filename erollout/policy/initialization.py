"""Initial weights of a run: read, or random and equal under every layout.

Each random logical tensor is drawn whole from its own generator, seeded by (seed, name), and a rank keeps its pieces, so
nothing depends on the layout, on the order of layers or on other tensors.
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from erollout.config import ModelConfig
from erollout.parallel.placement import Placement, Shape, box_slices
from erollout.policy.architecture import Architecture
from erollout.policy.hf_io import load_weights

INIT_STD = 0.02


def first_weights(
    tensors: Mapping[str, Tensor], architecture: Architecture, source: ModelConfig, placement: Placement, seed: int
) -> None:
    """Fill a rank's tensors (named as in `placement`) from `model.path`, or with random weights. Raises UserError."""
    if source.path is not None:
        load_weights(source.path, architecture, placement, tensors)
    else:
        initialize_weights(architecture, placement, tensors, seed)


def initialize_weights(architecture: Architecture, placement: Placement, tensors: Mapping[str, Tensor], seed: int) -> None:
    """Fill a rank's tensors (named as in `placement`, any floating dtype and device) with random weights; padding is zero."""
    shapes = architecture.logical_tensors()
    drawn: tuple[str, Tensor] | None = None
    with torch.no_grad():
        for local in placement:
            target = tensors[local.name].zero_()
            for piece in sorted(local.pieces, key=lambda piece: piece.tensor):
                if drawn is None or drawn[0] != piece.tensor:  # pieces of one tensor are adjacent, so it is drawn once
                    drawn = piece.tensor, initial_tensor(piece.tensor, shapes[piece.tensor], architecture.num_layers, seed)
                target[box_slices(piece.local_start, piece.shape)].copy_(drawn[1][box_slices(piece.start, piece.shape)])


def initial_tensor(name: str, shape: Shape, num_layers: int, seed: int) -> Tensor:
    """A logical tensor's initial value, float32 on the CPU.

    Norms are 1, biases 0, weights normal(0, 0.02); projections that write into the residual stream are smaller by sqrt(2 x
    layers), so that its variance does not grow with depth (GPT-2, section 2.3).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    std = INIT_STD / math.sqrt(2 * num_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(_tensor_seed(seed, name)))


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big", signed=True)
