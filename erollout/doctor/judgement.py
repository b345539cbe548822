"""The head's decisions from the nodes' messages: whether to continue, and which nodes are bad. Pure."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from erollout.doctor.reachability import Peer, suspects

_SHOWN_PAIRS = 8


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """Decision of the head for all nodes."""

    problem: str = ""
    """Problem in one line; empty: continue."""
    bad: dict[str, str] = field(default_factory=dict)
    """Reasons by name, for nodes known to be bad."""


@dataclass(frozen=True, slots=True)
class Attendance:
    """A node's name and the nodes that it expects."""

    name: str
    nodes: int
    expected: tuple[str, ...] = ()
    """Names of the expected nodes; empty: unknown."""
    shared: Path | None = None
    """Directory that all nodes must share."""


def judge_arrivals(names: Sequence[str], head: str, attendance: Attendance, seconds: float) -> NodeVerdict:
    """Decide who has arrived. `names`: nodes that arrived in time. `head`: name of the head."""
    twice = [name for name, count in Counter(map(_short, names)).items() if count > 1]
    if twice:
        return NodeVerdict(f"{', '.join(twice)} arrived more than once; start one process on each node")
    strangers = [name for name in names if attendance.expected and not _among(name, attendance.expected)]
    if strangers:
        return NodeVerdict(f"{', '.join(strangers)} arrived, but expected are {', '.join(attendance.expected)}")
    if len(names) == attendance.nodes:
        return NodeVerdict()
    problem = f"{len(names)} of {attendance.nodes} nodes arrived within {seconds:g} s: {', '.join(names)}"
    if len(names) == 1 and attendance.nodes > 2:
        return NodeVerdict(problem, {head: "none of the others arrived: is its port closed to them?"})
    missing = [name for name in attendance.expected if not _among(name, names)]
    return NodeVerdict(problem, {name: f"did not arrive within {seconds:g} s" for name in missing})


def judge_reach(peers: Sequence[Peer], told: Mapping[int, str], shared: Path | None) -> NodeVerdict:
    """Decide who is reachable. `told`: by number, peers that a node can't reach, and whether it sees the head's file."""
    reports = {number: json.loads(text) for number, text in told.items()}
    bad = {peer.name: "arrived, and then did not answer" for number, peer in enumerate(peers) if number not in reports}
    failed = {(number, to) for number, report in reports.items() for to in report["unreached"] if to in reports}
    for group in suspects(failed):
        for number in sorted(group):
            others = "".join(f" or {peers[other].name}" for other in sorted(group - {number}))
            bad[peers[number].name] = f"{'it' * bool(others)}{others} is not reached on data ports".strip()
    for number, report in reports.items():
        if not report["shared"]:
            bad[peers[number].name] = f"does not see the head's file in {shared}: is that on a shared filesystem?"
    pairs = [f"{peers[a].name} does not reach {peers[b].name} at {peers[b].address}:{peers[b].port}" for a, b in sorted(failed)]
    more = [f"and {len(pairs) - _SHOWN_PAIRS} other pairs"] if len(pairs) > _SHOWN_PAIRS else []
    return NodeVerdict("; ".join([*pairs[:_SHOWN_PAIRS], *more] or _sentences(bad)), bad)


def judge_sums(peers: Sequence[Peer], told: Mapping[int, str]) -> NodeVerdict:
    """Decide on the all-reduce. `told`: problems by number; empty: none. A problem of many nodes is blamed on none."""
    silent = {peer.name: "did not answer in the collective" for number, peer in enumerate(peers) if number not in told}
    wrong = {peers[number].name: text for number, text in told.items() if text}
    few = wrong if 2 * len(wrong) < len(peers) and not silent else {}
    return NodeVerdict("; ".join(_sentences(wrong) + _sentences(silent)), silent | few)


def _sentences(reasons: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in reasons.items()]


def _among(name: str, names: Sequence[str]) -> bool:
    return _short(name) in map(_short, names)


def _short(name: str) -> str:
    """Host name without the domain: schedulers use n1 for n1.cluster."""
    return name.partition(".")[0]
