"""Checks of disk space, of writing, renaming and reading a file, and of the tracking store."""

import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from erollout.config import TrackingConfig
from erollout.doctor.report import Finding
from erollout.errors import UserError
from erollout.resilience.atomic_write import write_atomically
from erollout.tracking.address import has_own_store, store_uri, uri_source

_CANARY_BYTES = 64 * 1024
_ANSWER_SECONDS = 20.0
"""Time limit for a filesystem: a missing server blocks every access."""
_CLOCK_SECONDS = 5.0
"""Allowed difference between a file server's clock and this machine's."""
OUTPUT_GIB, SHARED_MEMORY_GIB = 1.0, 0.06
"""Free space below which any run soon fails; the actual need depends on the model (`train --dry-run`)."""


def existing(directory: Path) -> Path:
    """The directory, or its nearest existing parent."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())


def check_directory(directory: Path, canary: Callable[[Path], Finding] | None = None) -> Iterator[Finding]:
    """Check space and a test file, each with a time limit."""
    yield within(_ANSWER_SECONDS, "disk", lambda: check_space("disk", existing(directory), OUTPUT_GIB))
    yield within(_ANSWER_SECONDS, "filesystem", lambda: (canary or check_canary)(existing(directory)))


def check_shared_memory(directory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    if directory.is_dir():
        yield check_space("shared memory", directory, SHARED_MEMORY_GIB)


def check_space(topic: str, directory: Path, least_gib: float) -> Finding:
    free = shutil.disk_usage(directory).free / 2**30
    text = f"{free:.1f} GiB free in {directory}"
    if free < least_gib:
        return Finding(topic, f"{text}; at least {least_gib:g} is needed", "error", "free space, or choose another place")
    return Finding(topic, text)


def check_canary(directory: Path) -> Finding:
    """Test file that does what a checkpoint does: write, flush, rename, read back. Leaves nothing behind."""
    path = directory / f".erollout-canary-{socket.gethostname()}-{os.getpid()}"
    contents = secrets.token_bytes(_CANARY_BYTES)
    try:
        write_atomically(path, contents, durable=True)
        ahead = path.stat().st_mtime - time.time()
        same = path.read_bytes() == contents
    except OSError as error:
        text = f"can't write, rename and read a file in {directory}: {error.strerror}"
        return Finding("filesystem", text, "error", "choose another directory, or fix its permissions or its mount")
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    if not same:
        return Finding("filesystem", f"a file in {directory} came back changed", "error", "exclude this node or disk")
    if abs(ahead) > _CLOCK_SECONDS:
        text = f"the clock of {directory} is {ahead:+.0f} s from this machine's"
        return Finding("filesystem", text, "warning", "start chronyd or systemd-timesyncd on both")
    return Finding("filesystem", f"{directory} ({filesystem(directory)}): files can be written, renamed and read back")


def filesystem(directory: Path) -> str:
    """Filesystem type: ext4, nfs4, lustre."""
    mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[str(path)] for path in (directory, *directory.parents) if str(path) in mounts), "unknown")


def within(seconds: float, topic: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding, or an error if it takes too long; the check is then abandoned in its thread."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(check())
        except OSError as error:
            found.append(Finding(topic, f"can't be read: {error}", "error", "choose another directory, or fix its mount"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Finding(topic, f"no answer in {seconds:g} s", "error", "is its server gone? check the mount")


def check_store(tracking: TrackingConfig, output_dir: str) -> Finding:
    """Check the tracking store; a file in the run's directory needs no server."""
    if has_own_store(tracking):
        return Finding("tracking", "SQLite in train.output_dir")
    from erollout.tracking.store import MlflowStore

    store = MlflowStore(store_uri(tracking, output_dir), uri_source(tracking))
    try:
        store.check()
    except UserError as error:
        return Finding("tracking", str(error), "error")
    return Finding("tracking", f"{store.name} answers")
