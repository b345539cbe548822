"""Types of numbers and paths in a configuration, with the least and largest sensible value of each number. Pure."""

import os.path
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic converts true to 1
        raise ValueError("Input should be a number")
    return value


def _location(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("Input should be a path")
    return os.path.expanduser(value)


def _temperature(value: float) -> float:
    if 0 < value < _COLDEST:  # logits divided by less overflow
        raise ValueError(f"Input should be 0 (greedy), or at least {_COLDEST}")
    return value


def _day(value: Any) -> Any:
    """A date as text; YAML parses it as a date."""
    text = value.isoformat() if isinstance(value, date) else value
    try:
        return date.fromisoformat(text).isoformat()
    except (TypeError, ValueError):
        raise ValueError("Input should be a day, as 2026-11-30") from None


_COLDEST = 0.01
_Number = BeforeValidator(_number)
Ranks = Annotated[int, Field(ge=1, le=100_000), _Number]
Steps = Annotated[int, Field(ge=1, le=10**9), _Number]
Interval = Annotated[int, Field(ge=0, le=10**9), _Number]
"""Steps between two events; for most keys 0 means never."""
Samples = Annotated[int, Field(ge=1, le=10**7), _Number]
"""Number of prompts, responses, sequences or groups."""
Tokens = Annotated[int, Field(ge=1, le=10**8), _Number]
Items = Annotated[int, Field(ge=1, le=10**9), _Number]
Blocks = Annotated[int, Field(ge=1, le=10**8), _Number]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1), _Number]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), _Number]
DraftLength = Annotated[int, Field(ge=1, le=64), _Number]
NGramLength = Annotated[int, Field(ge=1, le=16), _Number]
Window = Annotated[int, Field(ge=32, le=1_000_000), _Number]
"""Number of last tokens that are searched; more than the longest n-gram."""
Few = Annotated[int, Field(ge=1, le=10_000), _Number]
Seconds = Annotated[float, Field(ge=1e-3, le=604_800), _Number]
"""Seconds, from a millisecond to a week."""
Timeout = Annotated[int, Field(ge=1, le=10**7), _Number]
"""Seconds, at most four months."""
Temperature = Annotated[float, Field(ge=0, le=100), _Number, AfterValidator(_temperature)]
Fraction = Annotated[float, Field(ge=0, le=1), _Number]
Decay = Annotated[float, Field(ge=0, lt=1), _Number]
Coefficient = Annotated[float, Field(ge=0, le=1000), _Number]
Reward = Annotated[float, Field(ge=-1e9, le=1e9), _Number]
Location = Annotated[str, AfterValidator(_location)]
"""A path; `~` is the user's home directory."""
Day = Annotated[str, BeforeValidator(_day)]
Limit = Annotated[int, Field(ge=0, le=10**8), _Number]
PositiveFraction = Annotated[float, Field(ge=1e-6, le=1), _Number]
Penalty = Annotated[float, Field(ge=0.01, le=100), _Number]
GroupSize = Annotated[int, Field(ge=1, le=65_536), _Number]
Gibibytes = Annotated[float, Field(ge=1e-6, le=16_384), _Number]
Slots = Annotated[int, Field(ge=1, le=1_000_000), _Number]
SignedCoefficient = Annotated[float, Field(ge=-1000, le=1000), _Number]
Weight = Annotated[float, Field(ge=1e-6, le=1e6), _Number]
LearningRate = Annotated[float, Field(ge=1e-30, le=100), _Number]
"""Learning rate; the least one serves benchmarks of training that changes nothing."""
LeastLearningRate = Annotated[float, Field(ge=0, le=100), _Number]
Epsilon = Annotated[float, Field(ge=1e-30, le=1), _Number]
Norm = Annotated[float, Field(ge=0, le=1e9), _Number]
Heartbeat = Annotated[float, Field(ge=1e-3, le=20), _Number]
"""Seconds between heartbeats, at most 20: a batch script gives a run up whose ranks are silent for 90 s."""
SecondsOrNever = Annotated[float, Field(ge=0, le=1e7), _Number]
