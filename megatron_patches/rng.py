"""Megatron's named random states (one per tensor-parallel rank, forked around dropout) kept in the CPU generator."""

from .patch import FunctionEdit, SourcePatch

_MODULE = "megatron.core.tensor_parallel.random"

RNG = SourcePatch(
    name="rng",
    why="random states are restored by a callback that is queued until CUDA starts, which never happens without a GPU; "
    "and the tracker warns when the CPU generator moves inside a fork, which is the point here",
    edits=(
        FunctionEdit(_MODULE, "_set_cuda_rng_state", (("    _lazy_call(cb)\n", "    torch.set_rng_state(new_state)\n"),)),
        FunctionEdit(
            _MODULE,
            "CudaRNGStatesTracker.fork",
            (("if not torch.all(cpu_rng_state == torch.get_rng_state()).item():", "if False:"),),
        ),
    ),
)
