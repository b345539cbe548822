"""Where a model's logical tensors lie in the parameters of a training rank's GPTModel. Pure.

The local names are those of megatron-core's GPTModel.named_parameters() under its local layer specification. Tensor
parallelism cuts attention by query group and the feed-forward network by column; pipeline parallelism cuts the layers evenly.
"""

from erollout.errors import UserError
from erollout.parallel.layout import TrainLayout, even_slice
from erollout.parallel.placement import LocalTensor, Piece, Placement, padded, stacked, whole
from erollout.policy.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


def padded_vocab_size(architecture: Architecture, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-architecture.vocab_size // tensor) * tensor


def layer_range(architecture: Architecture, layout: TrainLayout, stage: int) -> range:
    """The layers of a pipeline stage. Raises UserError when the stages can't hold equally many."""
    layers, stages = architecture.num_layers, layout.pipeline
    if layers % stages:
        raise UserError(
            f"parallel.pipeline_model_parallel_size = {stages} does not divide the model's {layers} layers; change it"
        )
    return range(stage * layers // stages, (stage + 1) * layers // stages)


def training_placement(architecture: Architecture, layout: TrainLayout, rank: int) -> Placement:
    """Every parameter of `rank`'s GPTModel, in its order. Raises UserError when the layout does not divide the model."""
    tensor, _, stage = layout.coordinates(rank)
    first, last = stage == 0, stage == layout.pipeline - 1
    local: list[LocalTensor] = []
    if first:
        local.append(_vocabulary_rows("embedding.word_embeddings.weight", EMBEDDING, architecture, layout.tensor, tensor))
    for index, layer in enumerate(layer_range(architecture, layout, stage)):
        local += _layer(architecture, layout.tensor, tensor, layer, f"decoder.layers.{index}")
    if last:
        local.append(whole("decoder.final_layernorm.weight", FINAL_NORM, (architecture.hidden_size,)))
    if last and not (first and architecture.tie_word_embeddings):
        logical = EMBEDDING if architecture.tie_word_embeddings else OUTPUT
        local.append(_vocabulary_rows("output_layer.weight", logical, architecture, layout.tensor, tensor))
    return tuple(local)


def _layer(architecture: Architecture, parts: int, part: int, layer: int, local: str) -> list[LocalTensor]:
    hidden = architecture.hidden_size
    logical = f"model.layers.{layer}"
    tensors = [
        whole(f"{local}.input_layernorm.weight", f"{logical}.input_layernorm.weight", (hidden,)),
        _columns(
            f"{local}.self_attention.linear_proj.weight",
            f"{logical}.self_attn.o_proj.weight",
            hidden,
            _queries(architecture, parts, part),
        ),
        _qkv(architecture, parts, part, logical, f"{local}.self_attention.linear_qkv", "weight"),
    ]
    if architecture.add_qkv_bias:
        tensors.append(_qkv(architecture, parts, part, logical, f"{local}.self_attention.linear_qkv", "bias"))
    start, end = even_slice(architecture.ffn_hidden_size, parts, part, "the model's feed-forward size")
    gate_up = [(f"{logical}.mlp.{name}_proj.weight", (start, 0), (end - start, hidden)) for name in ("gate", "up")]
    return [
        *tensors,
        whole(f"{local}.pre_mlp_layernorm.weight", f"{logical}.post_attention_layernorm.weight", (hidden,)),
        stacked(f"{local}.mlp.linear_fc1.weight", gate_up),
        _columns(f"{local}.mlp.linear_fc2.weight", f"{logical}.mlp.down_proj.weight", hidden, (start, end)),
    ]


def _query_groups(architecture: Architecture, parts: int, part: int) -> tuple[int, int]:
    groups, heads = architecture.num_query_groups, architecture.num_attention_heads
    if heads % groups:
        raise UserError(f"the model's {heads} attention heads are not a multiple of its {groups} key/value heads")
    return even_slice(groups, parts, part, "the model's number of key/value heads")


def _queries(architecture: Architecture, parts: int, part: int) -> tuple[int, int]:
    """[start, end) of the query features of a tensor-parallel rank."""
    start, end = _query_groups(architecture, parts, part)
    size = architecture.query_size // architecture.num_query_groups
    return start * size, end * size


def _qkv(architecture: Architecture, parts: int, part: int, logical: str, local: str, kind: str) -> LocalTensor:
    """Megatron's fused projection: for each query group its query heads, then its key, then its value."""
    head = architecture.kv_channels
    queries = architecture.query_size // architecture.num_query_groups
    rest = (architecture.hidden_size,) if kind == "weight" else ()
    zero = (0,) * len(rest)
    parts_of_groups = [
        (f"{logical}.self_attn.{name}_proj.{kind}", (group * rows, *zero), (rows, *rest))
        for group in range(*_query_groups(architecture, parts, part))
        for name, rows in (("q", queries), ("k", head), ("v", head))
    ]
    return stacked(f"{local}.{kind}", parts_of_groups)


def _columns(name: str, logical: str, rows: int, columns: tuple[int, int]) -> LocalTensor:
    """A slice along dimension 1: the weight of a row-parallel linear layer."""
    start, end = columns
    shape = (rows, end - start)
    return LocalTensor(name, shape, (Piece(logical, (0, start), shape, (0, 0)),))


def _vocabulary_rows(name: str, logical: str, architecture: Architecture, parts: int, part: int) -> LocalTensor:
    """A slice along the padded vocabulary; ranks at its end may hold little but padding."""
    rows = padded_vocab_size(architecture, parts) // parts
    start = min(part * rows, architecture.vocab_size)
    real = min((part + 1) * rows, architecture.vocab_size) - start
    if real == 0:
        return LocalTensor(name, (rows, architecture.hidden_size), ())
    return padded(stacked(name, [(logical, (start, 0), (real, architecture.hidden_size))]), rows)
