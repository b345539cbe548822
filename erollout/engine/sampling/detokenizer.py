"""Detection of stop strings in a response during generation, token by token."""

from collections.abc import Sequence

from erollout.data.response_text import ResponseText
from erollout.errors import UserError

_INCOMPLETE = "\ufffd"
"""Replacement character of a decoder for bytes that are not a complete UTF-8 character (yet)."""
_MAX_PENDING = 16
"""Number of tokens to wait for the rest of a character of at most 4 bytes; after that the bytes count as invalid."""


class StopStringDetector:
    """Detects when one of the stop strings has appeared in a response's text, as it is scored.

    A token's own text depends on the tokens before it (a character's first bytes; a leading space, which SentencePiece drops at
    the start), so a short window of tokens is decoded with and without the new one, and the difference is the new text.
    """

    def __init__(self, text: ResponseText, stop: Sequence[str]) -> None:
        if not stop or not all(stop):
            raise UserError(f"rollout.stop = {list(stop)!r} must hold non-empty strings; remove the empty one")
        self._decode = text
        self._stop = tuple(stop)
        self._keep = max(map(len, stop)) - 1
        self._tail = ""  # end of the settled text, where an incomplete stop string may begin
        self._window: list[int] = []  # tokens of the last settled text, then the pending ones
        self._settled = 0
        self._settled_text = ""  # text of the window's first `settled` tokens

    def feed(self, token_id: int) -> bool:
        """Append a token of the response; True if its text now holds a stop string."""
        self._window.append(token_id)
        new = self._decode(self._window)[len(self._settled_text) :]
        text = self._tail + new
        if any(stop in text for stop in self._stop):
            return True
        pending = len(self._window) - self._settled
        if new and (not new.endswith(_INCOMPLETE) or pending > _MAX_PENDING):
            self._settle(text)
        return False

    def _settle(self, text: str) -> None:
        self._tail = text[-self._keep :] if self._keep else ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._settled_text = self._decode(self._window)
