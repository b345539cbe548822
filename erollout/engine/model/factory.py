"""Construction of the decode model of a kernel."""

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.linear import LinearFactory
from erollout.engine.model.native_model import NativeModel
from erollout.policy.architecture import Architecture


def build_decode_model(
    kernel: str,
    architecture: Architecture,
    group: dist.ProcessGroup | None,
    cache: KVCache,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    tensors: dict[str, Tensor] | None = None,
    linears: LinearFactory | None = None,
) -> DecodeModel:
    """The decode model of a kernel that `resolve_linear_kernel` named.

    Args:
        group: the ranks of the replica; None: one rank.
        tensors: another model's tensors, to share (a drafter shares its target's); default: new ones, zeroed.
        linears: makes each linear layer from its local name ("layers.3.qkv_proj", "lm_head"), weight and bias; default: the
            kernel's own over the tensors. With the native kernel each must have a `struct`, as PackedLinear has.
    """
    model = NativeModel if kernel == "native" else DecodeModel
    return model(architecture, group, kernel, cache, max_model_len, dtype, device, tensors, linears)
