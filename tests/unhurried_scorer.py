"""Scorers that make the steps of a tiny run last: there is time to disturb it. Scoring processes import them, so: light."""

import time

from toy_scorer import share_of_digits

from erollout.types import Prompt

RESPONSES = 8
"""That a rank scores in a step, of two ranks."""


def half_a_second(prompt: Prompt, response: str) -> float:
    time.sleep(0.5 / RESPONSES)
    return share_of_digits(prompt, response)


def a_second(prompt: Prompt, response: str) -> float:
    time.sleep(1.0 / RESPONSES)
    return share_of_digits(prompt, response)
