"""The driver of `erollout launch ray`: places a run, monitors it, forwards signals, restarts it. Loads ray."""

import itertools
import re
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from erollout.errors import UserError
from erollout.launch.ray_agent import Agent, NodeFacts
from erollout.launch.ray_job import STOPPED, Ended, RayJob, decide, rank_variables
from erollout.launch.ray_signals import Asked, listening
from erollout.launch.run_directory import VERDICT
from erollout.launch.secret import new_secret
from erollout.schedulers.ray_cluster import resources_free

_LOOK_SECONDS = 400
"""Time limit for actors to start and check their nodes."""
_SILENT_SECONDS = 60
"""Time without an answer after which an agent is given up; Ray itself detects a dead node in 15 s."""
_ANSWER_SECONDS = 30
_GRACE_SECONDS = 30
"""Time for the other nodes' ranks to end, and report why, once one has failed."""
_LEAVE_SECONDS = 600
"""Time for the other nodes' ranks to end once one node's have ended well."""
_VERDICT_SECONDS = 30
_NO_VERDICT = "the ranks ended and left no verdict"
_POLL_SECONDS = 0.5
_NAMED_ERRORS = 3
_SAY_SECONDS = 10
"""Wait for a reservation after which the missing nodes are reported: free nodes are reserved sooner."""


class Lost(Exception):
    """Raised if an agent is gone or silent; the message says how this was noticed."""

    def __init__(self, agent: int, error: RayError) -> None:
        super().__init__(" ".join(str(error).split())[-300:])
        self.agent = agent


def drive(job: RayJob, cluster: str) -> int:
    """Run the job to its end on the cluster that this process has joined. Returns the exit status.

    Raises UserError if nodes are not free in time or are unfit.
    """
    unfit: dict[str, str] = {}
    with listening() as asked:
        for attempt in range(1, job.max_restarts + 2):
            ended = RayAttempt(job, cluster, attempt, unfit, asked).run()
            status, why = decide(ended, asked.first, job.max_restarts + 1 - attempt)
            _say(why if status is not None else f"{why}: restarting from {job.newest_checkpoint() or 'step 0'}")
            if status is not None:
                return status
    raise AssertionError("decide allows one restart too many")


