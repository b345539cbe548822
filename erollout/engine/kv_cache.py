"""KV cache: tensors of the block pool, with keys and values of all layers, released while the engine sleeps."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from erollout.config import RolloutConfig
from erollout.engine.block_manager import BlockCopy
from erollout.errors import UserError
from erollout.policy.architecture import Architecture


class KVCache:
    """Keys and values of one rank's heads, [layers, 2 x kv_heads, blocks, block_size, head_size]: key heads, then value heads.

    One block lies beyond the pool: `null_block` is never written and holds zeros.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensor_parallel_size: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.null_block = num_blocks
        self.dtype = dtype
        self.device = device
        heads = architecture.num_query_groups // tensor_parallel_size
        self._shape = (architecture.num_layers, 2 * heads, num_blocks + 1, block_size, architecture.kv_channels)
        self._pool: Tensor | None = None

    @property
    def is_allocated(self) -> bool:
        return self._pool is not None

    def allocate(self) -> None:
        """Allocate the memory, zeroed, unless it is allocated."""
        if self._pool is None:
            self._pool = _zeros(self._shape, self.dtype, self.device)

    def release(self) -> None:
        """Free the memory; its content is lost."""
        self._pool = None

    def layer(self, index: int) -> Tensor:
        """[2 x kv_heads, blocks, block_size, head_size] of one layer."""
        assert self._pool is not None, "the KV cache is released"
        return self._pool[index]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks in all layers, in order (a destination may be the source of a later copy)."""
        assert self._pool is not None, "the KV cache is released"
        for source, destination in copies:
            self._pool[:, :, destination] = self._pool[:, :, source]


def num_blocks(rollout: RolloutConfig, architecture: Architecture) -> int:
    """Number of blocks in one rank's pool: rollout.num_kv_blocks, or what fits in rollout.kv_cache_gib. Raises UserError."""
    if rollout.num_kv_blocks is not None:
        return rollout.num_kv_blocks
    blocks = int(rollout.kv_cache_gib * 2**30) // _block_bytes(rollout, architecture)
    if blocks < 1:
        raise UserError(f"rollout.kv_cache_gib = {rollout.kv_cache_gib} does not hold one block of keys and values; raise it")
    return blocks


def num_bytes(rollout: RolloutConfig, architecture: Architecture) -> int:
    """Size of one rank's pool in bytes. Raises UserError if it does not hold one block."""
    return num_blocks(rollout, architecture) * _block_bytes(rollout, architecture)


def _block_bytes(rollout: RolloutConfig, architecture: Architecture) -> int:
    values = 2 * architecture.num_layers * architecture.kv_size // rollout.tensor_model_parallel_size
    return values * (4 if rollout.dtype == "float32" else 2) * rollout.block_size


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU, memory is allocated only when written, in huge pages if the kernel grants them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = prod(shape) * torch.empty(0, dtype=dtype).element_size()
    try:
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
    except (MemoryError, ValueError):
        raise UserError(
            f"the KV cache of {size / 2**30:,.1f} GiB is more than this machine's memory; lower rollout.kv_cache_gib or "
            "rollout.num_kv_blocks"
        ) from None
