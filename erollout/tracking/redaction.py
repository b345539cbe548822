"""Keeps credentials of URIs out of logs, parameters and files."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]*@(?=[^/\s])")


def redact(text: str) -> str:
    """A URI, or a text with URIs in it, without their user names and passwords."""
    return _CREDENTIALS.sub("", text)
