"""Checkpoints of the distributed optimizer over torch.optim.AdamW: upstream bugs, on GPUs as well as on CPUs.

Megatron's own optimizer is FusedAdam, whose step count lies in the parameter group. torch.optim.AdamW keeps a `step` tensor per
parameter, and the branch for it (no Transformer Engine, no Apex) fails in three places.
"""

from .patch import FunctionEdit, Host, SourcePatch

_MODULE = "megatron.core.optimizer.distrib_optimizer"


def without_fused_adam(host: Host) -> bool:
    return not host.fused_adam_available


DISTRIBUTED_OPTIMIZER_CHECKPOINT = SourcePatch(
    name="distributed_optimizer_checkpoint",
    why="with torch.optim.AdamW a fresh distributed optimizer can't describe what it wants to load, a loaded one shares one "
    "step counter between all parameters, and restoring its state asks the checkpoint for a tensor that it never holds",
    edits=(
        FunctionEdit(  # an optimizer that has not stepped yet has no state to read the step from
            _MODULE,
            "DistributedOptimizer.state_dict",
            (
                (
                    'steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()]))\n',
                    'steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()])) or [0.0]\n',
                ),
            ),
        ),
        FunctionEdit(  # AdamW adds 1 to each parameter's tensor in place: a shared one would advance once per parameter
            _MODULE,
            "DistributedOptimizer.load_state_dict",
            (('s["step"] = step\n', 's["step"] = step.clone()\n'),),
        ),
        FunctionEdit(  # load_state_dict sets the step from the parameter groups
            _MODULE,
            "DistributedOptimizer._set_main_param_and_optimizer_states",
            (("for key in dst_tensors:\n", 'for key in dst_tensors.keys() - {"step"}:\n'),),
        ),
    ),
    needed_on=without_fused_adam,
)
