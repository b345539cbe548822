"""Joining of a running Ray cluster. ray is loaded only on demand."""

import importlib.util
import logging
import signal
import socket

from erollout.environment import variable
from erollout.errors import UserError
from erollout.resilience.signals import stops_wait

_ANSWER_SECONDS = 10
"""Time limit for the cluster's head to answer: Ray itself tries for many minutes."""


def require_ray(key: str) -> None:
    """Raise UserError, naming the key or option that needs Ray, if it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{key} needs Ray, which is not installed; pip install 'erollout[ray]'")


def find_cluster(address: str, key: str) -> str:
    """HOST:PORT of the cluster's head, after a check that it listens.

    Args:
        address: as given, or `auto`: RAY_ADDRESS, else the cluster of this machine.
        key: key or option that needs Ray, for messages.

    Raises UserError if there is none.
    """
    require_ray(key)
    from ray._private.services import canonicalize_bootstrap_address

    asked = variable("RAY_ADDRESS") or address if address == "auto" else address
    if "://" in asked:
        raise UserError(f"{key}: {asked} is not HOST:PORT of a Ray cluster's head; this process must run on one of its nodes")
    try:
        found = canonicalize_bootstrap_address(asked)
        host, _, port = (found or "").rpartition(":")
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        where = "on this machine, and RAY_ADDRESS is not set" if asked == "auto" else f"at {asked}"
        raise UserError(
            f"{key}: no Ray cluster {where} ({' '.join(str(error).split())}); start one (`ray start`), or correct the address"
        ) from error
    return f"{host}:{port}"


def join_cluster(address: str, key: str) -> str:
    """Make this process a driver of the cluster, unless it is one; returns the head's HOST:PORT.

    Signal handlers are kept: ray would replace that of SIGTERM. Raises UserError if there is no cluster.
    """
    found = find_cluster(address, key)
    import ray

    if ray.is_initialized():
        return found
    handler = signal.getsignal(signal.SIGTERM)
    with stops_wait():
        try:
            ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{key}: can't join the Ray cluster at {found}: {' '.join(str(error).split())}") from error
        finally:
            signal.signal(signal.SIGTERM, handler)
    return found


def resources_free() -> str:
    """Free resources of the cluster, for messages: `CPU 3 of 8, GPU 0 of 2`."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{name} {free.get(name, 0):g} of {total[name]:g}" for name in ("CPU", "GPU") if name in total)
