"""Saves and restores a run: Megatron's distributed checkpoint of model and optimizer, and a small JSON of the rest.

A checkpoint is a directory `step_00000010`. It is written under another name, in the background where that is asked for, and
renamed once every file is there, so a crash while saving leaves the previous ones as they were. One whose files are damaged
is set aside for the one before. The sharded format is independent of the layout: a run goes on
with another tensor x pipeline x data split. Random numbers need no state: they are functions of (seed, step, prompt, position).
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from erollout.checkpoint.manifest import (
    STATE,
    complete_checkpoints,
    damage,
    finish_publishing,
    leaves,
    publish,
    remove,
    total_bytes,
    write_manifest,
)
from erollout.checkpoint.resume import RunKind, changes, configuration, identity, read_state, require_resumable
from erollout.checkpoint.writing import Writing
from erollout.errors import UserError
from erollout.parallel.collectives import all_gather, from_rank_zero, on_rank_zero
from erollout.policy.actor import Actor
from erollout.policy.optimizer import restore_optimizer
from erollout.rollout.partial import KeptRollouts
from erollout.security.unpickling import load_metadata

logger = logging.getLogger(__name__)

_FAILURES = (OSError, RuntimeError, KeyError, UnpicklingError, CheckpointingException, CheckpointException)
"""What the two checkpoint libraries raise for files they can't write or read; the last is not even an Exception."""

_INDEX = ".metadata"
"""torch.distributed's file of which tensors are where."""
_COMMON = "common.pt"
"""Megatron's file of what is not sharded."""
KEPT = "rollouts.npz"
"""File of RunState.kept, which may be large."""

# Optimizer state that any layout can read back.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, slots=True)
class RunState:
    """What a resumed run continues from, beside the tensors."""

    step: int
    """Steps done; also the number of the next step and the policy version."""
    run_id: str | None
    """MLflow run."""
    history: tuple[dict[str, float], ...] = ()
    """Held-out evaluations so far."""
    rollout: dict[str, Any] | None = None
    """What the rollout worker has learnt: acceptance, costs, lengths. None: nothing yet."""
    kept: KeptRollouts | None = None
    """Of the next step's rollout, which was interrupted. None: it was not begun."""
    date: str | None = None
    """Day that a chat template with a clock is told, as 2026-11-30. None: of a checkpoint that doesn't say."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint that is being written."""

    writing: Writing
    target: Path
    state: str
    """Contents of STATE."""
    kept: KeptRollouts | None
    began: float

    @property
    def partial(self) -> Path:
        return self.target.with_name(f"{self.target.name}.partial")


