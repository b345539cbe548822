"""Placement of a model's logical tensors in the parameters of a decode rank. Pure.

The decode model has no pipeline: each rank of a replica holds its tensor-parallel shard of every layer, cut as the description
of the layer says (policy/decoder.py), with the parts of a fused matrix stacked whole: a rank's query heads, key heads and value
heads; gate over up. Embedding and LM head are cut by row, padded at the vocabulary's end.
"""

from erollout.parallel.placement import LocalTensor, Placement, whole
from erollout.policy.architecture import EMBEDDING, FINAL_NORM, OUTPUT, Architecture
from erollout.policy.shards import module_shards, vocabulary_shard


def decode_placement(architecture: Architecture, tensor: int, tensor_rank: int) -> Placement:
    """Every parameter of rank `tensor_rank` of a decode replica of `tensor` ranks, in the order of execution.

    Raises UserError if the heads, the query groups or the feed-forward size can't be divided evenly.
    """
    local: list[LocalTensor] = [vocabulary_shard("embed_tokens.weight", EMBEDDING, architecture, tensor, tensor_rank)]
    for layer in range(architecture.num_layers):
        for module in architecture.layer:
            local += module_shards(architecture, module, layer, f"layers.{layer}.{module.decode}", tensor, tensor_rank)
    local.append(whole("norm.weight", FINAL_NORM, (architecture.hidden_size,)))
    if not architecture.tie_word_embeddings:
        local.append(vocabulary_shard("lm_head.weight", OUTPUT, architecture, tensor, tensor_rank))
    return tuple(local)
