"""What the head makes of what the nodes tell it: whether to go on, and who is bad. Pure."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from erollout.doctor.reachability import Peer, suspects

_SHOWN_PAIRS = 8


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """Of the head, for all nodes."""

    problem: str = ""
    """One line; empty: go on."""
    bad: dict[str, str] = field(default_factory=dict)
    """Reasons by name, of those who are known to be bad."""


@dataclass(frozen=True, slots=True)
class Attendance:
    """What a node is called, and whom it expects."""

    name: str
    nodes: int
    expected: tuple[str, ...] = ()
    """Names; none where they are not known."""
    shared: Path | None = None
    """A directory that all must see."""


def judge_arrivals(names: Sequence[str], head: str, attendance: Attendance, seconds: float) -> NodeVerdict:
    """`names`: of those that came in time. `head`: the name of the head."""
    twice = [name for name, count in Counter(map(_short, names)).items() if count > 1]
    if twice:
        return NodeVerdict(f"{', '.join(twice)} came more than once; start one process on each node")
    strangers = [name for name in names if attendance.expected and not _among(name, attendance.expected)]
    if strangers:
        return NodeVerdict(f"{', '.join(strangers)} came, and expected are {', '.join(attendance.expected)}")
    if len(names) == attendance.nodes:
        return NodeVerdict()
    problem = f"{len(names)} of {attendance.nodes} nodes came within {seconds:g} s: {', '.join(names)}"
    if len(names) == 1 and attendance.nodes > 2:
        return NodeVerdict(problem, {head: "none of the others came: is its port closed to them?"})
    missing = [name for name in attendance.expected if not _among(name, names)]
    return NodeVerdict(problem, {name: f"did not come within {seconds:g} s" for name in missing})


def judge_reach(peers: Sequence[Peer], told: Mapping[int, str], shared: Path | None) -> NodeVerdict:
    """`told`: by number, whom a node does not reach and whether it sees the head's file in the shared directory."""
    reports = {number: json.loads(text) for number, text in told.items()}
    bad = {peer.name: "came, and then was silent" for number, peer in enumerate(peers) if number not in reports}
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
    """`told`: by number, what went wrong; nothing where nothing did. What goes wrong for many is the fault of nobody known."""
    silent = {peer.name: "is silent in the collective" for number, peer in enumerate(peers) if number not in told}
    wrong = {peers[number].name: text for number, text in told.items() if text}
    few = wrong if 2 * len(wrong) < len(peers) and not silent else {}
    return NodeVerdict("; ".join(_sentences(wrong) + _sentences(silent)), silent | few)


def _sentences(reasons: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in reasons.items()]


def _among(name: str, names: Sequence[str]) -> bool:
    return _short(name) in map(_short, names)


def _short(name: str) -> str:
    """Schedulers say n1 where the node itself says n1.cluster."""
    return name.partition(".")[0]
