"""The drafter: the policy in fewer bits, requantised from the decode ranks' own shards at every policy update.

It shares the target's embedding, norms, biases and KV cache, and has its own linear layers, except for layers with format
`none` and, unless an int8 copy is configured, the LM head, which are the target's.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from erollout.drafter.activation_statistics import InputStatistics
from erollout.drafter.assignment import LM_HEAD, assign_formats, summary
from erollout.drafter.formats import check_shape
from erollout.drafter.linears import QuantizedLinear, Shard, TargetLinear, make_linear, resolve_matmul
from erollout.drafter.quantizer import build_quantizer
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.factory import model_class
from erollout.engine.model.linear import Linear
from erollout.engine.model.native_model import NativeModel
from erollout.engine.proposers.base import DraftRequest, Drafts, Proposer
from erollout.engine.proposers.proposer_set import RequantizeStats

logger = logging.getLogger(__name__)

_AWQ_ROWS = 64
"""Number of inputs per layer on which AWQ's search measures its losses."""


class Drafter:
    """A Proposer. At every policy update: `requantize_` for each tensor that arrived, then `complete`."""

    def __init__(
        self,
        target: DecodeModel,
        make_proposer: Callable[[DecodeModel], Proposer],
        max_model_len: int,
        *,
        format: str = "w4a16_clip",
        group_size: int = 128,
        lm_head: str = "target",
        overrides: Sequence[tuple[str, str]] = (),
        kernel: str = "auto",
        quantizer: str = "auto",
    ) -> None:
        """
        Args:
            target: the model whose tensors the reshard fills.
            make_proposer: makes the draft loop over a decode model.
            format: format of all layers but the LM head, see formats.py.
            group_size: input features per scale in int4 formats.
            lm_head: target | w8a8.
            overrides: (pattern, format) pairs, see assignment.py.
            kernel: auto | native | torch | prepacked, see linears.resolve_matmul.
            quantizer: auto | modelopt, see quantizer.build_quantizer.

        Raises UserError, naming layer, format and key, for an impossible combination.
        """
        self.policy_version: int | None = None
        self._targets = target_linears(target)
        self.formats = assign_formats(self._targets, format, overrides, lm_head)
        quantized = {layer: format for layer, format in self.formats.items() if format is not None}
        tensors = {layer: tensor_name(target, layer) for layer in quantized}
        weights = {layer: target.tensors[tensor] for layer, tensor in tensors.items()}
        self._layers = {tensor: layer for layer, tensor in tensors.items()}
        self.linears: dict[str, QuantizedLinear] = {}
        self.matmuls: dict[str, str] = {}
        for layer, weight in weights.items():
            rows, columns = weight.shape
            bias = target.tensors.get(f"{layer}.bias")
            shard = Shard(layer, rows, columns, bias, group_size, target.dtype, weight.device)
            check_shape(layer, quantized[layer], (rows, columns), group_size)
            self.matmuls[layer] = resolve_matmul(kernel, quantized[layer], shard)
            self.linears[layer] = make_linear(self.matmuls[layer], quantized[layer], shard)
        self._quantizer = build_quantizer(quantizer, weights, quantized, group_size)
        borrowed = {layer: TargetLinear(linear) for layer, linear in self._targets.items()}
        self.model = _share(target, max_model_len, {**borrowed, **self.linears})
        self._proposer = make_proposer(self.model)
        self._statistics: Mapping[str, InputStatistics] = {}
        self._missing = set(quantized)
        self._seconds = 0.0
        self._peak_bytes = 0
        served, kind = _counts(self.matmuls), type(self.model).__name__
        logger.info("drafter: %s; matmuls: %s in a %s (kernels = %s)", summary(self.formats), served, kind, kernel)
        if slow := sorted({quantized[layer].name for layer, matmul in self.matmuls.items() if matmul == "dequantized"}):
            logger.warning("drafter: %s has no matmul here and is dequantised: no faster than the target", ", ".join(slow))

    def use_statistics(self, statistics: Mapping[str, InputStatistics]) -> None:
        """Set the weights of errors in the next requantisation, by layer; layers without them are quantised unweighted."""
        self._statistics = dict(statistics)

    @property
    def sample_rows(self) -> int:
        """Number of inputs per layer that the formats need from `collect`."""
        return _AWQ_ROWS if any(format.search == "awq" for format in self.formats.values() if format is not None) else 0

    @property
    def needs_statistics(self) -> bool:
        return any(format.needs_statistics for format in self.formats.values() if format is not None)

    @torch.no_grad()
    def requantize_(self, tensor: str) -> None:
        """Quantise and pack the layer of a target tensor, in place; other tensors are shared.

        From the first call until `complete`, the drafter belongs to no policy version.
        """
        layer = self._layers.get(tensor)
        if layer is None:
            return
        self.policy_version = None
        start = time.perf_counter()
        self.linears[layer].pack_(self._quantizer.quantize(layer, self._statistics.get(layer)))
        self._seconds += time.perf_counter() - start
        self._peak_bytes = max(self._peak_bytes, self._quantizer.scratch_bytes(layer))
        self._missing.discard(layer)

    def complete(self, policy_version: int) -> RequantizeStats:
        """Complete the update once all tensors have arrived. Raises RuntimeError naming layers that were not requantised."""
        if self._missing:
            missing = ", ".join(sorted(self._missing))
            raise RuntimeError(f"the drafter of policy version {policy_version} is not complete: {missing} not requantised")
        stats = RequantizeStats(self._seconds, self._peak_bytes, self.buffer_bytes)
        self.policy_version = policy_version
        self._missing, self._seconds, self._peak_bytes = set(self._layers.values()), 0.0, 0
        return stats

    def require(self, policy_version: int) -> None:
        if self.policy_version != policy_version:
            mine = "is being requantised" if self.policy_version is None else f"is of policy version {self.policy_version}"
            raise RuntimeError(f"the drafter {mine}, but drafts for policy version {policy_version} are wanted")

    def propose(self, request: DraftRequest) -> Drafts:
        return self._proposer.propose(request)

    def sleep(self) -> None:
        self._proposer.sleep()

    @property
    def buffer_bytes(self) -> int:
        return sum(linear.nbytes for linear in self.linears.values())


def target_linears(target: DecodeModel) -> dict[str, Linear]:
    """The target's own linear layers by local name."""
    layers = enumerate(target.layers)
    return {f"layers.{i}.{name}": linear for i, layer in layers for name, linear in layer.linears.items()} | {
        LM_HEAD: target.lm_head
    }


def tensor_name(target: DecodeModel, layer: str) -> str:
    """Name of the target tensor that is a layer's weight: with tied embeddings, the LM head's is the embedding."""
    tied = layer == LM_HEAD and f"{LM_HEAD}.weight" not in target.tensors
    return "embed_tokens.weight" if tied else f"{layer}.weight"


def _share(target: DecodeModel, max_model_len: int, linears: Mapping[str, Linear]) -> DecodeModel:
    """A decode model over the target's tensors and KV cache with these linear layers; native if both target and layers are."""
    native = isinstance(target, NativeModel) and all(hasattr(linear, "struct") for linear in linears.values())
    kernel = "native" if native else "torch"
    return model_class(kernel)(
        *(target.architecture, target.group, kernel, target.cache, max_model_len, target.tensors),
        linears=lambda layer, weight, bias: linears[layer],
    )


def _counts(matmuls: Mapping[str, str]) -> str:
    names = list(matmuls.values())
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "the target's"
