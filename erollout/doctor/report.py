"""The doctor's findings as a page, as JSON, and as lines for a batch script. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
"""Severity of a finding; error: training could not start, or not on this node."""
FINGERPRINT = "fingerprint"


@dataclass(frozen=True, slots=True)
class Finding:
    topic: str
    text: str
    level: Level = "ok"
    fix: str = ""
    """What the user can do about it; empty if nothing is wrong."""


def could_start(findings: Sequence[Finding]) -> bool:
    return all(finding.level != "error" for finding in findings)


def page(findings: Sequence[Finding]) -> str:
    """Good findings in columns, then problems with their fixes, errors first, then the verdict."""
    good = [finding for finding in findings if finding.level == "ok"]
    wrong = sorted((finding for finding in findings if finding.level != "ok"), key=lambda finding: finding.level)
    width = max((len(finding.topic) for finding in good), default=0)
    indent = "\n" + " " * (width + 2)
    rows = [f"{finding.topic:<{width}}  {indent.join(finding.text.splitlines())}" for finding in good]
    problems = [f"{_statement(finding)}\n    {_one_line(finding.fix)}".rstrip() for finding in wrong]
    return "\n".join([*rows, "", *problems, *([""] if problems else []), _verdict(findings)])


def as_json(host: str, findings: Sequence[Finding]) -> str:
    document = {"host": host, "could_start": could_start(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(document, indent=2)


def node_lines(host: str, findings: Sequence[Finding]) -> str:
    """One line per finding; the last one is `node HOST ok` or `node HOST bad: reason`."""
    reason = "; ".join(f"{finding.topic}: {_one_line(finding.text)}" for finding in findings if finding.level == "error")
    return "\n".join([*map(_line, findings), f"node {host} bad: {reason}" if reason else f"node {host} ok"])


def meeting_lines(host: str, findings: Sequence[Finding], problem: str, others: Mapping[str, str]) -> str:
    """As node_lines, after the problem of all nodes together and one line per other bad node."""
    known = [f"node {name} bad: {_one_line(reason)}" for name, reason in others.items()]
    return "\n".join([*([f"error: nodes: {_one_line(problem)}"] if problem else []), *known, node_lines(host, findings)])


def _line(finding: Finding) -> str:
    if finding.topic == FINGERPRINT:
        return f"{FINGERPRINT} {finding.text}"
    return "; ".join(filter(None, (_statement(finding), _one_line(finding.fix))))


def _statement(finding: Finding) -> str:
    return f"{finding.level}: {finding.topic}: {_one_line(finding.text)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _verdict(findings: Sequence[Finding]) -> str:
    errors = sum(finding.level == "error" for finding in findings)
    return f"training could not start: {errors} error{'s' * (errors > 1)}" if errors else "training could start"
