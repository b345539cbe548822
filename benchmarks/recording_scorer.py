"""The scorer of recorded_runs.py, which copies it under each run's name: it writes down all that it scores.

A file NAME.stop has the index of a prompt from which on it waits for the run to be stopped.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__)
SCORED = HERE.with_suffix(".scored")


def score(prompt: Any, response: str) -> float:
    """Share of digits."""
    SCORED.mkdir(exist_ok=True)
    row = json.dumps([prompt.index, list(prompt.prompt_ids), response]) + "\n"
    with open(SCORED / f"{os.getpid()}.jsonl", "a") as file:
        file.write(row)
    stop = HERE.with_suffix(".stop")
    if stop.exists() and prompt.index >= int(stop.read_text()):
        HERE.with_suffix(".reached").touch()
        time.sleep(60)
    return sum(character.isdigit() for character in response) / max(1, len(response))
