"""What the doctor found, as a page, as JSON, and as the lines that a batch script reads. Pure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
"""error: training could not start, or not on this node."""


@dataclass(frozen=True, slots=True)
class Finding:
    topic: str
    text: str
    level: Level = "ok"
    fix: str = ""
    """What the user can do about it; empty where nothing is wrong."""


def could_start(findings: Sequence[Finding]) -> bool:
    return all(finding.level != "error" for finding in findings)


def page(findings: Sequence[Finding]) -> str:
    """Everything in columns, then what is wrong with its fix, then the verdict."""
    width = max((len(finding.topic) for finding in findings), default=0)
    indent = "\n" + " " * (width + 2)
    rows = [f"{finding.topic:<{width}}  {indent.join(finding.text.splitlines())}" for finding in findings]
    wrong = [finding for finding in findings if finding.level != "ok"]
    if wrong:
        rows += ["", *(_sentence(finding) for finding in sorted(wrong, key=lambda finding: finding.level))]
    return "\n".join([*rows, "", _verdict(findings)])


def as_json(host: str, findings: Sequence[Finding]) -> str:
    document = {"host": host, "could_start": could_start(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(document, indent=2)


def node_lines(host: str, findings: Sequence[Finding]) -> str:
    """One line for each finding; the last one is `node HOST ok` or `node HOST bad: reason`."""
    errors = [finding for finding in findings if finding.level == "error"]
    reason = "; ".join(f"{finding.topic}: {_one_line(finding.text)}" for finding in errors)
    return "\n".join([*map(_sentence, findings), f"node {host} bad: {reason}" if errors else f"node {host} ok"])


def _sentence(finding: Finding) -> str:
    return f"{finding.level}: {finding.topic}: {_one_line(finding.text)}" + (
        f"; {_one_line(finding.fix)}" if finding.fix else ""
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _verdict(findings: Sequence[Finding]) -> str:
    errors = sum(finding.level == "error" for finding in findings)
    return f"training could not start: {errors} error{'s' * (errors > 1)}" if errors else "training could start"
