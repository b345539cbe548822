"""The secret by which the nodes of a run authenticate each other.

Slurm and Ray pass it with the run, in the variable EROLLOUT_SECRET. Nodes started by hand read it from a file in the run
directory, which the first of them creates, readable only by the user who starts the run.
"""

import os
import secrets
import socket
import time
from pathlib import Path

from erollout.environment import SECRET, set_variable, variable
from erollout.errors import UserError

_FILE = "meeting.secret"
_LEAST_CHARACTERS = 16
_SEEN_SECONDS = 60
"""Time until a file written on one node is visible on another, on a network filesystem."""


def new_secret() -> str:
    return secrets.token_hex(16)


def secret_of(directory: Path) -> str:
    """Secret of the run in that directory; the variable takes precedence.

    Raises UserError for a variable that is too short, and for a file that others can read or that can't be created.
    """
    return given_secret() or _in_file(directory / _FILE)


def given_secret() -> str | None:
    """Secret from the variable, which child processes do not inherit. Raises UserError for one that is too short."""
    given = variable(SECRET)
    set_variable(SECRET, "")
    if given is not None and len(given) < _LEAST_CHARACTERS:
        raise UserError(f"{SECRET} has {len(given)} characters; give {_LEAST_CHARACTERS} or more: `openssl rand -hex 16`")
    return given


def _in_file(path: Path) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make(path)
        return _read(path)
    except OSError as error:
        raise UserError(
            f"the nodes' secret can't be kept in {path}: {error.strerror}; let it be written, or set {SECRET}, equal on all"
        ) from error


def _make(path: Path) -> None:
    """Create the file atomically, if no other node has."""
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    own.unlink(missing_ok=True)
    with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{new_secret()}\n")
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()


def _read(path: Path) -> str:
    end = time.monotonic() + _SEEN_SECONDS
    while True:
        try:
            with open(path) as file:
                facts = os.fstat(file.fileno())
                if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                    raise UserError(
                        f"{path} must be yours and readable by you alone; `chmod 600` it, remove it, or set {SECRET} to the "
                        "same on all nodes"
                    )
                return file.read().strip()
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
