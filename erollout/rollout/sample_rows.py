"""Rows that show what was sampled: for the samples table, and whole steps as JSON lines."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erollout.data.items import TaskItem
from erollout.data.prompts import PromptDataset
from erollout.resilience.atomic_write import write_atomically
from erollout.types import Rollout, ScoredRollout


def sample_rows(scored: Iterable[ScoredRollout], data: PromptDataset, text: Callable[[Rollout], str]) -> list[dict[str, Any]]:
    """A row per response: task, prompt without chat template, response, reference answer, reward.

    Args:
        data: the dataset that the prompts are from.
        text: the response as the scorer sees it.
    """
    return [_row(sample, data.item(sample.rollout.prompt_index), text(sample.rollout)) for sample in scored]


def write_rollouts(path: Path, scored: Sequence[ScoredRollout], data: PromptDataset, text: Callable[[Rollout], str]) -> None:
    """Write one JSON line per response: as in the samples table, with token ids, log-probs and version. Raises OSError."""
    rows = zip(sample_rows(scored, data, text), scored, strict=True)
    lines = [json.dumps(row | asdict(sample.rollout), ensure_ascii=False, default=str) for row, sample in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogatepass"))


def _row(sample: ScoredRollout, item: TaskItem, text: str) -> dict[str, Any]:
    rollout = sample.rollout
    return {
        "task": sample.task,
        "prompt_index": rollout.prompt_index,
        "sample_index": rollout.sample_index,
        "prompt": _question(item),
        "response": text,
        "reference": _reference(item),
        "reward": sample.reward,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.response_ids),
    }


def _question(item: TaskItem) -> str:
    """The question, or the whole conversation with roles if there is more than one message."""
    if isinstance(item.question, str):
        return item.question
    if len(item.question) == 1:
        return item.question[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in item.question)


def _reference(item: TaskItem) -> str | None:
    entry = item.record.get("entry", item.record)  # reasoning-gym keeps its own record
    answer = entry.get("answer") if isinstance(entry, dict) else None
    return None if answer is None else str(answer)
