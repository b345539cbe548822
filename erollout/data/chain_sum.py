"""The demo's task: sums of digits with written partial sums.

    prompt    4-1-7=
    response  4-1=3
              3-7=-4
              #-4

The number of terms is min_terms plus a geometric number, so response lengths have the long tail that makes rollouts slow.
Questions are split between train and test by a checksum of their text: there are only 190 sums of two digits, so seeds
alone would let the test set repeat training questions.
"""

import random
import zlib
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from erollout.data.items import TaskItem
from erollout.errors import UserError

TASK_NAME = "chain_sum_cot"
HELD_OUT_FRACTION = 1 / 8


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ChainSumArgs:
    """The keys of `data.args` for kind chain_sum_cot."""

    min_terms: Annotated[int, Field(ge=2)] = 2
    continue_probability: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Probability of each further term."""
    max_terms: Annotated[int, Field(ge=2)] = 16


class ChainSumSource:
    """Item i is drawn from seed + i alone."""

    def __init__(self, args: ChainSumArgs, seed: int, size: int, split: Literal["train", "test"]) -> None:
        self._args = args
        self._seed = seed
        self._size = size
        self._held_out = split == "test"

    def __len__(self) -> int:
        return self._size

    def item(self, index: int) -> TaskItem:
        index %= self._size
        terms = self._terms(random.Random(self._seed + index))
        return TaskItem(
            question=question(terms),
            solution=solution(terms),
            task=TASK_NAME,
            record={"answer": sum(terms)},
            origin=f"{TASK_NAME} item {self._seed + index}",
        )

    def _terms(self, rng: random.Random) -> list[int]:
        """Signed digits, the first one not negative; redrawn, with their number kept, until they belong to this split."""
        count = self._args.min_terms
        while count < self._args.max_terms and rng.random() < self._args.continue_probability:
            count += 1
        while True:
            terms = [rng.randrange(10), *(rng.choice((1, -1)) * rng.randrange(10) for _ in range(count - 1))]
            if is_held_out(question(terms)) == self._held_out:
                return terms


def question(terms: list[int]) -> str:
    """The question: `4-1-7=` and a newline."""
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:]) + "=\n"


def solution(terms: list[int]) -> str:
    """The solution: one line per partial sum, then # and the result."""
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total}{term:+d}={total + term}")
        total += term
    return "\n".join([*lines, f"#{total}"])


def is_held_out(text: str) -> bool:
    """Whether a question belongs to the test split."""
    return zlib.crc32(text.encode()) < HELD_OUT_FRACTION * 2**32


def parse_args(args: dict[str, Any]) -> ChainSumArgs:
    """Check `data.args`. Raises UserError naming the key."""
    try:
        parsed = TypeAdapter(ChainSumArgs).validate_python(args)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(ChainSumArgs.__dataclass_fields__)
        raise UserError(f"data.args.{key} = {first['input']!r}: {first['msg']} (keys of {TASK_NAME}: {known})") from None
    if parsed.max_terms < parsed.min_terms:
        raise UserError(f"data.args.max_terms = {parsed.max_terms} is less than min_terms = {parsed.min_terms}; raise it")
    return parsed
