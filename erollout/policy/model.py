"""The policy as megatron-core's GPTModel: its configuration, its modules and its first weights."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from erollout.config import ModelConfig, ParallelConfig
from erollout.errors import UserError
from erollout.megatron_patches import LocalRMSNorm
from erollout.policy.architecture import Architecture
from erollout.policy.rotary import inverse_frequencies
from erollout.policy.training_layout import padded_vocab_size


def transformer_config(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, recompute_granularity: str | None = None
) -> TransformerConfig:
    """Megatron's configuration of this architecture: no dropout, no fused kernels, sequences of any length.

    Raises UserError for sequence parallelism without tensor parallelism.
    """
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "parallel.sequence_parallel = true needs parallel.tensor_model_parallel_size > 1; raise it or unset the former"
        )
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    whole_layers = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute_granularity == "full" else {}
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        layernorm_epsilon=architecture.norm_epsilon,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.has("q_norm"),
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, for dense models too
        recompute_granularity=recompute_granularity,
        **whole_layers,
        **_NO_FUSIONS,
        **_NO_INITIALIZATION,
    )


def build_model(architecture: Architecture, config: TransformerConfig) -> GPTModel:
    """This rank's shard with arbitrary weights. Linear layers are on Megatron's current device, norms on torch's default one.

    Needs parallel_state and Megatron's random-number tracker (model_parallel_cuda_manual_seed) to be initialised. The model
    returns logits [batch, sequence, padded vocabulary / tensor-parallel size] on the last pipeline stage.
    """
    model = GPTModel(
        config,
        layer_specification(config),
        vocab_size=padded_vocab_size(architecture, config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
    )
    # Megatron's own Llama 3 scaling takes only the factor: the other three constants are fixed in its source.
    rotary = model.rotary_pos_emb
    rotary.inv_freq = inverse_frequencies(architecture).to(rotary.inv_freq.device)
    return model


def layer_specification(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The modules of a pipeline stage: megatron-core's own (`local`), on every device."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalRMSNorm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    layers = config.num_layers // config.pipeline_model_parallel_size
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=LocalRMSNorm)


def local_tensors(model: GPTModel) -> dict[str, Tensor]:
    """The shard's parameters by their names in training_placement(), without gradients."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _leave(_: Tensor) -> None:
    """An init method that does nothing, because the weights are loaded right after.

    Megatron's perform_initialization = False would also skip marking parameters as tensor-parallel, which gradient norms need.
    """


_NO_INITIALIZATION: dict[str, Any] = {
    "init_method": _leave,
    "output_layer_init_method": _leave,
    "embedding_init_method": _leave,
}

_NO_FUSIONS: dict[str, Any] = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}
