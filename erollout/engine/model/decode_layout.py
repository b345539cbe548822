"""Where a model's logical tensors lie in the parameters of a decode rank. Pure.

The decode model has no pipeline: each rank of a replica holds its tensor-parallel shard of every layer. Attention is cut by
query group, with a rank's query heads, key heads and value heads stacked; the feed-forward network by column, gate over up.
Embedding and LM head are cut by row: ceil(vocabulary / tensor) rows per rank, padded at the vocabulary's end.
"""

from collections.abc import Iterator

from erollout.errors import UserError
from erollout.parallel.layout import even_slice
from erollout.parallel.placement import LocalTensor, Piece, Placement, Shape, padded, stacked, whole
from erollout.policy.architecture import Architecture


def decode_placement(architecture: Architecture, tensor: int, tensor_rank: int) -> Placement:
    """Every parameter of rank `tensor_rank` of a decode replica of `tensor` ranks, in the order of execution.

    Raises UserError when the heads, the query groups or the feed-forward size can't be cut evenly.
    """
    return (
        _vocabulary_rows("embed_tokens.weight", "model.embed_tokens.weight", architecture, tensor, tensor_rank),
        *(local for layer in range(architecture.num_layers) for local in _layer(architecture, layer, tensor, tensor_rank)),
        whole("norm.weight", "model.norm.weight", (architecture.hidden_size,)),
        *(
            ()
            if architecture.tie_word_embeddings
            else (_vocabulary_rows("lm_head.weight", "lm_head.weight", architecture, tensor, tensor_rank),)
        ),
    )


def vocabulary_rows_per_rank(architecture: Architecture, tensor: int) -> int:
    """Rows of the embedding and of the LM head on every rank, padding included."""
    return -(-architecture.vocab_size // tensor)


def _layer(architecture: Architecture, layer: int, tensor: int, tensor_rank: int) -> Iterator[LocalTensor]:
    hidden = architecture.hidden_size
    logical, local = f"model.layers.{layer}", f"layers.{layer}"
    heads = _query_rows(architecture, tensor, tensor_rank)
    columns = even_slice(architecture.ffn_hidden_size, tensor, tensor_rank, "model ffn_hidden_size")
    yield whole(f"{local}.input_norm.weight", f"{logical}.input_layernorm.weight", (hidden,))
    yield _qkv(architecture, layer, tensor, tensor_rank, "weight", (hidden,))
    if architecture.add_qkv_bias:
        yield _qkv(architecture, layer, tensor, tensor_rank, "bias", ())
    yield _columns(f"{local}.o_proj.weight", f"{logical}.self_attn.o_proj.weight", hidden, heads)
    yield whole(f"{local}.post_attention_norm.weight", f"{logical}.post_attention_layernorm.weight", (hidden,))
    yield stacked(
        f"{local}.gate_up_proj.weight",
        [(f"{logical}.mlp.{name}_proj.weight", (columns[0], 0), (columns[1] - columns[0], hidden)) for name in ("gate", "up")],
    )
    yield _columns(f"{local}.down_proj.weight", f"{logical}.mlp.down_proj.weight", hidden, columns)


def _query_rows(architecture: Architecture, tensor: int, tensor_rank: int) -> tuple[int, int]:
    """[start, end) of a rank's rows of q_proj."""
    if architecture.num_attention_heads % architecture.num_query_groups:
        raise UserError(
            f"model num_attention_heads = {architecture.num_attention_heads} is not a multiple of "
            f"num_query_groups = {architecture.num_query_groups}; choose sizes where it is"
        )
    start, end = even_slice(architecture.num_attention_heads, tensor, tensor_rank, "model num_attention_heads")
    return start * architecture.kv_channels, end * architecture.kv_channels


def _kv_rows(architecture: Architecture, tensor: int, tensor_rank: int) -> tuple[int, int]:
    """[start, end) of a rank's rows of k_proj and v_proj."""
    start, end = even_slice(architecture.num_query_groups, tensor, tensor_rank, "model num_query_groups")
    return start * architecture.kv_channels, end * architecture.kv_channels


def _qkv(architecture: Architecture, layer: int, tensor: int, tensor_rank: int, kind: str, columns: Shape) -> LocalTensor:
    """[local query heads; local key heads; local value heads], as weight ([rows, hidden]) or bias ([rows])."""
    zero = (0,) * len(columns)
    queries = _query_rows(architecture, tensor, tensor_rank)
    keys = _kv_rows(architecture, tensor, tensor_rank)
    return stacked(
        f"layers.{layer}.qkv_proj.{kind}",
        [
            (f"model.layers.{layer}.self_attn.{name}_proj.{kind}", (start, *zero), (end - start, *columns))
            for name, (start, end) in (("q", queries), ("k", keys), ("v", keys))
        ],
    )


def _columns(name: str, logical: str, rows: int, columns: tuple[int, int]) -> LocalTensor:
    """Columns [start, end) of a logical matrix."""
    shape = (rows, columns[1] - columns[0])
    return LocalTensor(name, shape, (Piece(logical, (0, columns[0]), shape, (0, 0)),))


def _vocabulary_rows(name: str, logical: str, architecture: Architecture, tensor: int, tensor_rank: int) -> LocalTensor:
    """A rank's share of the vocabulary; at its end there can be ranks that hold nothing but padding."""
    per_rank, hidden = vocabulary_rows_per_rank(architecture, tensor), architecture.hidden_size
    start = min(tensor_rank * per_rank, architecture.vocab_size)
    rows = min(per_rank, architecture.vocab_size - start)
    parts = [(logical, (start, 0), (rows, hidden))] if rows else []
    return padded(LocalTensor(name, (0, hidden), ()) if not parts else stacked(name, parts), per_rank)
