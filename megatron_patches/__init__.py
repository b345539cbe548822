"""Patches that let the unmodified megatron-core wheel train on CPU and gloo, one file each.

Without effect where CUDA is available, except for upstream bugs that hold there as well, and for what is unpickled.
"""

from .local_rms_norm import LocalRMSNorm
from .registry import AppliedPatch, PatchReport, apply_all

__all__ = ["AppliedPatch", "LocalRMSNorm", "PatchReport", "apply_all"]
