"""The C interface of the native extension: every function that erollout/kernels/cpp exports, with its types.

A test compares the table with the C++ sources.
"""

import ctypes
from typing import Any

_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64

SIGNATURES: dict[str, tuple[Any, ...]] = {
    # fingerprint.cpp, threads.cpp
    "erollout_sources": (ctypes.c_char_p,),
    "erollout_threads_create": (_POINTER, _INT32),
    "erollout_threads_destroy": (None, _POINTER),
    # linear.cpp, pack.cpp
    "erollout_linear": (None, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT64, _POINTER),
    "erollout_linear_uses_tiles": (_INT32,),
    "erollout_linear_struct_bytes": (_INT64,),
    "erollout_linear_packed_bytes": (_INT64, _POINTER),
    "erollout_linear_pack_bf16": (None, _POINTER, _POINTER, _INT64, _POINTER, _POINTER),
    "erollout_linear_pack_int4": (None, *[_POINTER] * 6),
    "erollout_linear_pack_int8": (None, *[_POINTER] * 4),
    # quantize.cpp
    "erollout_quantize_int4": (
        *(_INT32, _POINTER, _INT32, _INT64, _INT64, _INT64),
        *(_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _POINTER),
    ),
    "erollout_quantize_int8": (_INT32, _POINTER, _INT32, _INT64, _INT64, _POINTER, _POINTER, _POINTER),
    # sampling.cpp
    "erollout_sample": (None, _POINTER, _POINTER),
    "erollout_sampling_job_bytes": (_INT64,),
    "erollout_block_noise": (None, _INT64, _INT64, _INT64, _POINTER),
    # model.cpp
    "erollout_model_size": (_INT64,),
    "erollout_layer_size": (_INT64,),
    "erollout_pass_size": (_INT64,),
    "erollout_workspace_size": (_INT64, _POINTER, _INT64),
    "erollout_check_pass": (_INT32, _POINTER, _POINTER, _INT32),
    "erollout_forward": (None, _POINTER, _POINTER, _POINTER),
    "erollout_attention_block": (None, _POINTER, _INT64, _POINTER, _POINTER),
    "erollout_feed_forward_block": (None, _POINTER, _INT64, _POINTER, _POINTER),
    "erollout_head": (None, _POINTER, _POINTER, _POINTER),
    "erollout_exp2": (None, _POINTER, _POINTER, _INT64),
    "erollout_attention": (None, _POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER),
}
"""Result and arguments of each function."""


def declare(library: ctypes.CDLL) -> None:
    """Set the types of all functions of `library`. Raises AttributeError if it lacks one."""
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
