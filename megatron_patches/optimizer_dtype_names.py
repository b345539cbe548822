"""Dtypes compared as dtypes, where Megatron compares the names of CUDA tensor types."""

from .patch import FunctionEdit, SourcePatch

_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"


def _is_half(tensor: str) -> tuple[str, str]:
    return (
        f"{tensor}.type() in ['torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor']",
        f"{tensor}.dtype in [torch.float16, torch.bfloat16]",
    )


def _is_float(tensor: str) -> tuple[str, str]:
    return f"{tensor}.type() == 'torch.cuda.FloatTensor'", f"{tensor}.dtype == torch.float32"


OPTIMIZER_DTYPE_NAMES = SourcePatch(
    name="optimizer_dtype_names",
    why="the optimizers tell fp32 from half precision parameters by names such as 'torch.cuda.FloatTensor', "
    "which CPU tensors never have",
    edits=(
        FunctionEdit("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32", (_is_float("param.grad"),)),
        FunctionEdit(
            "megatron.core.optimizer.optimizer",
            "Float16OptimizerWithFloat16Params.__init__",
            (_is_half("param"), _is_float("param")),
        ),
        FunctionEdit(_DISTRIBUTED, "DistributedOptimizer.__init__", (_is_half("param"),)),
        FunctionEdit(
            _DISTRIBUTED,
            "DistributedOptimizer._build_model_and_main_param_groups",
            (_is_half("model_param"), _is_float("model_param")),
        ),
    ),
)
