"""The decode model: a lean pre-norm, rotary, grouped-query, SwiGLU decoder over a rank's local tensors.

Arithmetic and rounding follow transformers' Llama, Qwen2 and Qwen3 (norms in float32, rotation in the model's dtype), so that
the logits of both agree up to the order of summation. Tensor parallelism sums over the ranks after the embedding, o_proj and
down_proj; the logits stay cut by vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention import Attention, AttentionPlan, PagedAttention, QuerySpan
from erollout.engine.model.decode_layout import decode_placement
from erollout.engine.model.inputs import ForwardInputs
from erollout.engine.model.linear import LINEAR_KERNELS, Linear, LinearFactory
from erollout.engine.model.row_tiles import in_grains
from erollout.parallel.placement import Placement
from erollout.policy.architecture import Architecture
from erollout.policy.decoder import Layer
from erollout.policy.rotary import inverse_frequencies
from erollout.policy.shards import vocabulary_rows


class DecodeLayer:
    """One transformer block of one rank: its norms' weights and its linear layers, by the names of the layer's description."""

    def __init__(self, modules: Layer, tensors: dict[str, Tensor], prefix: str, make: LinearFactory, epsilon: float):
        self.norms: dict[str, Tensor] = {}
        self.linears: dict[str, Linear] = {}
        for module in modules:
            path = f"{prefix}.{module.decode}"
            weight = tensors[f"{path}.weight"]
            if module.is_linear:
                self.linears[module.decode] = make(path, weight, tensors.get(f"{path}.bias"))
            else:
                self.norms[module.decode] = weight
        self.epsilon = epsilon

    def normed(self, name: str, x: Tensor) -> Tensor:
        """The RMSNorm of this name over the last dimension of x."""
        return rms_norm(x, self.norms[name], self.epsilon)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """down(silu(gate) * up) of the normalised hidden states: this rank's part of the sum."""
        gate, up = self.linears["gate_up_proj"](self.normed("post_attention_norm", hidden)).chunk(2, dim=-1)
        in_grains(lambda rows: F.silu(rows, inplace=True), gate)
        return self.linears["down_proj"](gate * up)


