"""Restricted unpickling of data from other ranks or files: only the needed classes are allowed.

A pickle names functions and classes to be called, so its writer can run code where it is read, unless the reader restricts the
names. Light: loads no framework.
"""

import dataclasses
import importlib
import io
import pickle
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, BinaryIO

from erollout.errors import foreign_code

_PLAIN = {
    "builtins": ("set", "frozenset", "slice", "range", "complex", "bytearray"),
    "collections": ("OrderedDict", "deque"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "traceback": ("StackSummary", "FrameSummary"),
}
"""Names whose calls only create a value."""
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
"""Classes that torch.distributed writes to the file `.metadata` of a checkpoint."""
_RECORDS = ("erollout", "megatron.core.dist_checkpointing", "torch.distributed.checkpoint")
"""Packages whose dataclasses and enumerations ranks exchange."""


class ForbiddenClass(pickle.UnpicklingError):
    """Raised if a pickle names something that is not allowed; the message says what."""


def load_metadata(file: BinaryIO) -> Any:
    """Read the metadata of a checkpoint. Raises pickle.UnpicklingError."""
    return _read(_Reader(file, _is_metadata))


def load_message(data: bytes) -> Any:
    """Read an object sent by another rank in a collective. Raises pickle.UnpicklingError."""
    return _read(_Reader(io.BytesIO(data), _is_message))


def _read(reader: "_Reader") -> Any:
    with foreign_code(_unreadable, passing=(pickle.UnpicklingError, MemoryError)):  # a damaged pickle may raise anything
        try:
            return reader.load()
        finally:
            reader.require_unchanged()


def _unreadable(error: Exception) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"it can't be read ({type(error).__name__}: {error})")


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allows: Callable[[str, str, Any], bool]) -> None:
        super().__init__(file)
        self._allows = allows
        self._before: dict[Any, dict[str, Any]] = {}
        """Attributes of the classes named so far, and of the members of enumerations."""

    def find_class(self, module: str, name: str) -> Any:
        found = _found(module, name)
        if found is None or not self._allows(module, name, found):
            raise ForbiddenClass(f"it names {module}.{name}, which is not allowed there")
        members = found.__members__.values() if isinstance(found, type) and issubclass(found, Enum) else ()
        for owner in (found, *members):
            if hasattr(owner, "__dict__"):
                self._before.setdefault(owner, dict(vars(owner)))
        return found

    def require_unchanged(self) -> None:
        """Raise ForbiddenClass, after restoring them, if the pickle has set attributes of the classes that it names."""
        changed = [owner for owner, before in self._before.items() if not _restore(owner, before)]
        if changed:
            raise ForbiddenClass(f"it sets attributes of {changed[0]}, which is not allowed there")


def _restore(owner: Any, before: dict[str, Any]) -> bool:
    """Restore attributes. Returns whether there was nothing to do."""
    now = dict(vars(owner))
    if now.keys() == before.keys() and all(now[name] is value for name, value in before.items()):
        return True
    for name in now.keys() - before.keys():
        delattr(owner, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)
    return False


def _found(module: str, name: str) -> Any:
    """The named object; None: there is none. Imports only the project's own modules and those allowed by name."""
    if module not in sys.modules and (module in _PLAIN or module in _METADATA or _is_in(module, ("erollout",))):
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    return getattr(sys.modules.get(module), name, None)  # a name with a dot is not an attribute


def _is_metadata(module: str, name: str, found: Any) -> bool:
    return name in (*_PLAIN.get(module, ()), *_METADATA.get(module, ())) or _is_constant(module, found)


def _is_message(module: str, name: str, found: Any) -> bool:
    if _is_metadata(module, name, found):
        return True
    if not isinstance(found, type) or found.__module__ != module or _makes_callables(found):
        return False  # a pickle also calls objects that it has made, which with a scorer may be any function
    is_record = dataclasses.is_dataclass(found) or issubclass(found, Enum)
    return (is_record and _is_in(module, _RECORDS)) or issubclass(found, BaseException)


def _makes_callables(kind: type) -> bool:
    return any("__call__" in vars(base) for base in kind.__mro__)


def _is_constant(module: str, found: Any) -> bool:
    """Whether it is a constant such as torch.float32."""
    return module == "torch" and type(found).__name__ in ("dtype", "layout", "memory_format")


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