class Checkpointer:
    def __init__(self, directory: Path, keep_last: int, actor: Actor, kind: RunKind, asynchronous: bool = False) -> None:
        """
        Args:
            kind: what the run does with the policy, so that it does not go on with another kind's optimizer.
            asynchronous: `save` takes a copy, and a thread writes it.
        """
        self.directory = directory
        self.keep_last = keep_last
        self.actor = actor
        self.kind = kind
        self.asynchronous = asynchronous
        self._pending: _Pending | None = None

    def save(self, state: RunState) -> None:
        """Collective. When it returns, the policy may change; asynchronous: the checkpoint counts only after `wait`, or some
        `advance`. Raises UserError when the files, or those of the save before, can't be written; earlier ones are untouched.
        """
        self.wait()
        target = self.directory / f"step_{state.step:08d}"
        partial = self.directory / f"{target.name}.partial"
        self._on_rank_zero(lambda: self._prepare(partial))
        with self._saving(target):
            sharded = self._sharded_state(self.actor.num_updates, is_loading=False)
            plan = dist_checkpointing.save(sharded, str(partial), validate_access_integrity=False, async_sharded_save=True)
            writing = Writing(plan, copies=self.asynchronous)
        self._pending = _Pending(writing, target, self._document(state), state.kept, time.monotonic())
        if not self.asynchronous:
            self.wait()

    def advance(self) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their part. Collective."""
        if self._pending is not None and all(all_gather(self._pending.writing.is_done)):
            self.wait()

    def wait(self) -> None:
        """Complete the checkpoint that is being written, if there is one. Collective. Raises UserError when it can't be."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._saving(pending.target):
            pending.writing.finish()
        checksums = {name: value for of_rank in all_gather(pending.writing.checksums) for name, value in of_rank.items()}
        self._on_rank_zero(lambda: self._publish(pending, checksums))
        logger.info("saved checkpoint %s (%.1f s)", pending.target, time.monotonic() - pending.began)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it; None when there is none. Collective."""
        found = self._complete()
        return found[-1] if found else None

    def restore(self) -> RunState | None:
        """Load the newest checkpoint whose files are whole; None when there is none at all. Collective.

        Damaged ones that are newer are renamed to `damaged_step_...`. Raises UserError when all are damaged, or the one that is
        whole doesn't fit.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._complete()):
            reason = self._damage(path)
            if reason is None:
                self._on_rank_zero(lambda: _set_aside(damaged))
                for other, why in damaged:
                    logger.warning("checkpoint %s is damaged (%s): it is set aside for %s", other, why, path.name)
                state = self.load(path)
                logger.info("resumed from %s: step %d", path, state.step)
                return state
            damaged.append((path, reason))
        if damaged:
            path, reason = damaged[0]
            raise UserError(
                f"checkpoint {path} is damaged: {reason}; there is no earlier one that is whole: restore its files, or remove "
                f"{self.directory} to begin anew"
            )
        return None

    def load(self, path: Path) -> RunState:
        """Restore model, optimizer and schedule in place. Collective. Raises UserError for a checkpoint that doesn't fit."""
        document = read_state(path)
        require_resumable(path, document, self.actor.architecture, self.actor.config, self.kind)
        self._on_rank_zero(lambda: _require_plain(path))
        updates = document["scheduler"]["num_steps"] - 1  # as Actor.num_updates
        expected = self._sharded_state(updates, is_loading=True)
        try:
            loaded = dist_checkpointing.load(expected, str(path))
        except _FAILURES as error:
            raise UserError(
                f"can't load checkpoint {path}: {_reason(error)}; move that directory away to use the one before"
            ) from error
        self.actor.module.load_state_dict(loaded["model"])
        restore_optimizer(
            self.actor.optimizer, self.actor.scheduler, loaded["optimizer"] if updates else None, document["scheduler"]
        )
        if changed := changes(document.get("configuration", {}), self.actor.config):
            logger.info("the configuration has changed since %s: %s", path, "; ".join(map(str, changed)))
        history = tuple(document["history"])
        kept = self._read_kept(path)
        return RunState(document["step"], document["run_id"], history, document["rollout"], kept, document.get("date"))

    def _complete(self) -> list[Path]:
        self._on_rank_zero(lambda: finish_publishing(self.directory))
        found = complete_checkpoints(self.directory) if dist.get_rank() == 0 else []
        return from_rank_zero(found)

    def _damage(self, path: Path) -> str | None:
        """Of all ranks' findings the first; every rank reads its share of the files."""
        found = all_gather(damage(path, dist.get_rank(), dist.get_world_size()))
        return next((reason for reason in found if reason is not None), None)

    @contextmanager
    def _saving(self, target: Path) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            raise UserError(
                f"can't save checkpoint {target}{_space(self.directory)}: {_reason(error)}; earlier checkpoints are intact"
            ) from error

    def _sharded_state(self, updates: int, is_loading: bool) -> dict[str, Any]:
        """`updates`: made so far. Steps may be more: those that were skipped count."""
        model: dict[str, Any] = self.actor.module.sharded_state_dict()  # type: ignore[operator]
        if not updates:
            return {"model": model}  # an optimizer has no state before the first
        optimizer = self.actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
        return {"model": model, "optimizer": optimizer}

    def _read_kept(self, path: Path) -> KeptRollouts | None:
        if not (path / KEPT).exists():
            return None
        try:
            return KeptRollouts.from_bytes((path / KEPT).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {path} is damaged: can't read {KEPT} ({error}); remove the directory") from error

    def _prepare(self, partial: Path) -> None:
        for left in self.directory.glob("step_*.partial"):  # by a crash or a full disk
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:  # somebody has put it there
                left.unlink()
        partial.mkdir(parents=True)
        self._require_space(partial)

    def _require_space(self, partial: Path) -> None:
        existing = complete_checkpoints(self.directory)
        if not existing:
            return
        try:
            needed = total_bytes(existing[-1])
        except UserError:  # damaged since: how much is needed is not known
            return
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise UserError(
                f"no disk space for a checkpoint in {self.directory}: {needed / 2**20:.0f} MiB needed, "
                f"{free / 2**20:.0f} MiB free; free some or lower checkpoint.keep_last"
            )

    def _document(self, state: RunState) -> str:
        document = asdict(replace(state, kept=None)) | {
            "kind": self.kind,
            "identity": identity(self.actor.architecture, self.actor.config),
            "configuration": configuration(self.actor.config),
            "scheduler": self.actor.scheduler.state_dict(),
        }
        return json.dumps(document, indent=1)

    def _publish(self, pending: _Pending, checksums: dict[str, str]) -> None:
        partial, target = pending.partial, pending.target
        (partial / STATE).write_text(pending.state)
        if pending.kept is not None:
            (partial / KEPT).write_bytes(pending.kept.to_bytes())
        write_manifest(partial, checksums)
        publish(partial, target)  # perhaps again: a rollout can be interrupted twice, or a run go on from an older one
        for old in complete_checkpoints(self.directory)[: -self.keep_last]:
            remove(old)

    def _on_rank_zero(self, action: Callable[[], None]) -> None:
        """Run on rank 0 while the others wait; its failure is every rank's failure, with the same message."""

        def run() -> None:
            try:
                action()
            except OSError as error:
                raise UserError(f"checkpoint.directory = {self.directory}: {error.strerror} ({error.filename})") from error
            except ValueError as error:
                raise UserError(str(error)) from error

        on_rank_zero(run)


def _set_aside(damaged: list[tuple[Path, str]]) -> None:
    """Under a name that counts as no checkpoint, for whoever looks for the cause."""
    for path, _ in damaged:
        places = (path.with_name(f"damaged_{path.name}{f'.{number}' * bool(number)}") for number in count())
        path.rename(next(place for place in places if not place.exists()))


def _require_plain(path: Path) -> None:
    """Raises UserError for files that name anything but what a checkpoint needs: whoever wrote them may be anyone.

    Both are read again later, by libraries that say less, and read as strictly.
    """
    for name, read in ((_INDEX, _read_index), (_COMMON, partial(torch.load, map_location="cpu", weights_only=True))):
        try:
            _require_file(path, name)
            with open(path / name, "rb") as file:
                read(file)
        except OSError:
            raise
        except Exception as error:  # bytes that are no checkpoint's are read as whatever they say
            raise UserError(
                f"checkpoint {path} is refused: {name}: {_reason(error)}; move that directory away to use the one before"
            ) from error


def _read_index(file: BinaryIO) -> None:
    """Raises UnpicklingError where it leads to what is no file of the checkpoint."""
    stored = getattr(load_metadata(file), "storage_data", None) or {}
    for name in {str(info.relative_path) for info in stored.values()}:
        _require_file(Path(file.name).parent, name)


def _require_file(checkpoint: Path, name: str) -> None:
    """A pipe would be waited for, for ever."""
    if leaves(name) or not (checkpoint / name).is_file():
        raise UnpicklingError(f"{name} is no file of the checkpoint")


def _space(directory: Path) -> str:
    """In words; nothing where it can't be known."""
    with suppress(OSError):
        return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB free there)"
    return ""


def _reason(error: BaseException) -> str:
    """One line of what a checkpoint library raised; of a collective failure, the first rank's."""
    if isinstance(error, CheckpointException):
        for rank, (cause, _) in error.failures.items():
            return f"rank {rank}: {_reason(cause)}"
        return "rank 0 says why"  # saving tells the failures to the first rank only
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # torch.load's own words are before
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is not allowed there"
    return text.strip().partition("\n")[0] or type(error).__name__
