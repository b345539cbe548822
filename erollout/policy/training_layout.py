"""Placement of a model's logical tensors in the parameters of a training rank's GPTModel. Pure.

The local names are those of megatron-core's GPTModel.named_parameters() under its local layer specification. Tensor
parallelism cuts as the description of the layer says (decoder.py); pipeline parallelism cuts the layers evenly.
"""

from erollout.errors import UserError
from erollout.parallel.layout import TrainLayout
from erollout.parallel.placement import LocalTensor, Placement, whole
from erollout.policy.architecture import EMBEDDING, FINAL_NORM, OUTPUT, Architecture
from erollout.policy.decoder import Layer
from erollout.policy.shards import module_shards, vocabulary_rows, vocabulary_shard


def padded_vocab_size(architecture: Architecture, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return vocabulary_rows(architecture, tensor) * tensor


def layer_range(architecture: Architecture, layout: TrainLayout, stage: int) -> range:
    """The layers of a pipeline stage. Raises UserError if the stages can't hold equally many."""
    layers, stages = architecture.num_layers, layout.pipeline
    if layers % stages:
        raise UserError(
            f"parallel.pipeline_model_parallel_size = {stages} does not divide the model's {layers} layers; change it"
        )
    return range(stage * layers // stages, (stage + 1) * layers // stages)


def training_placement(architecture: Architecture, layout: TrainLayout, rank: int) -> Placement:
    """All parameters of `rank`'s GPTModel, in its order. Raises UserError if the layout does not divide the model."""
    tensor, _, stage = layout.coordinates(rank)
    first, last = stage == 0, stage == layout.pipeline - 1
    local: list[LocalTensor] = []
    if first:
        name = "embedding.word_embeddings.weight"
        local.append(vocabulary_shard(name, EMBEDDING, architecture, layout.tensor, tensor))
    for index, layer in enumerate(layer_range(architecture, layout, stage)):
        for module in _as_registered(architecture.layer):
            name = f"decoder.layers.{index}.{module.training}"
            local += module_shards(architecture, module, layer, name, layout.tensor, tensor, module.trained_by_unit)
    if last:
        local.append(whole("decoder.final_layernorm.weight", FINAL_NORM, (architecture.hidden_size,)))
    if last and not (first and architecture.tie_word_embeddings):
        logical = EMBEDDING if architecture.tie_word_embeddings else OUTPUT
        local.append(vocabulary_shard("output_layer.weight", logical, architecture, layout.tensor, tensor))
    return tuple(local)


def _as_registered(layer: Layer) -> Layer:
    """The layer in the order of named_parameters(): Attention registers its output projection before the rest."""
    first = {"input_layernorm": 0, "self_attention.linear_proj": 1}
    return tuple(sorted(layer, key=lambda module: first.get(module.training, 2)))
