"""The queue for reports of a checkpoint's writers."""

from .patch import FunctionEdit, SourcePatch, on_every_host

CHECKPOINT_RESULTS_QUEUE = SourcePatch(
    name="checkpoint_results_queue",
    why="every rank starts a manager process for one queue, which a synchronous save only uses inside the rank itself; the "
    "process outlives a rank that is killed, and starting it takes seconds",
    edits=(
        FunctionEdit(
            "megatron.core.dist_checkpointing.strategies.filesystem_async",
            "_get_write_results_queue",
            (("_results_queue = ctx.Manager().Queue()", "_results_queue = queue.Queue()"),),
        ),
    ),
    needed_on=on_every_host,
)
