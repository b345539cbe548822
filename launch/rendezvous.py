"""Rendezvous for torch's agent: its node's number in the run, and a store of the agents.

torch's own dynamic rendezvous unpickles what it reads from a port that it opens to everyone, and its static one opens
such a port too.
"""

from collections.abc import Callable
from datetime import timedelta

from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "erollout"
LOOPBACK = "127.0.0.1"


class FixedRendezvous(RendezvousHandler):
    """Rendezvous of a fixed number of nodes."""

    def __init__(self, run_id: str, arrive: Callable[[], RendezvousInfo]) -> None:
        """`arrive`: returns when all nodes have arrived."""
        self._run_id = run_id
        self._arrive = arrive

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        return self._arrive()

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def on_one_node() -> RendezvousInfo:
    """False: the ranks have another store than the agents."""
    return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=RendezvousStoreInfo(LOOPBACK, 0))


def among_nodes(port: int, node: int, nodes: int, seconds: float) -> RendezvousInfo:
    """`port`: loopback port of the run's store, for agent and ranks. `seconds`: time limit of its answers."""
    store = TCPStore(LOOPBACK, port, is_master=False, timeout=timedelta(seconds=seconds))
    return RendezvousInfo(store, node, nodes, RendezvousStoreInfo(LOOPBACK, port))


def _handler(parameters: RendezvousParameters) -> RendezvousHandler:
    handler: RendezvousHandler = parameters.config["handler"]
    return handler


rendezvous_handler_registry.register(BACKEND, _handler)
