"""Export of a run's checkpoint as a Hugging Face directory, in this process."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from erollout.checkpoint.checkpointer import load_policy
from erollout.checkpoint.saved_policy import SavedPolicy, find_policy
from erollout.errors import UserError
from erollout.parallel.groups import initialize, shut_down
from erollout.policy.families import policy_architecture
from erollout.policy.hf_export import check_destination, export_policy

_ONE_PROCESS = (
    "parallel.world_size=1",
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "rollout.tensor_model_parallel_size=1",
)


def export(
    run: str | Path,
    out: str | Path,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    overrides: Sequence[str] = (),
) -> SavedPolicy:
    """Write a run's checkpoint as config.json, safetensors and tokenizer: `transformers` and other engines load it.

    The checkpoint may be of any layout. This process holds the whole model, in the dtype of its training.

    Args:
        run: `train.output_dir` of the run.
        out: directory to write, which is not there yet or is empty.
        step: steps that the policy has been trained for; default: the newest checkpoint.
        dtype: that of the written weights; default: `model.dtype` of the run.
        overrides: `key=value`; keys that differ from the run's, as `model.tokenizer=DIR` if it has moved.

    Returns: what was exported. Raises UserError.
    """
    saved, destination = find_policy(run, step, [*_ONE_PROCESS, *overrides]), Path(out).expanduser()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"--out = {out} is there and is not an empty directory; choose another one")
    config = saved.config
    check_destination(destination, Path(config.tokenizer_path))
    warnings.filterwarnings("ignore", module=r"megatron\.")
    context = initialize(config)
    try:
        tensors, _ = load_policy(saved, config, context)
        architecture = policy_architecture(config.model)
        export_policy(destination, architecture, context.train, tensors, dtype or config.model.dtype, config.tokenizer_path)
    finally:
        shut_down(context)
    return saved
