"""Gathering the distributed optimizer's state for a checkpoint that can be resumed under another layout."""

from .patch import FunctionEdit, SourcePatch

DISTRIBUTED_OPTIMIZER_GATHER = SourcePatch(
    name="distributed_optimizer_gather",
    why="shards of the optimizer's state are moved by `.cuda()` before they are gathered over the data-parallel group",
    edits=(
        FunctionEdit(
            "megatron.core.optimizer.distrib_optimizer",
            "DistributedOptimizer.get_parameter_state_dp_zero",
            # device_proxy makes current_device() the CPU
            (("send_tensor = send_tensor.cuda()", "send_tensor = send_tensor.to(torch.cuda.current_device())"),),
        ),
    ),
)
