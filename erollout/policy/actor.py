"""The policy in its training layout: log-probs and updates through Megatron's pipeline schedules."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn import Module

from erollout.config import Config
from erollout.parallel.groups import ParallelContext
from erollout.parallel.placement import Placement
from erollout.policy.architecture import Architecture
from erollout.policy.batch import MicroBatch, TrainSample, collate, cut_micro_batches
from erollout.policy.initialization import first_weights
from erollout.policy.integrity import require_equal_replicas
from erollout.policy.logprobs import VocabShard, logprobs_and_entropy, vocab_shard
from erollout.policy.model import build_model, local_tensors, transformer_config
from erollout.policy.optimizer import build_optimizer
from erollout.policy.training_layout import training_placement

logger = logging.getLogger(__name__)


class TokenLoss(Protocol):
    """Interface of an algorithm for updates."""

    metric_names: tuple[str, ...]

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]: ...


class Actor:
    """This rank's shard of the policy, its optimizer and, if needed, the frozen reference."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        context: ParallelContext,
        total_steps: int,
        with_reference: bool = False,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.context = context
        tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
        self.transformer = transformer_config(architecture, config.model, config.parallel, config.train.recompute_granularity)
        self.placement: Placement = training_placement(architecture, context.train, context.rank)
        self.module = self._load_model()
        self.reference = self._load_model().requires_grad_(False) if with_reference else None
        wrapped = Float16Module(self.transformer, self.module) if config.model.dtype == "bfloat16" else self.module
        self.model = DistributedDataParallel(
            self.transformer,
            DistributedDataParallelConfig(
                use_distributed_optimizer=config.optimizer.use_distributed_optimizer, grad_reduce_in_fp32=True
            ),
            wrapped,
        )
        self.optimizer, self.scheduler = build_optimizer(config.optimizer, self.model, total_steps)
        self.transformer.finalize_model_grads_func = finalize_model_grads
        self.transformer.grad_scale_func = self.optimizer.scale_loss

    @property
    def num_updates(self) -> int:
        """Number of updates, without skipped ones."""
        return int(self.scheduler.num_steps) - 1  # the schedule is one step ahead, see build_optimizer

    def local_tensors(self) -> dict[str, Tensor]:
        """The parameters by their names in the placement, for resharding and export."""
        return local_tensors(self.module)

    def sleep(self) -> None:
        """Free the gradient buffers' memory for the rollout."""
        self.model.offload_grad_buffers(synchronize=False, empty_cache=self.context.device.type == "cuda")

    def wake_up(self) -> None:
        self.model.restore_grad_buffers(synchronize=False)

    def compute_logprobs(self, samples: Sequence[TrainSample], reference: bool = False) -> list[list[float]]:
        """Log-probs of every response token of this data-parallel rank's samples, at the rollout's temperature.

        Args:
            samples: the same list on every rank of the model replica; may be empty.
            reference: use the reference instead of the policy.

        Returns:
            One list per sample, the same on every rank of the model replica.
        """
        if not samples:
            return []
        model = self.reference if reference else self.model
        assert model is not None, "built without a reference"
        batches = self._micro_batches(samples, [()] * len(samples))
        collected = self._run_schedule(model, batches, self._collect_logprobs, forward_only=True)
        return self._share_logprobs(samples, batches, collected)

    def update(
        self, samples: Sequence[TrainSample], weights: Sequence[Sequence[float]], algorithm: TokenLoss
    ) -> dict[str, float]:
        """Make one optimizer step. Returns the algorithm's metrics over the global batch, gradient norm and learning rate.

        A batch whose metrics or gradient are not finite changes nothing and counts as skipped.

        Args:
            samples: this data-parallel rank's share, the same on every rank of the model replica.
            weights: of each sample one per response id: its share in the loss of the whole global batch.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = self._micro_batches(samples, weights)
        # The schedule divides by the number of micro-batches and the gradient reduction by the data-parallel size.
        scale = len(batches) * self.context.train.data
        collected = self._run_schedule(self.model, batches, partial(self._weighted_loss, algorithm, scale), forward_only=False)
        metrics = self._sum_metrics(algorithm.metric_names, collected)
        metrics["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        if not (all(map(math.isfinite, metrics.values())) and self._gradient_is_finite()):  # equal on all ranks, so all skip
            logger.warning("update skipped: %s", metrics)
            return metrics | {"grad_norm": math.nan, "update_skipped": 1.0}
        succeeded, grad_norm, _ = self.optimizer.step()
        if succeeded:
            self.scheduler.step(1)
        return metrics | {"grad_norm": float(grad_norm or 0.0), "update_skipped": float(not succeeded)}

    def require_equal_replicas(self, step: int) -> None:
        """Raise UserError if data-parallel ranks hold different parameters after `step` steps. Collective."""
        require_equal_replicas(self.local_tensors(), step)

    def _gradient_is_finite(self) -> bool:
        """Whether the gradient is finite on all ranks: otherwise a step would leave no weight finite."""
        buffers = [*self.model.buffers, *self.model.expert_parallel_buffers]
        finite = torch.stack([buffer.grad_data.norm() for buffer in buffers]).isfinite().all()
        wrong = (~finite).float()
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        return not wrong.item()

    def _load_model(self) -> Module:
        model = build_model(self.architecture, self.transformer).to(self.context.device)
        first_weights(local_tensors(model), self.architecture, self.config.model, self.placement, self.config.train.seed)
        return model

    def _micro_batches(self, samples: Sequence[TrainSample], weights: Sequence[Sequence[float]]) -> list[MicroBatch]:
        multiple = self.context.train.tensor if self.config.parallel.sequence_parallel else 1
        groups = cut_micro_batches([sample.length for sample in samples], self.config.train.max_tokens_per_micro_batch)
        return [collate(samples, group, weights, multiple) for group in groups]

    def _run_schedule(
        self, model: Module, batches: list[MicroBatch], loss: Callable[[MicroBatch, Tensor], Any], forward_only: bool
    ) -> list[Any]:
        """Results of `loss` per micro-batch, on the last pipeline stage; empty on the others."""

        def forward_step(iterator: Iterator[MicroBatch], stage: Module) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(iterator)
            device = self.context.device
            # Whole logits in float32 would undo the chunking of logprobs_and_entropy, which converts a chunk at a time.
            options = {"fp32_output": False} if isinstance(getattr(stage, "module", None), Float16Module) else {}
            output = stage(batch.tokens.to(device), batch.position_ids.to(device), None, **options)

            def loss_function(logits: Tensor, non_loss_data: bool = False) -> Any:
                return loss(batch, logits)

            return output, loss_function

        run = get_forward_backward_func()
        with torch.set_grad_enabled(not forward_only):
            return run(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=model,
                num_microbatches=len(batches),
                seq_length=batches[0].tokens.shape[1],  # length of the first one: shapes are sent with the activations
                micro_batch_size=batches[0].tokens.shape[0],
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _logprobs(self, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        temperature = self.config.rollout.temperature or 1.0
        return logprobs_and_entropy(logits, batch.labels.to(logits.device), self._vocab_shard(logits), temperature)

    def _vocab_shard(self, logits: Tensor) -> VocabShard:
        group = parallel_state.get_tensor_model_parallel_group()
        return vocab_shard(group, self.architecture.vocab_size, logits.shape[-1])

    def _collect_logprobs(self, batch: MicroBatch, logits: Tensor) -> Tensor:
        return self._logprobs(batch, logits)[0]

    def _weighted_loss(self, algorithm: TokenLoss, scale: int, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(loss for the schedule, the weighted sum of every metric [metrics])."""
        logprobs, entropy = self._logprobs(batch, logits)
        losses, report = algorithm.token_loss(logprobs, entropy, batch_to(batch, logits.device))
        weights = batch.weights.to(logits.device)
        sums = torch.stack([(report[name].detach() * weights).sum() for name in algorithm.metric_names])
        return (losses * weights).sum() * scale, sums

    def _share_logprobs(
        self, samples: Sequence[TrainSample], batches: list[MicroBatch], collected: list[Tensor]
    ) -> list[list[float]]:
        """Send log-probs from the last pipeline stage to all stages, and split them into samples."""
        lengths = [len(sample.response_ids) for sample in samples]
        flat = torch.zeros(sum(lengths), device=self.context.device)
        order = [index for batch in batches for index in batch.indices]
        if collected:
            parts = [lp[batch.responses.to(lp.device)] for batch, lp in zip(batches, collected, strict=True)]
            flat.copy_(torch.cat(parts))
        if self.context.train.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(flat, last, group=parallel_state.get_pipeline_model_parallel_group())
        result: list[list[float]] = [[] for _ in samples]
        for index, part in zip(order, flat.cpu().split([lengths[i] for i in order]), strict=True):
            result[index] = part.tolist()
        return result

    def _sum_metrics(self, names: tuple[str, ...], collected: list[Tensor]) -> dict[str, float]:
        """Weighted sums over all micro-batches and data-parallel ranks, the same on every rank."""
        total = torch.zeros(len(names), device=self.context.device)
        if self.context.is_replica_leader:
            total += torch.stack(collected).sum(0)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))


def batch_to(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with the tensors that a loss reads on `device`."""
    moved = {name: getattr(batch, name).to(device) for name in MicroBatch.__slots__ if name != "indices"}
    return MicroBatch(indices=batch.indices, **moved)
