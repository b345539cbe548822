"""The table of the C interface against the C++ sources."""

import ctypes
import re
from pathlib import Path

from erollout.kernels import native_interface

_RESULTS = {
    "void": None,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "void*": ctypes.c_void_p,
    "const char*": ctypes.c_char_p,
}


def _exported() -> dict[str, tuple[object, ...]]:
    """Functions defined within `extern "C"`, with their types."""
    found = {}
    for file in sorted((Path(native_interface.__file__).parent / "cpp").glob("*.cpp")):
        code = file.read_text().partition('extern "C"')[2]
        for result, name, arguments in re.findall(r"((?:const )?\w+\*?) (erollout_\w+)\(([^)]*)\) \{", code):
            types = [argument.rsplit(maxsplit=1)[0].strip() for argument in arguments.split(",") if argument]
            found[name] = (_RESULTS[result], *(ctypes.c_void_p if kind.endswith("*") else _RESULTS[kind] for kind in types))
    return found


def test_the_table_has_every_exported_function_with_its_types() -> None:
    assert _exported() == native_interface.SIGNATURES
