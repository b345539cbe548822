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
    "torch.utils.cpp_extension": logging.ERROR,  # "No CUDA runtime is found", at import
    "urllib3": logging.ERROR,
}
"""Libraries that log every migration and every retry: the delivery says once what matters."""


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at that moment, so that lines appear above a live progress line and not through it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _WithoutCredentials(logging.Formatter):
    """Whatever a library says of the address that it was given."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure_logging(rank: int) -> None:
    """Rank 0 logs from INFO on, other ranks from WARNING on, each line with time and, unless rank 0, the rank."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _CurrentStderr()
    handler.setFormatter(_WithoutCredentials(f"%(asctime)s %(levelname)s {prefix}%(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Let libraries be heard from the levels of QUIET on, some of which speak when they are imported."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
