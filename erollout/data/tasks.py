"""Generated tasks of reasoning-gym, one or a weighted mixture.

reasoning-gym draws most items from seed + index, but three tasks (acre, gsm_symbolic, list_functions) also plan a whole
dataset from its seed and size, acre in time proportional to the size, and word_ladder refuses more than 20,000 items.
So items come in blocks: a block is a dataset of its own whose seed is the seed of its first item. Ranges of seeds that
don't overlap then give items that don't, for every task.

Every rank must see the same item at an index, and so must a restarted run. A few tasks break that: they are refused.
"""

import difflib
import itertools
import random
import sys
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from erollout.configuration.keys import TaskConfig
from erollout.data.items import TaskItem
from erollout.errors import UserError

BLOCK_SIZE = 500
HASH_DEPENDENT = frozenset({"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"})
"""Tasks that iterate over sets of strings, whose order differs between processes unless Python's hash seed is fixed."""
UNREPEATABLE = frozenset({"codeio"})
"""Tasks that draw from an unseeded generator."""
_MANAGED = {"seed": "data.train_seed and data.test_seed", "size": "data.train_size and data.test_size"}


class ReasoningGymSource:
    """Item i is drawn from task weights and seed + i alone."""

    def __init__(self, tasks: tuple[TaskConfig, ...], seed: int, size: int) -> None:
        """Raises UserError for an unknown task, arguments that the task rejects, or seeds too large for NumPy."""
        if seed + size > 2**32:
            raise UserError(
                f"data: reasoning-gym takes seeds below 2^32, not {seed + size - 1}; lower data.train_seed or test_seed"
            )
        for position, task in enumerate(tasks):
            _check(position, task)
        self._tasks = tasks
        self._cumulative_weights = list(itertools.accumulate(task.weight for task in tasks))
        self._seed = seed
        self._size = size
        self._block = lru_cache(maxsize=2 * len(tasks))(self._make_block)

    def __len__(self) -> int:
        return self._size

    def item(self, index: int) -> TaskItem:
        index %= self._size
        position = self._choose(index)
        task = self._tasks[position]
        block, offset = divmod(index, BLOCK_SIZE)
        entry = self._block(position, block)[offset]
        return TaskItem(
            question=entry["question"],
            solution=entry["answer"],
            task=task.name,
            record={"entry": entry, "args": task.args},
            origin=f"{task.name} item {self._seed + index}",
        )

    def _choose(self, index: int) -> int:
        """Position of an item's task. The key is not the item's own seed, which would tie its content to the choice."""
        rng = random.Random(f"mixture {self._seed + index}")
        return rng.choices(range(len(self._tasks)), cum_weights=self._cumulative_weights)[0]

    def _make_block(self, position: int, block: int) -> Any:
        task = self._tasks[position]
        return reasoning_gym.create_dataset(task.name, seed=self._seed + block * BLOCK_SIZE, size=BLOCK_SIZE, **task.args)


def _check(position: int, task: TaskConfig) -> None:
    key = f"data.tasks.{position}"
    known = sorted(set(DATASETS) - {"composite"})
    if task.name not in known:
        near = difflib.get_close_matches(task.name, known, n=1, cutoff=0.0)[0]
        hint = "; list its parts in data.tasks with weights" if task.name == "composite" else f"; did you mean {near}?"
        raise UserError(f"{key}.name = {task.name!r} is not a reasoning-gym task{hint}")
    if task.name in UNREPEATABLE:
        raise UserError(f"{key}.name = {task.name!r}: its items differ between ranks and runs; use another task")
    if task.name in HASH_DEPENDENT and sys.flags.hash_randomization:
        raise UserError(f"{key}.name = {task.name!r}: its items depend on Python's string hashes; start with PYTHONHASHSEED=0")
    for name in _MANAGED.keys() & task.args.keys():
        raise UserError(f"{key}.args.{name} can't be set for one task; use {_MANAGED[name]}")
    config_class = DATASETS[task.name][1]
    fields = [name for name in config_class.__dataclass_fields__ if name not in _MANAGED]
    for name in task.args:
        if name not in fields:
            near = (difflib.get_close_matches(name, fields, n=1) or [", ".join(fields)])[0]
            raise UserError(f"{key}.args.{name} is not an argument of {task.name}; did you mean {near}?")
    try:
        reasoning_gym.create_dataset(task.name, seed=0, size=BLOCK_SIZE, **task.args)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{key}.args = {task.args!r}: {task.name} refuses them: {error}") from error
