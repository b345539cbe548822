"""The process that all parts of a test cluster hang on, and what it starts: see `cluster`."""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NAMESPACES = ["--net", "--uts", "--mount", "--ipc"]
SUBNET = "10.77.0"  # of a network that nothing else sees
UP_SECONDS, ANSWER_SECONDS = 100, 30
REQUEUE_SECONDS = 5
"""How long a requeued job waits; Slurm makes it 121 s. Sooner, slurmd refuses the job that it has just killed."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


NODE, CLUSTER = (str(Path(__file__).with_name(name)) for name in ("node.sh", "cluster"))


class Failure(Exception):
    """What the user is told."""


class Keeper:
    """The process that all others hang on."""

    def __init__(self, directory: Path, flat: bool) -> None:
        self.directory = directory
        self.run_directory = directory / "run"
        self.flat = flat
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.requeued: dict[str, float] = {}
        """When jobs that wait for a second start were first seen, by id."""
        self.ending = False

    def run(self, nodes: int, gpus: int, owner: int) -> None:
        """Until SIGTERM, the end of the process `owner` (0: none) or of a daemon."""
        os.environ["SLURM_CONF"] = str(self.run_directory / "slurm.conf")
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGTERM, self._end)
        owners = [os.pidfd_open(owner)] if owner else []
        try:
            self._furnish(nodes, gpus)
            with _listening(self.run_directory / "keeper.sock") as line:
                self._start_controller()
                for number in range(1, nodes + 1):
                    self.heal(f"n{number}")
                while not self.ending:
                    ready, _, _ = select.select([*owners, line.fileno()], [], [], 1.0)
                    self.ending |= any(owner in ready for owner in owners)
                    if line.fileno() in ready:
                        self._answer(line)
                    self._look_after()
        finally:
            while processes := descendants(os.getpid()):
                _kill(processes)
                list(_reaped())

    def _end(self, *_: object) -> None:
        self.ending = True

    # What can be asked for.

    def _answer(self, line: socket.socket) -> None:
        connection, _ = line.accept()
        with connection:
            connection.settimeout(ANSWER_SECONDS)
            with suppress(OSError, ValueError):  # who asked is gone, or stands still
                name, *words = json.loads(connection.makefile().readline())
                try:
                    getattr(self, name)(*words)
                except (Failure, OSError, TypeError) as error:
                    connection.sendall(str(error).encode())

    def crash(self, name: str) -> None:
        """Returns when nothing of the node runs. In a process namespace all others die with the first, and before it has."""
        first = node_pid(self.directory, name)
        lost = [*(descendants(first) if self.flat else []), first]
        _kill(lost)
        wait_until(lambda: not any(map(_is_running, lost)), ANSWER_SECONDS / 2, f"{name} does not die")
        (self.run_directory / f"{name}.pid").unlink()

    def heal(self, name: str) -> None:
        pid_file = self.run_directory / f"{name}.pid"
        if pid_file.exists():
            raise Failure(f"node {name} runs")
        if self.flat:
            self._start(name, [sys.executable, CLUSTER, "flat-node", name, f"--dir={self.directory}"])
        else:
            unshare = ["unshare", *NAMESPACES, "--pid", "--fork", "--kill-child=KILL", "--propagation=slave"]
            unshared = self._start(name, [*unshare, NODE, name, str(self.run_directory), address_of(name)])
            wait_until(pid_file.exists, ANSWER_SECONDS, f"{name} does not start")
            _output("ip", "link", "delete", f"to-{name}")  # a crashed node's goes late
            peer = "name", "eth0", "address", hardware_address_of(name), "netns", str(unshared)
            _run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", *peer)
            _run("ip", "link", "set", f"to-{name}", "master", "bridge", "up")

    def cut(self, name: str) -> None:
        self._require_namespaces()
        _run("ip", "link", "set", f"to-{name}", "down")

    def join(self, name: str) -> None:
        _run("ip", "link", "set", f"to-{name}", "up")

    def disk(self, path: str, mebibytes: str) -> None:
        self._require_namespaces()
        _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=777", "tmpfs", path)

    def hide(self, name: str, path: str) -> None:
        self._require_namespaces()
        _run("nsenter", "--mount", f"--target={node_pid(self.directory, name)}", "mount", "-t", "tmpfs", "tmpfs", path)

    def show(self, name: str, path: str) -> None:
        _run("nsenter", "--mount", f"--target={node_pid(self.directory, name)}", "umount", path)

    def _require_namespaces(self) -> None:
        if self.flat:
            raise Failure("the nodes of a flat cluster have no networks and no mounts of their own")

    # What runs.

    def _furnish(self, nodes: int, gpus: int) -> None:
        devices = [self.run_directory / f"nvidia{number}" for number in range(gpus)]
        if self.flat:
            for device in devices:
                os.mknod(device, 0o20666, os.makedev(1, 3))  # as /dev/null
            return
        names = [f"n{number}" for number in range(1, nodes + 1)]
        addresses = {name: address_of(name) for name in names} | {"login": f"{SUBNET}.1"}
        for own in addresses:  # which on its own node is a loopback address, as Debian's installer has it
            known = addresses | {"localhost": "127.0.0.1", own: "127.0.1.1"}
            write(self.run_directory / f"hosts.{own}", "".join(f"{address} {name}\n" for name, address in known.items()))
        write(self.run_directory / "nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")  # no name server to ask
        _run("hostname", "login")
        _run("mount", "--make-rshared", "/")  # nodes see what is mounted here later
        for source, target in {"hosts.login": "/etc/hosts", "nsswitch.conf": "/etc/nsswitch.conf"}.items():
            _run("mount", "--bind", str(self.run_directory / source), target)
        for device in devices:
            device.touch()
            _run("mount", "--bind", "/dev/null", str(device))
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", "bridge", "type", "bridge")
        _run("ip", "address", "add", f"{SUBNET}.1/24", "dev", "bridge")
        _run("ip", "link", "set", "bridge", "up")

    def _start_controller(self) -> None:
        key = self.run_directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        arguments = [f"--{option}={self.run_directory / file}" for option, file in files.items()]
        munged = ["munged", "--foreground", "--force", *arguments, f"--log-file={self.directory}/log/munged.log"]
        self._start("munged", munged)
        self._start("slurmctld", ["slurmctld", "-D"])
        # a slurmd that finds no controller asks again only after 10 s
        wait_until(lambda: " UP" in _output("scontrol", "ping"), UP_SECONDS, "slurmctld does not answer")

    def _start(self, name: str, command: Sequence[str]) -> int:
        with open(self.directory / "log" / f"{name}.out", "a") as log:
            started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        self.started[name] = started
        return started.pid

    def _look_after(self) -> None:
        list(_reaped())
        for name in ("munged", "slurmctld"):
            if self.started[name].poll() is not None:
                raise Failure(f"{name} has ended")
        self._hasten()

    def _hasten(self) -> None:
        """Requeued jobs start sooner than Slurm's two minutes."""
        listed = _output("squeue", "--noheader", "--states=PENDING", "--Format=JobID:12,RestartCnt:6,Reason:20").splitlines()
        found = [job for job, restarts, *reason in map(str.split, listed) if restarts != "0" and reason == ["BeginTime"]]
        now = time.monotonic()
        self.requeued = {job: self.requeued.get(job, now) for job in found}
        for job, since in self.requeued.items():
            if now - since >= REQUEUE_SECONDS:
                _output("scontrol", "update", f"jobid={job}", "starttime=now")


