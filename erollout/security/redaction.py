"""Detection and removal of credentials in URIs, for configurations and error messages. Light.

A password is found as meant by the user, even in an invalid URI: with a slash, an at sign or a question mark in it. In doubt
too much is removed.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>\S+)")
_BEGINS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NAMED = re.compile(r"[?&;#\s](?P<name>[^=&;?#\s]+)=")
_PARAMETER = re.compile(r"(?P<before>[?&;#](?P<name>[^=&;?#\s]+)=)\S+")
"""A parameter of a URI, also where a library names only the path."""
_NAMES = re.compile(
    r"(pass(word|wd|phrase|code)?|pwd?|token|secret|credentials?|signature|sig|auth(orization)?|bearer|jwt"
    r"|(^|[-_.])(sas|pat)|(api|access|account|secret|shared|private)[-_]?key)$",
    re.I,
)
"""Endings of names of parameters with secret values."""
_COUNTS = re.compile(
    r"(max|min|num|new|next|page|continuation|start|stop|end|bos|eos|pad|unk|mask|sep)([-_]\w+)?[-_]?token", re.I
)
"""Names with the same endings that are counts or positions in a text."""
_WHOLE = re.compile(r"(^|[._])ur[il]$", re.I)
"""Keys whose value is one URI; any other value is a text that may contain some."""
_PORT = re.compile(r"[^\s:/@]+:\d{1,5}/")
HIDDEN = "***"


def redact(text: str) -> str:
    """A URI, or a text with URIs, without user names and passwords."""
    if begins := _BEGINS.match(text):  # a password may contain a blank
        text = begins[0] + _public(text[begins.end() :])
    text = _URI.sub(lambda found: f"{found['scheme']}://{_public(found['rest'])}", text)
    return _PARAMETER.sub(lambda found: found["before"] + HIDDEN if _is_secret(found["name"]) else found[0], text)


def has_credentials(uri: str) -> bool:
    """Whether a URI contains a password. A user name alone is none, except for web schemes, where it may be a token."""
    scheme, _, rest = uri.partition("://")
    user, rest = _split(rest)
    is_token = bool(user) and scheme.lower().startswith("http")
    return is_token or ":" in unquote(user) or _secret_part(unquote(rest)) is not None


def keys_with_credentials(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of a nested structure whose values contain a password."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from keys_with_credentials(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from keys_with_credentials(value, key)
    elif isinstance(tree, str) and (has_credentials(tree) if _WHOLE.search(key) and "://" in tree else _in_text(tree)):
        yield key, tree


def _in_text(text: str) -> bool:
    """Whether a URI in a text contains a password. An `@` after a port and a slash belongs to the path."""
    for found in _URI.finditer(text):
        rest = found["rest"].replace("@", "") if _PORT.match(found["rest"]) else found["rest"]
        if has_credentials(f"{found['scheme']}://{rest}"):
            return True
    return False


def _is_secret(name: str) -> bool:
    return bool(_NAMES.search(name)) and not _COUNTS.fullmatch(name)


def _public(rest: str) -> str:
    """The part after `scheme://`, without credentials."""
    rest = _split(rest)[1]
    if (start := _secret_part(rest)) is not None:  # its value may contain any character
        return rest[:start] + HIDDEN
    path, _, query = rest.partition("?")
    return rest if _secret_part(f"?{unquote(query)}") is None else f"{path}?{HIDDEN}"


def _secret_part(rest: str) -> int | None:
    """Start of the value of the first secret parameter."""
    return next((found.end() for found in _NAMED.finditer(rest) if _is_secret(found["name"])), None)


def _split(rest: str) -> tuple[str, str]:
    """User and password, and the rest after their `@`."""
    authority = rest.partition("/")[0]  # empty for a path, in which an `@` belongs to a name
    first, at, _ = authority.partition("@")
    if at and ":" not in first:
        return first, rest[len(first) + 1 :]
    if ":" in authority and "@" in rest:
        user, _, behind = rest.rpartition("@")
        return user, behind
    return "", rest
