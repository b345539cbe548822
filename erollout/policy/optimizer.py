"""Megatron's Adam and its learning-rate schedule from our configuration."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import Module

from erollout.config import OptimizerConfig

_CONFIGURED = ("max_lr", "min_lr", "betas", "eps")
"""Configured options of a parameter group; learning rate and weight decay follow from the schedule."""


def build_optimizer(
    options: OptimizerConfig, model: Module, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer and schedule for a DistributedDataParallel-wrapped model; one schedule unit is one optimizer step."""
    dtype = next(model.parameters()).dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            use_distributed_optimizer=options.use_distributed_optimizer,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_steps,
        lr_decay_steps=max(total_steps, options.lr_warmup_steps + 1),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=max(1, total_steps),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    scheduler.step(1)  # the schedule gives step k the rate of k - 1: without this, warm-up would begin with a rate of 0
    return optimizer, scheduler


def restore_optimizer(
    optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, state: Mapping[str, Any] | None, schedule: dict[str, Any]
) -> None:
    """Resume from a checkpoint with the hyper-parameters of this configuration: Megatron would take the saved ones.

    Args:
        state: state of the optimizer; None: no update has been made.
        schedule: state of the scheduler, of which only the number of updates is used.
    """
    ours = [{name: group[name] for name in _CONFIGURED if name in group} for group in optimizer.param_groups]
    if state is None:
        optimizer.reload_model_params()
    else:
        optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, ours, strict=True):
        group.update(values)
    scheduler.num_steps = 0  # load_state_dict adds the saved count to it
    scheduler.load_state_dict(schedule)  # and sets the groups' rate and weight decay
