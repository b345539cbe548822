"""Torch's device and its decode kernels. Loads torch when called."""

from collections.abc import Iterator

from erollout.doctor.report import Finding
from erollout.errors import UserError


def check_kernels(kernels: str = "auto", dtype: str = "bfloat16", num_gpus: int = 0) -> Iterator[Finding]:
    """Check device and kernels. `kernels`, `dtype`: rollout.kernels and rollout.dtype. `num_gpus`: GPUs shown by the driver."""
    import torch

    from erollout.engine.model.linear import resolve_linear_kernel

    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    if num_gpus and not has_cuda:
        text = f"torch {torch.__version__} uses none of the {num_gpus} GPUs: training would run on the CPU"
        yield Finding("device", text, "warning", "install torch's CUDA build of the pinned version, for this driver")
    else:
        yield Finding("device", f"{device.type} (torch {torch.__version__})")
    try:
        resolved = resolve_linear_kernel(kernels, getattr(torch, dtype), device)
        yield Finding("kernels", f"{resolved} (rollout.kernels = {kernels}, {dtype} on {device.type})")
    except UserError as error:
        yield Finding("kernels", str(error), "error")
    yield from _cuda_kernels(device) if has_cuda else _native_kernels()


def _native_kernels() -> Iterator[Finding]:
    from erollout.kernels import native

    reason = native.why_unavailable()
    if reason is None:
        yield Finding("native kernels", "built from these sources, and usable on this processor")
    else:
        yield Finding("native kernels", reason, "warning", "rollouts run without them, slower")


def _cuda_kernels(device: object) -> Iterator[Finding]:
    import torch

    from erollout.kernels import cuda

    assert isinstance(device, torch.device)
    reasons = {format: cuda.why_unavailable(format, device) for format in ("int4", "int8", "fp8")}
    runs = [format for format, reason in reasons.items() if reason is None]
    yield Finding("drafter kernels", ", ".join(runs) or "none")
    for reason in filter(None, reasons.values()):
        yield Finding("drafter kernels", reason, "warning", "choose another speculation.drafter.format")
