"""math-verify: symbolic comparison of the final answer with the reference. The default for dataset files."""

import logging
from typing import Any

from math_verify import parse, verify

from erollout.rewards.answers import marked_answer
from erollout.types import Prompt

# math-verify warns in every process that its own time limits are off; they rest on signals, and the pool has better ones
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def score(prompt: Prompt, response: str) -> float:
    """1 when the response's answer equals the reference. Raises ValueError for a reference that math-verify can't read."""
    reference = str(prompt.item["answer"])
    gold = _parse_reference(reference)
    if not gold:
        raise ValueError(f"math-verify can't read the reference answer {reference[:80]!r}")
    return float(verify(gold, _parse_response(response), timeout_seconds=None))


def _parse_reference(text: str) -> list[Any]:
    """A bare reference is all answer: in running text, math-verify would take the 1 of x^2 - 1."""
    marked = marked_answer(text)
    return _parse_marked(text if marked is None else marked) or list(parse(text, parsing_timeout=None))


def _parse_response(text: str) -> list[Any]:
    """The marked answer; without a mark, whatever math-verify finds in the text."""
    marked = marked_answer(text)
    return list(parse(text, parsing_timeout=None)) if marked is None else _parse_marked(marked)


def _parse_marked(answer: str) -> list[Any]:
    return list(parse("\\boxed{" + answer.strip().strip("$") + "}", parsing_timeout=None))
