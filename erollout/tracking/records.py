"""Records of the journal by kind. A damaged line must not end a command."""

import json
from typing import Any

_FIELDS: dict[str, dict[str, type]] = {
    "start": {"run_id": str, "uri": str},
    "new": {"mark": str},
    "saved": {"step": int},
    "metrics": {"step": int, "values": dict},
    "params": {"values": dict, "changed": dict},
    "tags": {"values": dict},
    "artifact": {"file": str, "folder": str},
    "dataset": {"name": str, "source": str, "digest": str, "context": str},
    "status": {"status": str},
}
_MOST = 2**62
"""Larger than any step and any time in milliseconds."""


def decode(line: bytes) -> dict[str, Any] | None:
    """Decode a line; None if it is not a valid record: torn, damaged, or of an unknown kind or type."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_whole(record) else None


def _is_whole(record: dict[str, Any]) -> bool:
    fields = _FIELDS.get(str(record.get("kind")))
    if fields is None or not all(isinstance(record.get(name), kind) for name, kind in fields.items()):
        return False
    numbers = [record["time"], record.get("step") or 0] if "time" in record else []
    if not numbers or not all(isinstance(number, int) and abs(number) < _MOST for number in numbers):
        return False
    if record["kind"] != "metrics":
        return True
    repeated = record.get("repeated", {})
    return isinstance(repeated, dict) and all(map(_is_number, [*record["values"].values(), *repeated.values()]))


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or the text of `nan` or `inf`, which JSON lacks."""
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
