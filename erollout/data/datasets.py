"""Training and test sets from a configuration."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.config import DataConfig
from erollout.data.chain_sum import ChainSumSource, parse_args
from erollout.data.prompts import PromptDataset, PromptLimits, PromptRenderer
from erollout.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def build_datasets(
    data: DataConfig, limits: PromptLimits, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[PromptDataset, PromptDataset | None]:
    """(train, test); no test set for kind `file` without data.test_files. Raises UserError for an impossible configuration.

    Without data.train_files, for commands that don't train, the test set stands for both.

    A kind's module is imported on demand: reasoning-gym and pyarrow take a second each.
    """
    renderer = PromptRenderer(data, tokenizer)
    if data.kind == "file":
        return _file_datasets(data, limits, renderer)
    if data.kind == "chain_sum_cot":
        args = parse_args(data.args)
        return (
            PromptDataset(ChainSumSource(args, data.train_seed, data.train_size, "train"), renderer, limits),
            PromptDataset(ChainSumSource(args, data.test_seed, data.test_size, "test"), renderer, limits),
        )
    from erollout.data.tasks import ReasoningGymSource

    return (
        PromptDataset(ReasoningGymSource(data.tasks, data.train_seed, data.train_size), renderer, limits),
        PromptDataset(ReasoningGymSource(data.tasks, data.test_seed, data.test_size), renderer, limits),
    )


def _file_datasets(
    data: DataConfig, limits: PromptLimits, renderer: PromptRenderer
) -> tuple[PromptDataset, PromptDataset | None]:
    """File datasets: training rows shuffled by data.train_seed, test rows in order. Lengths are checked before the run."""
    from erollout.data.dataset_file import FileSource

    if len(data.tasks) > 1:
        raise UserError(f"data.tasks names {len(data.tasks)} tasks but data.kind = file takes one name at most; merge them")
    if both := {Path(path).resolve() for path in data.train_files} & {Path(path).resolve() for path in data.test_files}:
        raise UserError(f"{both.pop()} is in data.train_files and in data.test_files; hold other rows out for the test")
    task = data.tasks[0].name if data.tasks else None
    if not data.train_files:
        test = _held_out(data, limits, renderer, task)
        return test, test
    train_source = FileSource(data.train_files, data.prompt_column, data.answer_column, task, data.train_seed)
    train = PromptDataset(train_source, renderer, limits)
    train.check(train_source.items)
    if not data.test_files:
        return train, None
    test = _held_out(data, limits, renderer, task)
    seen = {str(item.question) for item in train_source.items}
    shared = sum(str(test.item(index).question) in seen for index in range(len(test)))
    if shared:
        logger.warning(
            "%d of %d test questions are also in data.train_files: held-out accuracy will be too high", shared, len(test)
        )
    return train, test


def _held_out(data: DataConfig, limits: PromptLimits, renderer: PromptRenderer, task: str | None) -> PromptDataset:
    from erollout.data.dataset_file import FileSource

    source = FileSource(data.test_files, data.prompt_column, data.answer_column, task, None)
    test = PromptDataset(source, renderer, limits)
    test.check(source.items)
    return test
