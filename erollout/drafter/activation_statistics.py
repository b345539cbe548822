"""Statistics of the linear layers' inputs over a few tokens of the last rollout, which weight the drafter's rounding errors.

No calibration set is needed: the tokens are the policy's own. Each rank measures the inputs of its own shards.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.linear import TorchLinear
from erollout.engine.model.model_runner import ModelRunner

_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Statistics of one layer's input on this rank."""

    mean_square: Tensor
    """float32 [in_features]: E[x_k^2]."""
    samples: Tensor | None
    """[rows, in_features]: a sample of the inputs, for searches that need more than means."""
    generation: int
    """Number of the collection: equal numbers mean equal statistics."""


@torch.no_grad()
def collect(
    target: DecodeModel,
    token_sequences: Iterable[Sequence[int]],
    max_tokens: int = 512,
    sample_rows: int = 0,
    generation: int = 0,
) -> dict[str, InputStatistics]:
    """Statistics of every linear layer's input while the target reads token sequences from their beginning.

    Collective over the target's replica, with equal sequences on its ranks. Uses the target's weights, but not its KV cache and
    packed kernels.

    Args:
        max_tokens: total number of tokens read; later sequences are cut or skipped.
        sample_rows: largest number of inputs kept as a sample.

    Returns: statistics by local layer name; empty if no sequence has enough tokens for a pass.
    """
    if max_tokens < 1:
        return {}
    recorders: dict[str, _Recorder] = {}

    def record(layer: str, weight: Tensor, bias: Tensor | None) -> _Recorder:
        linear = None if layer == "lm_head" else TorchLinear(weight, bias)
        recorders[layer] = _Recorder(linear, weight.shape[1], weight.device, sample_rows)
        return recorders[layer]

    runner = ModelRunner(_recording_model(target, max_tokens, record))
    left = max_tokens
    for tokens in token_sequences:
        read = list(tokens[:left])
        if read:
            runner.model.forward(runner.reading(read))
            left -= len(read)
    if left == max_tokens:
        return {}
    return {layer: recorder.statistics(generation) for layer, recorder in recorders.items()}


class _Recorder:
    """A linear layer that accumulates its inputs. The LM head's computes nothing, because its input is the last one needed."""

    def __init__(self, linear: TorchLinear | None, in_features: int, device: torch.device, sample_rows: int) -> None:
        self._linear = linear
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._rows = 0
        self._sample_rows = sample_rows
        self._samples: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self._squares += x.float().square().sum(0)
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
        return InputStatistics((self._squares / self._rows).float(), samples, generation)


def _recording_model(target: DecodeModel, max_tokens: int, record) -> DecodeModel:
    """A model with the target's tensors and torch's operators, and its own cache."""
    size = target.group.size() if target.group is not None else 1
    cache = KVCache(
        target.architecture, size, -(-max_tokens // _BLOCK_SIZE), _BLOCK_SIZE, target.dtype, target.embedding.device
    )
    cache.allocate()
    return DecodeModel(target.architecture, target.group, "torch", cache, max_tokens, target.tensors, record)