class RayAttempt:
    """One start of the run: its nodes, their agents, and its outcome."""

    def __init__(self, job: RayJob, cluster: str, number: int, unfit: dict[str, str], asked: Asked) -> None:
        """unfit: reason by node (Ray's id) for nodes on which no ranks must start; those found here are added."""
        self._job = job
        self._cluster = cluster
        self._number = number
        self._unfit = unfit
        self._asked = asked
        self._gpus = job.gpus if job.gpus is not None else int(ray.cluster_resources().get("GPU", 0) > 0)
        self._bundle = job.bundle(self._gpus)
        self._agents: list[Any] = []
        self._nodes: list[NodeFacts] = []
        self._serials = itertools.count()
        self._homes: dict[int, str] = {}
        """Ray's id of each agent's node."""

    def run(self) -> Ended:
        """Run until the ranks on all nodes have ended."""
        before = self._job.saved()
        (self._job.directory.path / VERDICT).unlink(missing_ok=True)
        reason, node_died, fit = "", False, False
        lost_before: set[str] = set()
        while not fit:
            places = self._place()
            if places is None:  # stop requested before any rank was started
                return Ended("requeue" if self._asked.first == "SIGUSR1" else "stopped", "", False, False)
            try:
                fit = self._look(places)
                if fit:
                    self._start()
                    reason = self._watch()
            except Lost as lost:
                reason, node_died = self._loss(lost)
                if node_died or self._nodes:
                    break
                _say(reason)
                home = self._homes[lost.agent]
                if home in lost_before:  # not even an agent can start on it
                    self._unfit[home] = reason
                lost_before.add(home)
            finally:
                self._end()
                remove_placement_group(places)
        saved = self._job.saved() != before
        return Ended(self._verdict(wait=reason == _NO_VERDICT), reason, node_died, saved)

    def _verdict(self, wait: bool) -> str | None:
        """The verdict. `wait`: it must exist, but another node wrote it, and a network filesystem may show it late."""
        end = time.monotonic() + _VERDICT_SECONDS
        while (verdict := self._job.directory.verdict()) is None and wait and time.monotonic() < end:
            list(self._job.directory.path.iterdir())  # makes the client refresh
            time.sleep(_POLL_SECONDS)
        return verdict

    def _place(self) -> PlacementGroup | None:
        """Reserve nodes with enough resources; None: a stop was requested. Raises UserError if they are not free in time."""
        selector = {"ray.io/node-id": f"!in({','.join(self._unfit)})"} if self._unfit else {}
        places = placement_group(
            [self._bundle] * self._job.nodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[selector] * self._job.nodes if selector else None,
        )
        began, said = time.monotonic(), False
        with ExitStack() as unused:
            unused.callback(remove_placement_group, places)
            while not places.wait(_POLL_SECONDS):
                waited = time.monotonic() - began
                if self._asked.first is not None:
                    break
                if waited > self._job.wait_seconds or self._too_few_are_fit():
                    raise UserError(f"{self._missing()}; start fewer ranks, reserve less per rank, or add nodes")
                if waited > _SAY_SECONDS and not said:
                    _say(f"waiting up to {self._job.wait_seconds} s for nodes: {self._missing()}")
                    said = True
            else:
                self._homes = placement_group_table(places)["bundles_to_node_id"]
                unused.pop_all()
                return places
        return None

    def _too_few_are_fit(self) -> bool:
        """Whether too many nodes are unfit, so that waiting does not help."""
        fit = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in self._unfit]
        return bool(self._unfit) and len(fit) < self._job.nodes

    def _missing(self) -> str:
        """Requested and available resources, for messages."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        asked = ", ".join(f"{name} {number:g}" for name, number in self._bundle.items())
        whole = [node for node in alive if all(node["Resources"].get(k, 0) >= v for k, v in self._bundle.items())]
        unfit = "".join(f"; {reason}" for reason in self._unfit.values())
        return (
            f"asked: {self._job.nodes} nodes with {asked} free on each; there: {len(alive)} nodes alive, {len(whole)} of them "
            f"so large, free in all {resources_free()}{unfit}"
        )

    def _look(self, places: PlacementGroup) -> bool:
        """Start the agents, which check their nodes. Returns whether all are fit. Raises UserError if nodes differ."""
        options: dict[str, Any] = {"num_cpus": self._bundle.get("CPU", 0), "num_gpus": self._bundle.get("GPU", 0)}
        options["runtime_env"] = {"env_vars": rank_variables(self._cluster)}
        for index in range(self._job.nodes):
            place = PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=index)
            self._agents.append(ray.remote(**options, scheduling_strategy=place)(Agent).remote())
        self._nodes = self._ask_all("look", self._job.folder, self._job.node_check(self._gpus), seconds=_LOOK_SECONDS)
        unfit = {node.id: f"node {node.host} is unfit: {node.problem}" for node in self._nodes if node.problem}
        for reason in unfit.values():
            _say(reason)
        self._unfit.update(unfit)
        if not unfit and len({node.fingerprint for node in self._nodes}) > 1:
            lines = "; ".join(f"{node.host} {node.fingerprint}" for node in self._nodes)
            raise UserError(f"the nodes differ in code, versions or configuration: {lines}; install the same on all")
        return not unfit

    def _start(self) -> None:
        head = self._nodes[0]
        arguments = self._job.launcher(self._number, f"{head.address}:{head.port}")
        logs = self._job.logs(self._number)
        _say(f"start {self._number} on {', '.join(node.host for node in self._nodes)} of {self._cluster}; logs in {logs}")
        logs.mkdir(parents=True, exist_ok=True)
        latest = logs.with_name("latest.new")
        latest.unlink(missing_ok=True)
        latest.symlink_to(logs.name)
        latest.replace(logs.with_name("latest"))
        secret = new_secret()
        starts = [
            agent.start.remote(self._job.folder, arguments, str(logs / f"node-{index}-{node.host}.out"), secret)
            for index, (agent, node) in enumerate(zip(self._agents, self._nodes, strict=True))
        ]
        self._answers(starts, _ANSWER_SECONDS)

    def _watch(self) -> str:
        """Monitor until all launchers have ended, or some time after one has. Returns the reason of a crash."""
        failed_at = ended_at = None
        while True:
            for number in self._asked.take():
                _say(f"forwarding {number.name} to the ranks, which save and stop")
                self._signal(int(number))
            statuses = [self._status(index) for index in range(len(self._agents))]
            # stopped ranks have saved; others may still be saving
            fine = (None, 0, STOPPED) if self._asked.first is not None else (None, 0)
            bad = {node.host: status for node, status in zip(self._nodes, statuses, strict=True) if status not in fine}
            if None not in statuses or (failed_at and time.monotonic() - failed_at > _GRACE_SECONDS):
                return self._why(bad)
            failed_at = failed_at or (time.monotonic() if bad else None)
            ended_at = ended_at or (time.monotonic() if set(statuses) != {None} else None)
            if ended_at and time.monotonic() - ended_at > _LEAVE_SECONDS:
                left = [node.host for node, status in zip(self._nodes, statuses, strict=True) if status is None]
                return f"ranks of {', '.join(left)} have not ended {_LEAVE_SECONDS} s after the others"
            time.sleep(_POLL_SECONDS)

    def _why(self, failed: Mapping[str, int | None]) -> str:
        if not failed:
            return _NO_VERDICT
        ended = [f"ranks of {host} ended with status {status}" for host, status in failed.items()]
        return "; ".join(ended + _errors(self._job.logs(self._number)))

    def _status(self, index: int) -> int | None:
        """A launcher's exit status."""
        status: int | None = self._ask(index, "status")
        return status

    def _signal(self, number: int) -> None:
        """Send a signal to all ranks, with retries for agents that are temporarily unreachable."""
        serial = next(self._serials)
        for agent in self._agents:
            agent.signal.remote(number, serial)
        for index in range(len(self._agents)):
            self._ask(index, "signal", number, serial)

    def _ask(self, index: int, method: str, *arguments: object) -> Any:
        """Call an agent, with retries while it is unreachable. Raises Lost if it stays so."""
        end = time.monotonic() + _SILENT_SECONDS
        while True:
            try:
                return ray.get(getattr(self._agents[index], method).remote(*arguments), timeout=_ANSWER_SECONDS)
            except (ActorUnavailableError, GetTimeoutError) as error:
                if time.monotonic() > end:
                    raise Lost(index, error) from error
                time.sleep(_POLL_SECONDS)
            except RayError as error:
                raise Lost(index, error) from error

    def _ask_all(self, method: str, *arguments: object, seconds: float = _ANSWER_SECONDS) -> list[Any]:
        return self._answers([getattr(agent, method).remote(*arguments) for agent in self._agents], seconds)

    def _answers(self, references: list[Any], seconds: float) -> list[Any]:
        """Answers of all agents, in order. Raises Lost for one that does not answer in time."""
        end = time.monotonic() + seconds
        answers = []
        for index, reference in enumerate(references):
            try:
                answers.append(ray.get(reference, timeout=max(1.0, end - time.monotonic())))
            except RayError as error:
                raise Lost(index, error) from error
        return answers

    def _loss(self, lost: Lost) -> tuple[str, bool]:
        """What was lost, and whether it was a node, which Ray detects some time after its processes are gone."""
        node = self._nodes[lost.agent].id if self._nodes else self._homes[lost.agent]
        end = time.monotonic() + _SILENT_SECONDS
        while _is_alive(node) and time.monotonic() < end:
            try:
                ray.get(self._agents[lost.agent].status.remote(), timeout=_ANSWER_SECONDS)
                break
            except (ActorUnavailableError, GetTimeoutError):
                time.sleep(_POLL_SECONDS)
            except RayError:
                break
        host = next((found["NodeManagerHostname"] for found in ray.nodes() if found["NodeID"] == node), node)
        if not _is_alive(node):
            return f"node {host} died", True
        hint = "" if self._nodes else "; code must be at the same path on all nodes, or installed on each"
        return f"the agent on {host} ended: {lost}{hint}", False

    def _end(self) -> None:
        """End all agents: no rank may survive its attempt, because the next one writes the same files."""
        if self._agents:
            with suppress(RayError):
                references = [agent.end.remote() for agent in self._agents]
                ray.wait(references, num_returns=len(references), timeout=_ANSWER_SECONDS)
        for agent in self._agents:
            with suppress(RayError):
                ray.kill(agent)
        self._agents, self._nodes = [], []


def _is_alive(node: str) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def _errors(logs: Path) -> list[str]:
    """Distinct errors reported by ranks and launchers, including those of nodes that lost the failed one."""
    found: dict[str, None] = {}
    for log in sorted(logs.glob("*.out")):
        with log.open(errors="replace") as lines:
            found |= dict.fromkeys(line.strip() for line in lines if re.search(r"erollout[^:]*: error: ", line))
    return list(found)[:_NAMED_ERRORS]


def _say(event: str) -> None:
    print(f"erollout: {event}", file=sys.stderr, flush=True)
