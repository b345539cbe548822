"""Workload of a simulated rollout: the length of every prompt and response, recorded or drawn."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from erollout.errors import UserError

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt and response lengths of one rollout of the whole cluster."""

    prompt_tokens: Integers
    """[prompts]"""
    response_tokens: Integers
    """[prompts, group_size], each at least 1."""

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_tokens)

    @property
    def group_size(self) -> int:
        return int(self.response_tokens.shape[1])

    @property
    def num_responses(self) -> int:
        return self.response_tokens.size

    @property
    def tokens(self) -> int:
        """Total tokens of all responses."""
        return int(self.response_tokens.sum())


class LengthSource(Protocol):
    """Source of workloads."""

    def draw(self, num_prompts: int, group_size: int, max_tokens: int, generator: np.random.Generator) -> Workload:
        """A rollout's workload; responses longer than max_tokens are cut there."""
        ...


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Responses with lognormal lengths, alike within a group; prompts of one length."""

    median: float
    sigma: float
    """Standard deviation of a length's natural logarithm."""
    correlation: float = 0.5
    """Correlation of the log lengths of two responses to one prompt: hard prompts have long answers."""
    prompt_tokens: int = 128

    def draw(self, num_prompts: int, group_size: int, max_tokens: int, generator: np.random.Generator) -> Workload:
        common = generator.standard_normal((num_prompts, 1)) * sqrt(self.correlation)
        own = generator.standard_normal((num_prompts, group_size)) * sqrt(1 - self.correlation)
        lengths = np.exp(log(self.median) + self.sigma * (common + own))
        return Workload(np.full(num_prompts, self.prompt_tokens), _cut(np.rint(lengths).astype(np.int64), max_tokens))


@dataclass(frozen=True, slots=True)
class LengthTrace:
    """Lengths of a recorded rollout: unchanged if the sizes agree, otherwise its groups are drawn with replacement."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    """Prompt tokens and response tokens, per prompt."""

    def draw(self, num_prompts: int, group_size: int, max_tokens: int, generator: np.random.Generator) -> Workload:
        sizes = {len(responses) for _, responses in self.groups}
        if len(self.groups) == num_prompts and sizes == {group_size}:
            return self._workload([list(responses) for _, responses in self.groups], range(num_prompts), max_tokens)
        chosen = generator.integers(len(self.groups), size=num_prompts).tolist()
        rows = []
        for index in chosen:
            responses = self.groups[index][1]
            enough = len(responses) >= group_size
            rows.append(generator.choice(responses, group_size, replace=not enough).tolist())
        return self._workload(rows, chosen, max_tokens)

    def _workload(self, rows: list[list[int]], chosen: Sequence[int], max_tokens: int) -> Workload:
        prompts = [self.groups[index][0] for index in chosen]
        return Workload(np.array(prompts, np.int64), _cut(np.array(rows, np.int64), max_tokens))


def read_trace(path: str | Path) -> LengthTrace:
    """Read the lengths from a file of `erollout rollout --out`. Raises UserError that names the faulty line."""
    groups: dict[int, tuple[int, list[int]]] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the length trace {path}: {error}; make it with `erollout rollout --out {path}`") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt, response = len(row["prompt_ids"]), len(row["response_ids"])
            groups.setdefault(int(row["prompt_index"]), (prompt, []))[1].append(response)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: {type(error).__name__} {error}; a line needs prompt_index, prompt_ids and "
                "response_ids, as `erollout rollout --out` writes them"
            ) from None
        if not response:
            raise UserError(f"{path}, line {number}: response_ids is empty; a response has at least one token")
    if not groups:
        raise UserError(f"the length trace {path} has no lines; make it with `erollout rollout --out {path}`")
    return LengthTrace(tuple((prompt, tuple(responses)) for prompt, responses in groups.values()))


def parse_lengths(text: str, prompt_tokens: int = 128) -> LengthSource:
    """Parse `lognormal:median,sigma[,correlation]`, or read the trace at a path. Raises UserError."""
    if not text.startswith("lognormal:"):
        return read_trace(text)
    try:
        values = [float(part) for part in text.removeprefix("lognormal:").split(",")]
        median, sigma, correlation = [*values, 0.5] if len(values) == 2 else values
    except ValueError:
        raise UserError(f"lengths {text!r} must be lognormal:median,sigma or lognormal:median,sigma,correlation") from None
    if not (1 <= median < inf and 0 <= sigma < inf and 0 <= correlation <= 1):
        raise UserError(f"lengths {text!r}: the median is at least 1, sigma at least 0, the correlation between 0 and 1")
    return Lognormal(median, sigma, correlation, prompt_tokens)


def _cut(lengths: Integers, max_tokens: int) -> Integers:
    return np.clip(lengths, 1, max_tokens)
