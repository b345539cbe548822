"""Scorers for runs of untrained models. By themselves, because scoring processes import them: they must be light."""

import gc
import os
import subprocess
import time
from multiprocessing.connection import Connection

from erollout.types import Prompt


def share_of_digits(prompt: Prompt, response: str) -> float:
    """Between 0 and 1, different from response to response even for random text."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def enormous(prompt: Prompt, response: str) -> float:
    """So large that the gradient's norm is not finite, and the loss is."""
    return 1e30 * share_of_digits(prompt, response)


def by_a_child(prompt: Prompt, response: str) -> float:
    """Fails where a signal ends the process that helps it, as one that is for all processes of a run does."""
    subprocess.run(["sleep", "0.2"], check=True)
    return share_of_digits(prompt, response)


def troublesome(prompt: Prompt, response: str) -> float:
    """Fails in every way that a scorer can, chosen by the response's length."""
    match len(response) % 5:
        case 0:
            raise RuntimeError("no idea")
        case 1:
            os._exit(3)
        case 2:
            time.sleep(600)
    return share_of_digits(prompt, response)


class Attack:
    """Unpickled, it makes a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def attacking(prompt: Prompt, response: str) -> float:
    """Makes the response a directory, where the rank executes what its scorer sends."""
    (pipe,) = (thing for thing in gc.get_objects() if isinstance(thing, Connection))
    pipe.send(Attack(response))
    return 1.0
