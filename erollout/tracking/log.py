"""Standard logging, set up once per process."""

import logging
import sys
from typing import TextIO

from erollout.security.redaction import redact

QUIET = {
    "alembic": logging.WARNING,
    "megatron": logging.WARNING,
    "mlflow": logging.WARNING,
    "matplotlib": logging.WARNING,
    "torch.utils.cpp_extension": logging.ERROR,  # logs "No CUDA runtime is found" at import
    "urllib3": logging.ERROR,
}
"""Log levels of libraries that log every schema migration and retry: the delivery logs once what matters."""


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler that writes to the current sys.stderr, so that lines appear above a live progress line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _WithoutCredentials(logging.Formatter):
    """Formatter that removes credentials, which libraries may log with an address."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure_logging(rank: int) -> None:
    """Set up logging: from INFO on rank 0, from WARNING on other ranks, whose lines are prefixed with the rank."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _CurrentStderr()
    handler.setFormatter(_WithoutCredentials(f"%(asctime)s %(levelname)s {prefix}%(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Set the log levels of QUIET, before the libraries are imported: some log at import."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
