"""Comparison of the final answer with the reference, by value: exact where both are numbers, else symbolic by math-verify.
The default for dataset files."""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from erollout.rewards.math_text import Answer, final_answers, only_value, read_answer
from erollout.types import Prompt

# math-verify warns in every process that its own time limits are off; they rest on signals, and the pool has better ones
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def score(prompt: Prompt, response: str) -> float:
    """1 if the response's answer equals the reference. Raises ValueError, naming the row, for an unreadable reference."""
    reference = str(prompt.item["answer"])
    try:
        gold = _gold(reference)
    except ValueError as error:
        raise ValueError(f"{prompt.item.get('origin', 'reference')}: {error}") from error
    said = final_answers(response)
    if said:
        return float(_equal(gold, read_answer(said[0])))
    whole = read_answer(response)
    if gold.choice is not None or gold.is_words or whole.number is not None:
        return float(_equal(gold, whole))
    return float(verify(_parsed(gold), list(parse(response, parsing_timeout=None)), timeout_seconds=None))


@lru_cache(maxsize=4096)
def _gold(reference: str) -> Answer:
    """The parsed reference. Raises ValueError if it is empty or can't be compared."""
    said = final_answers(reference) or [reference]
    gold = read_answer(said[0])
    if not gold.text or gold.text.lower() in ("nan", "none", "null"):
        raise ValueError(f"the reference answer {reference[:80]!r} is empty")
    if gold.number is None and not gold.is_words and not _parsed(gold):
        raise ValueError(f"math-verify can't read the reference answer {reference[:80]!r}")
    return gold


def _equal(gold: Answer, answer: Answer) -> bool:
    """Whether answers are equal: words and letters of choices as text, all else by value, in one unit if both name one."""
    if gold.unit and answer.unit and gold.unit[0] == answer.unit[0] and gold.unit != answer.unit:
        return False
    if gold.base != answer.base and None not in (gold.base, answer.base):
        return False
    if _folded(gold) == _folded(answer):
        return bool(gold.text)
    if gold.base is not None or answer.base is not None:
        return False
    if gold.choice is not None and gold.text.strip("()[]. ") == gold.choice:  # a small letter is a variable
        return gold.choice == answer.choice
    if gold.number is not None and answer.number is not None and gold.percent == answer.percent:
        if gold.number == answer.number:
            return True
        if gold.number.denominator == answer.number.denominator == 1:
            return False
    if gold.is_words:
        return False
    if answer.number is None and (value := only_value(answer)) is not None and _equal(gold, value):
        return True
    if answer.is_words:
        return False
    return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=None))


def _folded(answer: Answer) -> str:
    return re.sub(r"(?<!\d)\s|\s(?!\d+/)", "", answer.text).casefold()  # 2 1/2 is not 21/2


def _parsed(answer: Answer) -> list[Any]:
    text = answer.text
    if answer.number is not None:  # without its unit, whose letters would be variables
        number = answer.number
        text = str(number) if number.denominator == 1 else _written(answer)
        text += r"\%" if answer.percent else ""
    return list(parse("\\boxed{" + text + "}", parsing_timeout=None))


def _written(answer: Answer) -> str:
    """A fraction; or a decimal, which math-verify takes for rounded."""
    number = answer.number
    assert number is not None
    if "." in answer.text and "/" not in answer.text and 1e-4 < abs(number) < 1e15:
        return f"{float(number):.15g}"
    return rf"\frac{{{number.numerator}}}{{{number.denominator}}}"
