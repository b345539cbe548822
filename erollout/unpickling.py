"""Reads pickles that came from elsewhere, other ranks or files: of the classes that are needed, and no others.

A pickle names functions and classes and has them called, so whoever writes one runs code where it is read, unless the reader
looks at the names. Light: it loads no framework.
"""

import dataclasses
import importlib
import io
import pickle
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, BinaryIO

_PLAIN = {
    "builtins": ("set", "frozenset", "slice", "range", "complex", "bytearray"),
    "collections": ("OrderedDict", "deque"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "traceback": ("StackSummary", "FrameSummary"),
}
"""Names whose calls do nothing but make a value."""
_METADATA = {
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
}
"""What torch.distributed writes to the file `.metadata` of a checkpoint."""
_RECORDS = ("erollout", "megatron.core.dist_checkpointing", "torch.distributed.checkpoint")
"""Packages whose dataclasses and enumerations ranks send each other."""


class ForbiddenClass(pickle.UnpicklingError):
    """A pickle names what is not allowed in it; the message says what."""


def load_metadata(file: BinaryIO) -> Any:
    """The description of a checkpoint. Raises pickle.UnpicklingError."""
    return _read(_Reader(file, _is_metadata))


def load_message(data: bytes) -> Any:
    """What another rank has sent by a collective of objects. Raises pickle.UnpicklingError."""
    return _read(_Reader(io.BytesIO(data), _is_message))


def _read(reader: "_Reader") -> Any:
    try:
        return reader.load()
    except (pickle.UnpicklingError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle does whatever its bytes say
        raise pickle.UnpicklingError(f"it can't be read ({type(error).__name__}: {error})") from error


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allows: Callable[[str, str, Any], bool]) -> None:
        super().__init__(file)
        self._allows = allows

    def find_class(self, module: str, name: str) -> Any:
        found = _found(module, name)
        if found is None or not self._allows(module, name, found):
            raise ForbiddenClass(f"it names {module}.{name}, which is not allowed there")
        return found


def _found(module: str, name: str) -> Any:
    """None where there is no such thing. Nothing is imported but the project's own and what is allowed by name."""
    if module not in sys.modules and (module in _PLAIN or module in _METADATA or _is_in(module, ("erollout",))):
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    return getattr(sys.modules.get(module), name, None)  # a name with a dot in it is no attribute


def _is_metadata(module: str, name: str, found: Any) -> bool:
    return name in (*_PLAIN.get(module, ()), *_METADATA.get(module, ())) or _is_constant(module, found)


def _is_message(module: str, name: str, found: Any) -> bool:
    if _is_metadata(module, name, found):
        return True
    if not isinstance(found, type) or found.__module__ != module:
        return False
    is_record = dataclasses.is_dataclass(found) or issubclass(found, Enum)
    return (is_record and _is_in(module, _RECORDS)) or issubclass(found, BaseException)


def _is_constant(module: str, found: Any) -> bool:
    """torch.float32 and its like."""
    return module == "torch" and type(found).__name__ in ("dtype", "layout", "memory_format")


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