class DecodeModel:
    """All layers of one rank, from torch operators around linear layers of any kernel.

    `tensors` are the destination of the reshard and keep their addresses.
    """

    def __init__(
        self,
        architecture: Architecture,
        group: dist.ProcessGroup | None,
        kernel: str,
        cache: KVCache,
        max_model_len: int,
        tensors: dict[str, Tensor] | None = None,
        linears: LinearFactory | None = None,
    ) -> None:
        """Args:
        group: the ranks of the replica; None: one rank.
        kernel: of the linear layers, as `resolve_linear_kernel` named it.
        cache: gives the model its dtype and device too.
        tensors: another model's tensors, to share (a drafter shares its target's); default: new ones, zeroed.
        linears: makes each linear layer from its local name ("layers.3.qkv_proj", "lm_head"), weight and bias; default: the
            kernel's own over the tensors. A NativeModel needs layers with a `struct`, as PackedLinear has.
        """
        dtype, device = cache.dtype, cache.device
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        self.architecture = architecture
        self.group = group if size > 1 else None
        self.cache = cache
        self.dtype = dtype
        self.tensors = tensors if tensors is not None else _zeros(decode_placement(architecture, size, rank), dtype, device)
        self.num_heads = architecture.num_attention_heads // size
        self.num_kv_heads = architecture.num_query_groups // size
        self.attention = self._make_attention()
        make = linears or _own_linears(kernel)
        layers = range(architecture.num_layers)
        self.layers = [
            DecodeLayer(architecture.layer, self.tensors, f"layers.{i}", make, architecture.norm_epsilon) for i in layers
        ]
        self.embedding = self.tensors["embed_tokens.weight"]
        self.norm = self.tensors["norm.weight"]
        self.lm_head = make("lm_head", self.tensors.get("lm_head.weight", self.embedding), None)
        self.vocab_start = rank * vocabulary_rows(architecture, size)
        self.cosine, self.sine = _rotation(architecture, max_model_len, dtype, device)
        self._finish()

    def _finish(self) -> None:
        """Set up what a subclass adds; called at the end of the construction."""

    def plan(self, spans: list[QuerySpan]) -> AttentionPlan:
        """The plan of a pass over these spans. `spans` is in token order, those of a single token first."""
        return self.attention.plan(spans)

    def prepare(self) -> None:
        """Derive the kernels' own forms of the weights."""
        for linear in self._linears():
            linear.prepare()

    def release(self) -> None:
        """Free what `prepare` derived."""
        for linear in self._linears():
            linear.release()

    def forward(self, inputs: ForwardInputs) -> Tensor:
        """Run new tokens through the model; their keys and values go into the cache.

        Returns: logits of this rank's part of the vocabulary, [rows, vocabulary rows per rank].
        """
        hidden = self._embed(inputs.token_ids)
        rotation = self.cosine.index_select(0, inputs.positions), self.sine.index_select(0, inputs.positions)
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, hidden, rotation, inputs.slots, self.cache.layer(index), inputs.plan)
            hidden = self._sum(layer.linears["o_proj"](attended)).add_(hidden)
            hidden = self._sum(layer.feed_forward(hidden)).add_(hidden)
        return self.lm_head(rms_norm(hidden.index_select(0, inputs.logit_rows), self.norm, self.architecture.norm_epsilon))

    def _make_attention(self) -> Attention:
        return PagedAttention(self.num_heads, self.cache, self.num_kv_heads, self.architecture.kv_channels)

    def _attend(
        self,
        layer: DecodeLayer,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """[tokens, num_heads x head_size], before o_proj."""
        head_size = self.architecture.kv_channels
        cosine, sine = rotation
        qkv = layer.linears["qkv_proj"](layer.normed("input_norm", hidden)).view(hidden.shape[0], -1, head_size)
        rotated = self.num_heads + self.num_kv_heads
        query_key = self._normed_heads(layer, qkv[:, :rotated])
        query_key = (query_key * cosine).add_(torch.roll(query_key, head_size // 2, -1).mul_(sine))
        flat = cache.view(cache.shape[0], -1, head_size)
        flat[: self.num_kv_heads].index_copy_(1, slots, query_key[:, self.num_heads :].transpose(0, 1))
        flat[self.num_kv_heads :].index_copy_(1, slots, qkv[:, rotated:].transpose(0, 1))
        return self.attention(query_key[:, : self.num_heads], cache, plan)

    def _normed_heads(self, layer: DecodeLayer, query_key: Tensor) -> Tensor:
        """Query heads, then key heads, [tokens, heads, head_size]: each normalised by itself, where the layer does so."""
        if "q_norm" not in layer.norms:
            return query_key
        query, key = query_key.split([self.num_heads, self.num_kv_heads], 1)
        return torch.cat((layer.normed("q_norm", query), layer.normed("k_norm", key)), 1)

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self.group is None:
            return self.embedding.index_select(0, token_ids)
        local = token_ids - self.vocab_start
        elsewhere = (local < 0) | (local >= self.embedding.shape[0])
        rows = self.embedding.index_select(0, local.masked_fill(elsewhere, 0))
        return self._sum(rows.masked_fill_(elsewhere[:, None], 0))

    def _sum(self, partial: Tensor) -> Tensor:
        """Sum over the ranks of the replica, in place."""
        if self.group is not None:
            sum_over_ranks(partial, self.group)
        return partial

    def _linears(self) -> list[Linear]:
        return [*(linear for layer in self.layers for linear in layer.linears.values()), self.lm_head]


def sum_over_ranks(partial: Tensor, group: dist.ProcessGroup) -> None:
    """Sum the ranks' tensors, in place. On the CPU an element's bits depend on its addends alone.

    gloo's all-reduce over more than two ranks sums in an order that depends on the element's place in the message, so that a
    row's result would depend on how many rows share the pass.
    """
    if partial.device.type != "cpu" or group.size() <= 2:
        dist.all_reduce(partial, group=group)
        return
    gathered = partial.new_empty(group.size() * partial.numel())
    dist.all_gather_single(gathered, partial.reshape(-1), group=group)
    first, *others = gathered.view(group.size(), *partial.shape).unbind()
    total = first.float()
    for other in others:
        total += other
    partial.copy_(total)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; statistics in float32, the product in x's dtype."""
    wide = x.float()
    scale = wide.pow(2).sum(-1, keepdim=True).div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def _zeros(placement: Placement, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {local.name: torch.zeros(local.shape, dtype=dtype, device=device) for local in placement}


def _own_linears(kernel: str) -> LinearFactory:
    make = LINEAR_KERNELS[kernel]
    return lambda _, weight, bias: make(weight, bias)


def _rotation(architecture: Architecture, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, [length, 1, head_size]; the sine's first half carries the rotation's minus sign."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(architecture))
    cosine = torch.cat((angles, angles), -1).cos()
    sine = torch.cat((-angles.sin(), angles.sin()), -1)
    return cosine.to(dtype).unsqueeze(1).to(device), sine.to(dtype).unsqueeze(1).to(device)
