"""What the linear layers' inputs look like, from a few tokens of the last rollout: it weighs the drafter's rounding errors.

No calibration set: the tokens are the policy's own. Each rank measures the inputs of its own shards.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention import QuerySpan
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.linear import TorchLinear

_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of one layer's input on this rank."""

    mean_square: Tensor
    """float32 [in_features]: E[x_k^2]."""
    mean_absolute: Tensor
    """float32 [in_features]: E[|x_k|]."""
    samples: Tensor | None
    """[rows, in_features]: some of the inputs, for searches that need more than means."""
    generation: int
    """Counts the collections: equal numbers, equal statistics."""


@torch.no_grad()
def collect(
    target: DecodeModel,
    token_sequences: Iterable[Sequence[int]],
    max_tokens: int = 512,
    sample_rows: int = 0,
    generation: int = 0,
) -> dict[str, InputStatistics]:
    """Statistics of every linear layer's input while the target reads token sequences from their beginning.

    Collective over the target's replica, with equal sequences on its ranks. The target's weights are read as they are; its
    KV cache and packed kernels are not needed.

    Args:
        max_tokens: how many are read in all; later sequences are cut or left out.
        sample_rows: how many inputs are kept themselves, at most.

    Returns: by local layer name; empty when no sequence has tokens enough for a pass.
    """
    if max_tokens < 1:
        return {}
    recorders: dict[str, _Recorder] = {}

    def record(layer: str, weight: Tensor, bias: Tensor | None) -> _Recorder:
        linear = None if layer == "lm_head" else TorchLinear(weight, bias)
        recorders[layer] = _Recorder(linear, weight.shape[1], weight.device, sample_rows)
        return recorders[layer]

    model = _recording_model(target, max_tokens, record)
    left = max_tokens
    for tokens in token_sequences:
        read = list(tokens[:left])
        if read:
            _read(model, read)
            left -= len(read)
    if left == max_tokens:
        return {}
    return {layer: recorder.statistics(generation) for layer, recorder in recorders.items()}


class _Recorder:
    """A linear layer that adds up what it is given. The LM head's computes nothing: its input is the last that matters."""

    def __init__(self, linear: TorchLinear | None, in_features: int, device: torch.device, sample_rows: int) -> None:
        self._linear = linear
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._absolutes = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._rows = 0
        self._sample_rows = sample_rows
        self._samples: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        self._squares += wide.square().sum(0)
        self._absolutes += wide.abs().sum(0)
        self._rows += x.shape[0]
        kept = sum(sample.shape[0] for sample in self._samples)
        if kept < self._sample_rows:
            self._samples.append(x[: self._sample_rows - kept].clone())
        return self._linear(x) if self._linear is not None else x[:, :0]

    def prepare(self) -> None:
        pass

    def release(self) -> None:
        pass

    def statistics(self, generation: int) -> InputStatistics:
        samples = torch.cat(self._samples) if self._samples else None
        return InputStatistics(
            (self._squares / self._rows).float(), (self._absolutes / self._rows).float(), samples, generation
        )


def _recording_model(target: DecodeModel, max_tokens: int, record) -> DecodeModel:
    """The target's tensors and torch's operators, over a cache of its own."""
    size = target.group.size() if target.group is not None else 1
    cache = KVCache(
        target.architecture, size, -(-max_tokens // _BLOCK_SIZE), _BLOCK_SIZE, target.dtype, target.embedding.device
    )
    cache.allocate()
    return DecodeModel(
        target.architecture, target.group, "torch", cache, max_tokens, target.dtype, cache.device, target.tensors, record
    )


def _read(model: DecodeModel, tokens: list[int]) -> None:
    """One pass over a sequence; the cache's first blocks hold its keys and values."""
    device = model.cache.device
    positions = torch.arange(len(tokens), device=device)  # in blocks 0, 1, ...: slots are the positions
    blocks = list(range(-(-len(tokens) // _BLOCK_SIZE)))
    plan = model.plan([QuerySpan(0, len(tokens), blocks)])
    model.forward(torch.tensor(tokens, device=device), positions, positions, plan, positions)
