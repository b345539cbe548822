"""Self-test of an engine's promise about bits, at its start, on its own shapes.

On a CPU a token's logits depend on its own sequence alone: not on neighbours, chunks or drafts. The kernels are designed so;
this verifies it on sums that cancel (row_tiles), whose every bit shows the order of summation. It takes milliseconds per shape.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention import Attention, PagedAttention, QuerySpan
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.linear import LINEAR_KERNELS
from erollout.engine.model.native_model import NativeAttention
from erollout.engine.model.row_tiles import cancelling
from erollout.errors import UserError
from erollout.kernels import native
from erollout.policy.architecture import Architecture

logger = logging.getLogger(__name__)

_ELEMENTS = 1 << 19
"""Largest number of elements of a tested weight: larger layers are tested with fewer outputs."""
_COMPANY = (2, 5, 17)
"""Numbers of rows in which a row is tested."""
_TOKENS = 140
"""Length of the sequence on which attention is tested: more than one chunk of keys."""
_PIECES = ((0, 1), (5, 7), (63, 64), (60, 77), (127, 128), (128, 129), (100, 140))
_NEIGHBOURS = tuple(range(3, _TOKENS, 8))
"""Positions of single tokens computed together, like those of decoding sequences."""

Shape = tuple[int, int, bool]
"""Outputs, inputs and whether there is a bias."""


@dataclass(frozen=True, slots=True)
class Promise:
    kernel: str
    """Name of the kernel and its instruction set."""
    broken: tuple[str, ...]
    """Operations whose bits depend on the other tokens of a pass; empty: the promise holds."""
    is_tried: bool = True
    """False on a GPU, whose libraries promise nothing: `coupled` then keeps the distribution, but not the tokens."""

    def __str__(self) -> str:
        if not self.broken:
            return f"{self.kernel}: a token's bits depend on its own sequence alone"
        return f"{self.kernel}: a token's bits depend on its company in {'; '.join(self.broken)}"

    def require_coupled(self) -> None:
        """Raise UserError if drafts would change the tokens, which coupled verification rules out."""
        if self.is_tried and self.broken:
            raise UserError(
                f"speculation.verification = coupled gives the tokens of decoding without drafts, but not here: {self} "
                f"({_processor()}); try another rollout.kernels, or set speculation.verification = rejection, which keeps "
                "their distribution"
            )


def promise_of(kernel: str, model: DecodeModel) -> Promise:
    """Test the promise of a model on this kernel, and log it, as a warning if it does not hold."""
    device = model.embedding.device
    if device.type != "cpu":
        promise = Promise(f"{kernel} on {device.type}", ("the products of a GPU's libraries",), is_tried=False)
        logger.info("%s: coupled verification draws from the target's distribution, not the same tokens", promise)
        return promise
    head = model.tensors.get("lm_head.weight", model.embedding)
    shapes: set[Shape] = {(head.shape[0], head.shape[1], False)}
    for name, tensor in model.tensors.items():
        if name.endswith("proj.weight"):
            shapes.add((tensor.shape[0], tensor.shape[1], name.replace(".weight", ".bias") in model.tensors))
    promise = _try_out(
        kernel, tuple(sorted(shapes)), _one_group(model), model.cache.block_size, model.dtype, torch.get_num_threads()
    )
    if promise.broken:
        advice = "samples may change with batch, preemption and speculation; try another rollout.kernels"
        logger.warning("%s (%s): %s", promise, _processor(), advice)
    else:
        logger.info("%s (tried on %d shapes of layers)", promise, len(shapes))
    return promise


@cache
def _try_out(
    kernel: str, shapes: tuple[Shape, ...], group: Architecture, block_size: int, dtype: torch.dtype, threads: int
) -> Promise:
    with torch.inference_mode():
        broken = [
            f"layers of {outputs} x {inputs}{' with a bias' if has_bias else ''}"
            for outputs, inputs, has_bias in shapes
            if not _linear_holds(kernel, outputs, inputs, has_bias, dtype)
        ]
        if not _attention_holds(kernel, group, block_size, dtype):
            broken.append(f"attention of {group.num_attention_heads} queries per KV head, head size {group.kv_channels}")
    level = native.level() if kernel == "native" else None
    name = f"{kernel} kernels, {str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}"
    return Promise(f"{name}, {level.name}" if level else name, tuple(broken))


def _linear_holds(kernel: str, outputs: int, inputs: int, has_bias: bool, dtype: torch.dtype) -> bool:
    x, weight = cancelling(max(_COMPANY), max(1, min(outputs, _ELEMENTS // inputs)), inputs, dtype)
    linear = LINEAR_KERNELS[kernel](weight, torch.zeros(weight.shape[0], dtype=dtype) if has_bias else None)
    linear.prepare()
    alone = torch.cat([linear(row[None]) for row in x])
    return all(torch.equal(linear(x[:n]), alone[:n]) and torch.equal(linear(x[-n:]), alone[-n:]) for n in _COMPANY)


def _attention_holds(kernel: str, group: Architecture, block_size: int, dtype: torch.dtype) -> bool:
    heads, size = group.num_attention_heads, group.kv_channels
    blocks = -(-_TOKENS // block_size)
    cache = KVCache(group, 1, blocks, block_size, dtype, torch.device("cpu"))
    cache.allocate()
    generator = torch.Generator().manual_seed(0)
    pool = cache.layer(0)[:, :blocks]
    pool.copy_(torch.randn(pool.shape, generator=generator))
    query = (2 * torch.randn(_TOKENS, heads, size, generator=generator)).to(dtype)
    make = NativeAttention if kernel == "native" else PagedAttention
    attention: Attention = make(heads, cache, 1, size)

    def run(*pieces: tuple[int, int]) -> Tensor:
        rows = torch.cat([query[start:end] for start, end in pieces])
        return attention(rows, cache.layer(0), attention.plan([QuerySpan(*piece, list(range(blocks))) for piece in pieces]))

    whole = run((0, _TOKENS))
    beside = run(*((position, position + 1) for position in _NEIGHBOURS))
    pieces_hold = all(torch.equal(run((start, end)), whole[start:end]) for start, end in _PIECES)
    return pieces_hold and torch.equal(beside, whole[list(_NEIGHBOURS)])


def _one_group(model: DecodeModel) -> Architecture:
    """An architecture with the queries of one KV head."""
    return replace(
        model.architecture, num_layers=1, num_query_groups=1, num_attention_heads=model.num_heads // model.num_kv_heads
    )


def _processor() -> str:
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return "processor with " + (
        ", ".join(name for name in wanted if name in native.processor_flags()) or "none of " + ", ".join(wanted)
    )
