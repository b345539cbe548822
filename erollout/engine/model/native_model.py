"""The decode model in one native call: norms, rotation, KV write, attention and residuals around the packed linear layers.

Only the embedding and the sums over the ranks stay in torch, under tensor parallelism. Rounding is that of the torch model, so
that the logits of both agree up to the order of summation, with two exceptions, both more exact: attention scores and
sums stay in float32 (torch rounds each chunk's scores and output to bfloat16), and the attention weights are summed up as
rounded, as they are multiplied with the values.
"""

import ctypes
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention import Attention, AttentionPlan, QuerySpan
from erollout.engine.model.decode_model import DecodeLayer, DecodeModel
from erollout.engine.model.inputs import ForwardInputs
from erollout.kernels import native
from erollout.policy.families import FAMILIES

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_CHECKED = ("token_ids", "positions", "slots", "logit_rows")
"""Names of the values returned by erollout_check_pass, from 1 on."""


class ShapeStruct(ctypes.Structure):
    """`AttentionShape` of attention.h."""

    _fields_ = tuple((name, _INT64) for name in ("heads", "kv_heads", "head_size", "block_size", "cache_blocks"))


class LayerStruct(ctypes.Structure):
    """`Layer` of model.h: all modules that a family's layer may have; null if the model's layer lacks one."""

    _fields_ = tuple(
        (name, _POINTER) for name in dict.fromkeys(module.decode for family in FAMILIES.values() for module in family.layer)
    )


class ModelStruct(ctypes.Structure):
    """`Model` of model.h."""

    _fields_ = (
        ("shape", ShapeStruct),
        *((name, _INT64) for name in ("num_layers", "hidden_size", "ffn_size", "vocabulary", "max_positions")),
        *((name, _POINTER) for name in ("embedding", "norm", "cosine", "sine", "lm_head", "layers")),
        ("epsilon", ctypes.c_float),
    )


class PassStruct(ctypes.Structure):
    """`Pass` of model.h."""

    _fields_ = (
        *((name, _INT64) for name in ("tokens", "num_spans", "num_logits")),
        *((name, _POINTER) for name in ("token_ids", "positions", "slots", "logit_rows", "spans", "tables")),
        *((name, _POINTER) for name in ("cache", "hidden", "partial", "logits", "workspace")),
    )


@dataclass(frozen=True, slots=True)
class SpanPlan(AttentionPlan):
    """A plan that holds the spans of a pass unchanged."""

    spans: array
    """int64 [spans, 4]: first row, first position, tokens, where the block table begins in `tables`."""
    tables: array
    """int32: the concatenated block tables."""

    def write_to(self, work: PassStruct) -> None:
        """Write the plan, which must outlive the pass, to a pass structure."""
        work.num_spans = len(self.spans) // 4
        work.spans = self.spans.buffer_info()[0]
        work.tables = self.tables.buffer_info()[0]


