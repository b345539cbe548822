"""The final answer in a response, and the two scorers that only compare text or integers.

No import beyond the standard library: scoring processes load this first.
"""

import re

from erollout.types import Prompt

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_INTEGER = re.compile(r"[+-]?[0-9]+")


def marked_answer(response: str) -> str | None:
    """The answer that the response marks as final, stripped; None when it marks none.

    In this order: the last <answer>...</answer>; the last \\boxed{...}; what follows the last ####; what follows a # that
    starts a line and is the only # of the response (grids and headings are full of them).
    """
    if tags := _ANSWER_TAG.findall(response):
        return str(tags[-1]).strip()
    if (boxed := _last_boxed(response)) is not None:
        return boxed.strip()
    if "####" in response:
        return response.rpartition("####")[2].strip()
    before, mark, after = response.partition("#")
    if mark and "#" not in after and (not before or before.endswith("\n")):
        return after.strip()
    return None


def final_answer(response: str) -> str:
    """The marked answer, else the whole response, stripped."""
    marked = marked_answer(response)
    return response.strip() if marked is None else marked


def exact_match(prompt: Prompt, response: str) -> float:
    """1 when the final answer is the reference, character for character after stripping; for `rewards.function`."""
    return float(final_answer(response) == str(prompt.item["answer"]).strip())


def integer_match(prompt: Prompt, response: str) -> float:
    """1 when the text after the last # is exactly the reference integer; nothing may follow it. The chain sums' scorer."""
    mark, text = response.rpartition("#")[1:]
    text = text.strip()
    return float(bool(mark) and _INTEGER.fullmatch(text) is not None and int(text) == prompt.item["answer"])


def _last_boxed(response: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces."""
    found = list(_BOXED.finditer(response))
    if not found:
        return None
    begin = found[-1].end()
    depth = 1
    for position in range(begin, len(response)):
        depth += {"{": 1, "}": -1}.get(response[position], 0)
        if depth == 0:
            return response[begin:position]
    return None
