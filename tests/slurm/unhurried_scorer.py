"""A scorer that makes a tiny run's steps last: there is time to disturb it. Scoring processes import it: it must be light."""

import time

from toy_scorer import share_of_digits as score

from erollout.types import Prompt

_SECONDS = 0.03
"""A rank scores eight responses in a step."""


def share_of_digits(prompt: Prompt, response: str) -> float:
    time.sleep(_SECONDS)
    return score(prompt, response)
