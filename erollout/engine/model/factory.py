"""The class of the decode model of a kernel."""

from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.native_model import NativeModel


def model_class(kernel: str) -> type[DecodeModel]:
    """The decode model for a kernel that `resolve_linear_kernel` named."""
    return NativeModel if kernel == "native" else DecodeModel
