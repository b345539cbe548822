"""A tiny GPTModel trained with Megatron's own schedules, DDP and Adam, for tests that compare layouts.

Weights and gradients cross layouts by Megatron's description of its shards: a `Shard` is a key, an index into the whole tensor
and the values there. Every rank returns all it holds, replicas included.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

VOCABULARY, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 96, 16, 2, 4
_CHECKPOINT_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run the same training; data parallelism is what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    tied: bool = False
    distributed_optimizer: bool = False
    sequence_parallel: bool = False
    recompute: bool = False
    dropout: float = 0.0
    bf16: bool = False
    steps: int = 2
    first_step: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True, slots=True)
class Shard:
    key: str
    index: tuple[int | slice, ...]
    """Index of this shard in the whole tensor."""
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank saw."""

    losses: list[float]
    """Per step, mean over the global batch; empty on all but the last pipeline stage."""
    grad_norms: list[float]
    """Per step, before clipping."""
    gradients: list[Shard]
    """Gradients of the first step, before clipping, reduced over data-parallel ranks, in the parameters' dtype.

    With the distributed optimizer a rank's are complete only where it owns the optimizer's state.
    """
    weights: list[Shard]
    """After the last step."""


def whole(shards: list[Shard]) -> dict[str, np.ndarray]:
    """Full tensors from the shards of a model that one rank holds completely."""
    sizes: dict[str, list[int]] = {}
    for shard in shards:
        ends = [i + 1 if isinstance(i, int) else i.stop for i in shard.index]
        sizes[shard.key] = [max(a, b) for a, b in zip(sizes.get(shard.key, ends), ends, strict=True)]
    tensors = {key: np.full(size, np.nan, np.float32) for key, size in sizes.items()}
    for shard in shards:
        tensors[shard.key][shard.index] = shard.values
    return tensors


def build(case: Case, weights: dict[str, np.ndarray] | None) -> tuple[Any, Any, Any]:
    """(model, the model in Megatron's DDP, optimizer) on the current world; random weights when None are given."""
    from erollout.megatron_patches import apply_all

    apply_all()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(case.tensor, case.pipeline)
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = _config(case)
    model = _model(case, config)
    if weights is not None:
        for tensor in _sharded_tensors(model):
            tensor.data.detach().copy_(torch.from_numpy(np.asarray(weights[tensor.key][tensor.global_slice()])))
    return model, *_wrap(case, config, model)


def train(case: Case, weights: dict[str, np.ndarray] | None, resume: str | None = None, save: str | None = None) -> Outcome:
    """Train on the current world from `weights`, or from random ones; `resume` and `save` are checkpoint folders."""
    model, wrapped, optimizer = build(case, weights)
    if resume is not None:
        _load(model, optimizer, resume)
    losses, norms, gradients = [], [], []
    for step in range(case.first_step, case.first_step + case.steps):
        losses += _forward_backward(wrapped, optimizer, step)
        if step == case.first_step:
            gradients = _shards(model, {name: p.main_grad for name, p in model.named_parameters()})
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    outcome = Outcome(losses, norms, gradients, _shards(model, {}))
    if save is not None:
        _save(model, optimizer, save)
    return outcome


def _config(case: Case) -> Any:
    from megatron.core.transformer import TransformerConfig

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=case.dropout,
        hidden_dropout=case.dropout,
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        sequence_parallel=case.sequence_parallel,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=case.bf16,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(recompute if case.recompute else {}),
    )


def _layer_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from erollout.megatron_patches import LocalRMSNorm

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=LocalRMSNorm)


def _model(case: Case, config: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config,
        _layer_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=case.tied,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _wrap(case: Case, config: Any, model: Any) -> tuple[Any, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed_optimizer),
        Float16Module(config, model) if case.bf16 else model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.01,
            clip_grad=0.25,  # below the norms that occur
            bf16=case.bf16,
            params_dtype=case.dtype,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        [wrapped],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def _micro_batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels), each [MICRO_BATCH, SEQUENCE]."""
    tokens = torch.randint(VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(index))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _forward_step(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], model: Any) -> Any:
    tokens, labels = next(batches)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    token_losses = model(tokens, positions, None, labels=labels)  # [MICRO_BATCH, SEQUENCE] on the last stage

    def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return token_losses, mean_loss


def _forward_backward(wrapped: Any, optimizer: Any, step: int) -> list[float]:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    share = MICRO_BATCHES // replicas
    first = step * MICRO_BATCHES + replica * share
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    parts = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter([_micro_batch(first + i) for i in range(share)]),
        model=wrapped,
        num_microbatches=share,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    if not parts:
        return []
    loss = torch.stack([part["loss"] for part in parts]).mean()
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return [loss.item() / replicas]


def _sharded_tensors(model: Any) -> list[Any]:
    """Megatron's ShardedTensor of every parameter, its data a view of the parameter; gate and up come apart."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]


def _shards(model: Any, replaced: dict[str, torch.Tensor]) -> list[Shard]:
    """What this rank holds, with the parameters' values or those in `replaced`, by parameter name."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = replaced.get(name, parameter.data).to(
            parameter.dtype
        )  # another dtype would detach DDP's gradient hooks
    shards = [Shard(t.key, t.global_slice(), t.data.detach().float().numpy().copy()) for t in _sharded_tensors(model)]
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    return shards


def _save(model: Any, optimizer: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    state = model.sharded_state_dict()
    dist_checkpointing.save(
        {"model": state, "optimizer": optimizer.sharded_state_dict(state, metadata=_CHECKPOINT_FORMAT)}, folder
    )


def _load(model: Any, optimizer: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing

    state = model.sharded_state_dict()
    wanted = optimizer.sharded_state_dict(state, is_loading=True, metadata=_CHECKPOINT_FORMAT)
    loaded = dist_checkpointing.load({"model": state, "optimizer": wanted}, folder)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
