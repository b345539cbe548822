"""RMSNorm for Megatron's local (Transformer-Engine-free) layer spec, also under sequence parallelism.

A class for layer specs, not a patch. Megatron's own wrapper around torch norms rejects `sequence_parallel=True`: it can't tell
the gradient reduction that each tensor-parallel rank saw only its part of the sequence.
"""

from typing import Any

import torch

from erollout.errors import UserError


class LocalRMSNorm(torch.nn.RMSNorm):
    """[..., hidden_size] -> [..., hidden_size].

    The weight's gradient is summed over tensor-parallel ranks when they split the sequence.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        """`config` is a megatron.core TransformerConfig."""
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise UserError(
                f"LocalRMSNorm: normalization = {config.normalization!r} with layernorm_zero_centered_gamma = "
                f"{config.layernorm_zero_centered_gamma} is not plain RMSNorm; choose another norm in the layer spec"
            )
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # read by Megatron's finalize_model_grads
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
