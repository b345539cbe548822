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

from erollout.launch.meeting import FIRST_PORT, NUM_PORTS

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
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.full)])
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
        with socket.create_server((address, 0)) as control:  # the neighbour does reach this machine
            places.update(now := listening(run.alive()))  # a port closed since may be another process's
            ports = [control.getsockname()[1], *sorted({port for _, port in now})]
            command = [*there, sys.executable, "-c", TRY, address, *map(str, ports)]
            tried = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()
    assert tried == [f"open {ports[0]}", *(f"refused {port}" for port in ports[1:])]
    assert len(places) >= ranks, "the ranks' own listeners were not seen"
    assert {place for place, _ in places} <= {"127.0.0.1", "::1"}


@pytest.mark.end_to_end
@pytest.mark.full
def test_nodes_are_reached_on_their_interface_alone(tmp_path: Path, neighbour: tuple[str, list[str]]) -> None:
    address, there = neighbour
    config = write_config(tmp_path, rollout={"dtype": "float32"}, train={"steps": 1000})
    arguments = ("launch", "torchrun", "--nodes=2", "--nproc-per-node=1", f"--head={address}", f"--config={config}")
    places: set[tuple[str, int]] = set()
    with (
        Launched(*arguments, output=tmp_path / "one") as one,
        Launched(*arguments, output=tmp_path / "two") as two,
    ):

        def have_trained() -> bool:
            places.update(listening([*one.alive(), *two.alive()]))
            return steps_recorded(tmp_path) > 0

        one.wait_until(have_trained)
        outer = sorted(port for place, port in places if place == address)
        assert {place for place, _ in places} == {"127.0.0.1", address} and len(outer) >= 3, "the gate, and gloo of each rank"
        (gate,) = [port for port in outer if FIRST_PORT <= port < FIRST_PORT + NUM_PORTS]
        program = (
            f"import socket; c = socket.create_connection(({address!r}, {gate}), 10); print(c.recv(99)); c.send(b'store\\n')"
        )
        heard = subprocess.run(
            [*there, sys.executable, "-c", f"{program}; print(c.recv(99))"],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        ).stdout.splitlines()
        assert heard[0].startswith("b'erollout ") and heard[1] == "b''", "a greeting, and no more"
        inner = sorted({port for place, port in places if place == "127.0.0.1"} - set(outer))
        command = [*there, sys.executable, "-c", TRY, address, *map(str, inner)]
        tried = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()
        assert tried == [f"refused {port}" for port in inner]
    assert (tmp_path / "run" / "meeting.secret").stat().st_mode & 0o777 == 0o600
