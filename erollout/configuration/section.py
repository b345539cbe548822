"""What a section of the configuration is: a frozen dataclass that refuses unknown keys and numbers that are none. Pure."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

section = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
