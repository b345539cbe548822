"""Files that other processes read, or that must outlive a crash: replaced in one go, and flushed to the disk. Pure."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replace a file: readers see the old content or all of the new one, whatever happens to this process.

    The content is written to `<name>.partial` beside it first, so a path has one writer at a time. `durable`: the content
    and the name are on the disk when it returns. Raises OSError, and then leaves the old file as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Write a file's content, or the names in a directory, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
