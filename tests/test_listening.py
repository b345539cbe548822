"""Who can reach a run: every port that its processes listen on, as another machine of the network finds it."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launched import Launched
from tiny_runs import steps_recorded, write_config

TRY = """
import socket, sys
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=10).close()
        print("open", port)
    except ConnectionRefusedError:
        print("refused", port)
"""


@pytest.fixture
def neighbour() -> Iterator[tuple[str, list[str]]]:
    """Another machine, as it were: this one's address as it knows it, and how a command runs there."""
    if not (sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip")):
        pytest.skip("a network namespace needs root and iproute2")
    name = f"er{os.getpid()}"
    ours, theirs = "10.217.33.1", "10.217.33.2"
    commands = [
        f"netns add {name}",
        f"link add {name}a type veth peer name {name}b netns {name}",
        f"address add {ours}/30 dev {name}a",
        f"link set {name}a up",
        f"-n {name} address add {theirs}/30 dev {name}b",
        f"-n {name} link set {name}b up",
    ]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespace can be made here: ip {command}: {made.stderr.strip()}")
        yield ours, ["ip", "netns", "exec", name]
    finally:
        for command in (f"link delete {name}a", f"netns delete {name}"):
            subprocess.run(["ip", *command.split()], capture_output=True, check=False)


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    found = set()
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            connections = process.net_connections("inet")
            found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN or not c.raddr}
    return found


@pytest.mark.end_to_end
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_one_machine_can_be_reached_from_no_other(
    tmp_path: Path, neighbour: tuple[str, list[str]], ranks: int
) -> None:
    address, there = neighbour
    config = write_config(tmp_path, rollout={"dtype": "float32"}, train={"steps": 1000})
    places: set[tuple[str, int]] = set()
    with Launched("train", "--config", str(config), f"parallel.world_size={ranks}", output=tmp_path / "out") as run:

        def has_trained() -> bool:
            places.update(listening(run.alive()))
            return steps_recorded(tmp_path) > 0

        run.wait_until(has_trained)
        places.update(listening(run.alive()))
        with socket.create_server((address, 0)) as control:  # the neighbour does reach this machine
            ports = [control.getsockname()[1], *sorted({port for _, port in places})]
            command = [*there, sys.executable, "-c", TRY, address, *map(str, ports)]
            tried = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()
    assert tried == [f"open {ports[0]}", *(f"refused {port}" for port in ports[1:])]
    assert len(places) >= ranks, "the ranks' own listeners were not seen"
    assert {place for place, _ in places} <= {"127.0.0.1", "::1"}