class NativeAttention(Attention):
    """Attention over the paged cache where it lies; a token's bits depend on its own sequence alone (see attention.h)."""

    def __init__(self, num_heads: int, cache: KVCache, num_kv_heads: int, head_size: int) -> None:
        self.shape = ShapeStruct(num_heads, num_kv_heads, head_size, cache.block_size, cache.null_block + 1)
        self._threads = native.threads(torch.get_num_threads())

    def plan(self, spans: list[QuerySpan]) -> SpanPlan:
        """`spans` is in token order."""
        flat, tables, row = array("q"), array("i"), 0
        for span in spans:
            flat.extend((row, span.start, span.end - span.start, len(tables)))
            tables.extend(span.block_table)
            row += span.end - span.start
        return SpanPlan(flat, tables)

    def __call__(self, query: Tensor, layer_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """See Attention."""
        assert isinstance(plan, SpanPlan) and query.is_contiguous()
        output = query.new_zeros(query.shape[0], self.shape.heads * self.shape.head_size)
        work = PassStruct(cache=layer_cache.data_ptr())
        plan.write_to(work)
        shape, passed = ctypes.addressof(self.shape), ctypes.addressof(work)
        native.library().erollout_attention(shape, passed, query.data_ptr(), output.shape[1], output.data_ptr(), self._threads)
        return output


class NativeModel(DecodeModel):
    """All layers of one rank in native code: bfloat16 on a CPU for which `native.why_unavailable()` is None."""

    def _finish(self) -> None:
        assert self.dtype == torch.bfloat16 and self.cache.device.type == "cpu", (self.dtype, self.cache.device)
        self._threads = native.threads(torch.get_num_threads())
        self._layer_structs = (LayerStruct * len(self.layers))(*(_layer_struct(layer) for layer in self.layers))
        self._struct = self._model_struct()
        self._address = ctypes.addressof(self._struct)
        self._buffers: Tensor | None = None

    def release(self) -> None:
        super().release()
        self._buffers = None

    def forward(self, inputs: ForwardInputs) -> Tensor:
        """As DecodeModel.forward; raises IndexError, before any work, for inputs that lie outside the model's tensors."""
        assert isinstance(inputs.plan, SpanPlan)
        read: dict[str, Tensor] = {name: getattr(inputs, name).contiguous() for name in _CHECKED}
        assert all(x.dtype == torch.int64 for x in read.values())
        tokens, rows = len(inputs.positions), len(inputs.logit_rows)
        logits = torch.empty(rows, self._vocabulary_of_head, dtype=self.dtype)
        hidden, partial, workspace = self._working_memory(max(tokens, rows))
        work = PassStruct(
            tokens=tokens,
            num_logits=rows,
            **{name: x.data_ptr() for name, x in read.items()},
            cache=self.cache.layer(0).data_ptr(),
            hidden=hidden.data_ptr(),
            partial=partial.data_ptr(),
            logits=logits.data_ptr(),
            workspace=workspace.data_ptr(),
        )
        inputs.plan.write_to(work)
        self._check(work)
        if self.group is None:
            native.library().erollout_forward(self._address, ctypes.addressof(work), self._threads)
        else:
            hidden[:tokens] = self._embed(read["token_ids"])
            self._forward_by_layer(work, hidden[:tokens], partial[:tokens])
        return logits

    def _make_attention(self) -> "NativeAttention":
        return NativeAttention(self.num_heads, self.cache, self.num_kv_heads, self.architecture.kv_channels)

    def _forward_by_layer(self, work: PassStruct, hidden: Tensor, partial: Tensor) -> None:
        """The blocks of each layer with the sums over the ranks between them."""
        address = ctypes.addressof(work)
        for index in range(self.architecture.num_layers):
            for block in (native.library().erollout_attention_block, native.library().erollout_feed_forward_block):
                block(self._address, index, address, self._threads)
                hidden += self._sum(partial)
        native.library().erollout_head(self._address, address, self._threads)

    def _check(self, work: PassStruct) -> None:
        whole_vocabulary = self.group is None
        if wrong := native.library().erollout_check_pass(self._address, ctypes.addressof(work), whole_vocabulary):
            raise IndexError(f"{_CHECKED[wrong - 1]} beyond the model's bounds")

    def _working_memory(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, partial, workspace) for `tokens` tokens, kept between passes until `release`."""
        size = tokens * self.architecture.hidden_size
        workspace = native.library().erollout_workspace_size(self._address, tokens)
        if self._buffers is None or self._buffers.shape[0] < 2 * size + workspace:
            self._buffers = torch.empty(2 * size + workspace, dtype=self.dtype)
        hidden, partial = self._buffers[: 2 * size].view(2, tokens, -1)
        return hidden, partial, self._buffers[2 * size :]

    @property
    def _vocabulary_of_head(self) -> int:
        return _struct_of(self.lm_head).out_features

    def _model_struct(self) -> ModelStruct:
        architecture = self.architecture
        return ModelStruct(
            shape=self._make_attention().shape,
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            ffn_size=_struct_of(self.layers[0].linears["down_proj"]).in_features,
            vocabulary=self.embedding.shape[0],
            max_positions=self.cosine.shape[0],
            embedding=self.embedding.data_ptr(),
            norm=self.norm.data_ptr(),
            cosine=self.cosine.data_ptr(),
            sine=self.sine.data_ptr(),
            lm_head=ctypes.addressof(_struct_of(self.lm_head)),
            layers=ctypes.addressof(self._layer_structs),
            epsilon=architecture.norm_epsilon,
        )


def _layer_struct(layer: DecodeLayer) -> LayerStruct:
    norms = {name: weight.data_ptr() for name, weight in layer.norms.items()}
    linears = {name: ctypes.addressof(_struct_of(linear)) for name, linear in layer.linears.items()}
    return LayerStruct(**norms, **linears)


def _struct_of(linear: object) -> native.LinearStruct:
    struct = getattr(linear, "struct", None)
    assert isinstance(struct, native.LinearStruct), f"{type(linear).__name__} is no native linear layer"
    return struct
