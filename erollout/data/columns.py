"""Columns of a row: looked up by a dotted name, and read as a question or an answer."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from erollout.data.items import Message
from erollout.errors import UserError

_WRITTEN_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]")


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column or of a field inside one (`reward_model.ground_truth`); None: there is none.

    A column with exactly that name takes precedence. Objects stored as JSON text are parsed.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, str):
            value = _json(value)
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def required(row: Mapping[str, Any], column: str, key: str, origin: str) -> Any:
    """As look_up. Raises UserError, naming `key`, for a value that is missing, null or NaN (null in pandas)."""
    value = look_up(row, column)
    if value is None:
        raise UserError(f"{origin}: no column {column!r} ({_columns(row, column)}); fix the row or set {key}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{origin}: column {column!r} is NaN; fix or drop the row")
    return value


def question(value: Any, origin: str, column: str) -> str | tuple[Message, ...]:
    """A question: text, or messages that end with the user's. Raises UserError for anything else."""
    if isinstance(value, str):
        if not _WRITTEN_MESSAGES.match(value):
            return require_text(value, origin, column)
        if (parsed := _json(value)) is None:
            raise UserError(f"{origin}: column {column!r} looks like messages but is not valid JSON; store a list, or JSON")
        value = parsed
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(
            f"{origin}: column {column!r} must be text or a list of messages with role and content, not {_kind(value)}"
        )
    messages = tuple(_message(message, origin, column) for message in value)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{origin}: the messages of column {column!r} must end with one of role user")
    return messages


def require_text(text: str, origin: str, column: str) -> str:
    """Return the text. Raises UserError for half a character (a lone surrogate), which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"{origin}: column {column!r} holds half a character, {half} at position {error.start}; fix or drop the row"
        ) from error
    return text


def _message(message: Mapping[str, Any], origin: str, column: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, origin, column) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{origin}: column {column!r} must be text or a list of messages with role and content, both text")
    return {"role": role, "content": require_text(content, origin, column)}


def _part(part: Any, origin: str, column: str) -> str:
    """The text of a content part: text, or an object of type text."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise UserError(f"{origin}: column {column!r} has a content part of type {kind!r}; only text can be trained on")


def _columns(row: Mapping[str, Any], column: str) -> str:
    """The available columns, for messages, as deep as the dotted name leads."""
    path, value = "", row
    for part in column.split("."):
        inner = value.get(part)
        inner = _json(inner) if isinstance(inner, str) else inner
        if not isinstance(inner, Mapping):
            break
        path, value = f"{path}{part}.", inner
    names = ", ".join(f"{path}{name}" for name, found in value.items() if found is not None)
    return f"columns: {names or 'none'}"


def _json(text: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _kind(value: Any) -> str:
    return type(value).__name__