def flat_node(directory: Path, name: str) -> None:
    """A node on this host: what its slurmd starts stays below this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    write(directory / "run" / f"{name}.pid", str(os.getpid()))
    slurmd = subprocess.Popen(["slurmd", "-D", "-N", name], preexec_fn=_die_with_parent)
    while slurmd.pid not in _reaped():
        time.sleep(0.1)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(path))
        line.listen()
        yield line


def address_of(node: str) -> str:
    return f"{SUBNET}.{10 + int(node[1:])}"


def hardware_address_of(node: str) -> str:
    """The same after a crash, or the others would look for the node at its old one for some seconds."""
    return f"02:00:00:00:00:{10 + int(node[1:]):02x}"


def node_pid(directory: Path, node: str) -> int:
    """First process of a node."""
    try:
        return int((directory / "run" / f"{node}.pid").read_text())
    except (OSError, ValueError):
        raise Failure(f"node {node} does not run") from None


def _run(*command: str) -> None:
    done = _done(*command)
    if done.returncode:
        raise Failure(f"{' '.join(command)}: {done.stderr.strip()}")


def _output(*command: str) -> str:
    """Output of a command that may fail."""
    with suppress(subprocess.TimeoutExpired):
        return _done(*command).stdout
    return ""


def _done(*command: str) -> subprocess.CompletedProcess[str]:
    """Ends with the keeper: squeue would look for a controller that is no more for ten seconds."""
    return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, preexec_fn=_die_with_parent)


def _kill(processes: Sequence[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reaped() -> Iterator[int]:
    with suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            yield pid


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; a process that has ended but not been waited for has none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return fields


def _is_running(pid: int) -> bool:
    try:
        _stat(pid)
    except OSError:
        return False
    return True


def started_at(pid: int) -> int:
    """In clock ticks since the machine's start: tells a process from another that got its number."""
    return int(_stat(pid)[19])


def descendants(ancestor: int) -> list[int]:
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(file.name)] = int(_stat(int(file.name))[1])
    found = [ancestor]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def wait_until(condition: Callable[[], bool], seconds: float, message: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failure(f"{message} in {seconds} s")
        time.sleep(0.05)


def write(path: Path, value: object) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(value if isinstance(value, str) else json.dumps(value))
    partial.replace(path)
