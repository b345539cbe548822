"""Registry of patches: all patches, selection of those that a process needs, and their application."""

import importlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from erollout.errors import UserError

from .checkpoint_results_queue import CHECKPOINT_RESULTS_QUEUE
from .device_proxy import DEVICE_PROXY
from .distributed_optimizer_checkpoint import DISTRIBUTED_OPTIMIZER_CHECKPOINT
from .distributed_optimizer_gather import DISTRIBUTED_OPTIMIZER_GATHER
from .optimizer_dtype_names import OPTIMIZER_DTYPE_NAMES
from .patch import TESTED_VERSIONS, Host, Patch
from .restricted_unpickling import RESTRICTED_UNPICKLING
from .rng import RNG
from .tied_embeddings import TIED_EMBEDDINGS

PATCHES: tuple[Patch, ...] = (
    DEVICE_PROXY,
    RNG,
    OPTIMIZER_DTYPE_NAMES,
    TIED_EMBEDDINGS,
    DISTRIBUTED_OPTIMIZER_GATHER,
    DISTRIBUTED_OPTIMIZER_CHECKPOINT,
    CHECKPOINT_RESULTS_QUEUE,
    RESTRICTED_UNPICKLING,
)


@dataclass(frozen=True, slots=True)
class AppliedPatch:
    name: str
    why: str
    locations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PatchReport:
    """Report of `apply_all` in this process."""

    version: str
    """Version of megatron-core."""
    applied: tuple[AppliedPatch, ...]
    not_needed: tuple[str, ...]

    def describe(self) -> str:
        """One line for the log."""
        applied = ", ".join(patch.name for patch in self.applied) or "none"
        not_needed = f" (not needed here: {', '.join(self.not_needed)})" if self.not_needed else ""
        return f"megatron-core {self.version}: patches applied: {applied}{not_needed}"


def installed_version() -> str:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"megatron-core is not installed; run pip install 'megatron-core{TESTED_VERSIONS}'") from None


def current_host() -> Host:
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    return Host(cuda_available=torch.cuda.is_available(), fused_adam_available=bool(optimizer.HAVE_APEX_OR_TE))


def require_tested(version: str, patches: Iterable[Patch] = PATCHES) -> None:
    """Raise UserError if a patch, needed here or not, was not tested with this release of megatron-core."""
    for patch in patches:
        if version not in patch.versions:
            raise UserError(
                f"megatron-core {version} is not a release that patch {patch.name} was tested with; "
                f"run pip install 'megatron-core{patch.versions}'"
            )


def select(patches: Iterable[Patch], host: Host) -> tuple[Patch, ...]:
    """The patches that `host` needs, in order."""
    return tuple(patch for patch in patches if patch.needs(host))


def apply_all() -> PatchReport:
    """Make the installed megatron-core usable on this host; call it once at start, before megatron.core is used.

    Idempotent. Raises UserError, and changes nothing, if the installed release or its source is not what the patches were
    written for.
    """
    version = installed_version()
    require_tested(version)  # before any import of megatron.core: an unknown release may not even import without a GPU
    needed = select(PATCHES, current_host())
    for patch in needed:
        patch.check(version)
    for patch in needed:
        patch.apply()
    return PatchReport(
        version=version,
        applied=tuple(AppliedPatch(patch.name, patch.why, patch.locations) for patch in needed),
        not_needed=tuple(patch.name for patch in PATCHES if patch not in needed),
    )
