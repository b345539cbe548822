"""Checkpoints of a run: Megatron's distributed checkpoint of model and optimizer, and a small JSON file for the rest.

A checkpoint is a directory `step_00000010`. It is written under another name, optionally in the background, and renamed once
every file is complete, so a crash while saving leaves earlier checkpoints intact. A checkpoint with damaged files is set aside,
and the one before is loaded. The sharded format is independent of the layout: a run can resume with another tensor x pipeline x
data split. Random numbers need no state: they are functions of (seed, step, prompt, position).
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
from itertools import count, takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor
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
from erollout.checkpoint.resume import RunKind, changes, configuration, drawn, identity, read_state, require_resumable
from erollout.checkpoint.saved_policy import SavedPolicy
from erollout.checkpoint.writing import Writing
from erollout.config import Config
from erollout.errors import UserError, foreign_code
from erollout.parallel.collectives import all_gather, from_rank_zero, on_rank_zero
from erollout.parallel.groups import ParallelContext
from erollout.policy.actor import Actor
from erollout.policy.families import policy_architecture
from erollout.policy.model import build_model, local_tensors, transformer_config
from erollout.policy.optimizer import restore_optimizer
from erollout.rollout.partial import PartialRollouts
from erollout.security.unpickling import load_metadata

logger = logging.getLogger(__name__)

_FAILURES = (OSError, RuntimeError, KeyError, UnpicklingError, CheckpointingException, CheckpointException)
"""Errors of the two checkpoint libraries for files that can't be written or read; the last one is not an Exception."""

_INDEX = ".metadata"
"""torch.distributed's index of tensors and files."""
_COMMON = "common.pt"
"""Megatron's file of unsharded state."""
PARTIAL_ROLLOUTS = "rollouts.npz"
"""File of the first of RunState.partial_rollouts, which may be large."""

# optimizer state that any layout can load
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, slots=True)
class RunState:
    """State that a resumed run continues from, besides tensors."""

    step: int
    """Number of completed steps; also the index of the next step and the policy version."""
    run_id: str | None
    """Id of the MLflow run."""
    history: tuple[dict[str, float], ...] = ()
    """Held-out evaluations so far."""
    rollout: dict[str, Any] | None = None
    """State learnt by the rollout worker: acceptance, costs, lengths. None: nothing yet."""
    partial_rollouts: tuple[PartialRollouts, ...] = ()
    """Partial rollouts of the next step, one per rollout that it had begun when it was interrupted, in their order."""
    date: str | None = None
    """Date given to chat templates that use one, as 2026-11-30. None: the checkpoint does not state it."""
    cursor: int = 0
    """Prompts, or supervised examples, that the steps have drawn."""
    samples: int = 0
    """Responses trained on so far. A checkpoint of an earlier version does not state it, and the count starts there."""
    tokens: int = 0
    """Response tokens trained on so far."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint being written."""

    writing: Writing
    target: Path
    state: str
    """Content of the STATE file."""
    partial_rollouts: tuple[PartialRollouts, ...]
    began: float

    @property
    def partial(self) -> Path:
        return self.target.with_name(f"{self.target.name}.partial")


class Checkpointer:
    def __init__(self, directory: Path, keep_last: int, actor: Actor, kind: RunKind, asynchronous: bool = False) -> None:
        """
        Args:
            kind: kind of run, so that it does not resume with the optimizer of another kind.
            asynchronous: `save` copies the state, and a thread writes it.
        """
        self.directory = directory
        self.keep_last = keep_last
        self.actor = actor
        self.kind = kind
        self.asynchronous = asynchronous
        self._pending: _Pending | None = None

    def save(self, state: RunState) -> None:
        """Save a checkpoint. Collective. Afterwards the policy may change. If asynchronous, it is complete only after `wait` or
        a later `advance`. Raises UserError if its files, or those of the previous save, can't be written; earlier
        checkpoints stay intact.
        """
        self.wait()
        target = self.directory / f"step_{state.step:08d}"
        partial = self.directory / f"{target.name}.partial"
        self._on_rank_zero(lambda: self._prepare(partial))
        with self._saving(target):
            sharded = self._sharded_state(self.actor.num_updates, is_loading=False)
            plan = dist_checkpointing.save(sharded, str(partial), validate_access_integrity=False, async_sharded_save=True)
            writing = Writing(plan, copies=self.asynchronous)
        self._pending = _Pending(writing, target, self._document(state), state.partial_rollouts, time.monotonic())
        if not self.asynchronous:
            self.wait()

    def advance(self) -> None:
        """Complete the pending checkpoint if all ranks have written their part. Collective."""
        if self._pending is not None and all(all_gather(self._pending.writing.is_done)):
            self.wait()

    def wait(self) -> None:
        """Complete the pending checkpoint, if any. Collective. Raises UserError if that fails."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._saving(pending.target):
            pending.writing.finish()
        checksums = {name: value for of_rank in all_gather(pending.writing.checksums) for name, value in of_rank.items()}
        self._on_rank_zero(lambda: self._publish(pending, checksums))
        logger.info("saved checkpoint %s (%.1f s)", pending.target, time.monotonic() - pending.began)

    def newest(self) -> Path | None:
        """The newest complete checkpoint as seen by rank 0; None: there is none. Collective."""
        found = self._complete()
        return found[-1] if found else None

    def restore(self) -> RunState | None:
        """Load the newest intact checkpoint; None: there are no checkpoints. Collective.

        Newer damaged ones are renamed to `damaged_step_...`. Raises UserError if all are damaged, or if the intact one does not
        fit the configuration.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._complete()):
            reason = _damage(path)
            if reason is None:
                self._on_rank_zero(lambda: _set_aside(damaged))
                for other, why in damaged:
                    logger.warning("checkpoint %s is damaged (%s): set aside, falling back on %s", other, why, path.name)
                state = self.load(path)
                logger.info("resumed from %s: step %d", path, state.step)
                return state
            damaged.append((path, reason))
        if damaged:
            path, reason = damaged[0]
            raise UserError(
                f"checkpoint {path} is damaged: {reason}; there is no earlier one that is whole: restore its files, or remove "
                f"{self.directory} to start from scratch"
            )
        return None

    def load(self, path: Path) -> RunState:
        """Load model, optimizer and schedule in place. Collective. Raises UserError if the checkpoint does not fit."""
        document = read_state(path)
        require_resumable(path, document, self.actor.architecture, self.actor.config, self.kind)
        self._on_rank_zero(lambda: _require_plain(path))
        updates = document["scheduler"]["num_steps"] - 1  # as in Actor.num_updates
        loaded = _load_sharded(path, self._sharded_state(updates, is_loading=True))
        self.actor.module.load_state_dict(loaded["model"])
        restore_optimizer(
            self.actor.optimizer, self.actor.scheduler, loaded["optimizer"] if updates else None, document["scheduler"]
        )
        if changed := changes(document.get("configuration", {}), self.actor.config):
            logger.info("the configuration has changed since %s: %s", path, "; ".join(map(str, changed)))
        history = tuple(document["history"])
        partial_rollouts = self._read_partial_rollouts(path)
        return RunState(
            document["step"],
            document["run_id"],
            history,
            document["rollout"],
            partial_rollouts,
            document.get("date"),
            drawn(document, self.actor.config, self.kind),
            document.get("samples", 0),
            document.get("tokens", 0),
        )

    def _complete(self) -> list[Path]:
        self._on_rank_zero(lambda: finish_publishing(self.directory))
        found = complete_checkpoints(self.directory) if dist.get_rank() == 0 else []
        return from_rank_zero(found)

    @contextmanager
    def _saving(self, target: Path) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            raise UserError(
                f"can't save checkpoint {target}{_space(self.directory)}: {_reason(error)}; earlier checkpoints are intact"
            ) from error

    def _sharded_state(self, updates: int, is_loading: bool) -> dict[str, Any]:
        """`updates`: number of updates so far. Steps may be more, because they include skipped updates."""
        model: dict[str, Any] = self.actor.module.sharded_state_dict()  # type: ignore[operator]
        if not updates:
            return {"model": model}  # an optimizer has no state before the first update
        optimizer = self.actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
        return {"model": model, "optimizer": optimizer}

    def _read_partial_rollouts(self, path: Path) -> tuple[PartialRollouts, ...]:
        files = list(takewhile(Path.exists, (path / partial_rollouts_file(index) for index in count())))
        try:
            return tuple(PartialRollouts.from_bytes(file.read_bytes()) for file in files)
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} is damaged: can't read {PARTIAL_ROLLOUTS} ({error}); remove the directory"
            ) from error

    def _prepare(self, partial: Path) -> None:
        for left in self.directory.glob("step_*.partial"):  # left by a crash or a full disk
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:  # put there by someone else
                left.unlink()
        partial.mkdir(parents=True)
        self._require_space(partial)

    def _require_space(self, partial: Path) -> None:
        existing = complete_checkpoints(self.directory)
        if not existing:
            return
        try:
            needed = total_bytes(existing[-1])
        except UserError:  # damaged since, so the needed size is unknown
            return
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise UserError(
                f"no disk space for a checkpoint in {self.directory}: {needed / 2**20:.0f} MiB needed, "
                f"{free / 2**20:.0f} MiB free; free some or lower checkpoint.keep_last"
            )

    def _document(self, state: RunState) -> str:
        document = asdict(replace(state, partial_rollouts=())) | {
            "kind": self.kind,
            "identity": identity(self.actor.architecture, self.actor.config.model, self.actor.config.optimizer),
            "configuration": configuration(self.actor.config),
            "scheduler": self.actor.scheduler.state_dict(),
        }
        return json.dumps(document, indent=1)

    def _publish(self, pending: _Pending, checksums: dict[str, str]) -> None:
        partial, target = pending.partial, pending.target
        (partial / STATE).write_text(pending.state)
        for index, samples in enumerate(pending.partial_rollouts):
            (partial / partial_rollouts_file(index)).write_bytes(samples.to_bytes())
        write_manifest(partial, checksums)
        publish(partial, target)  # possibly again: a rollout may be interrupted twice
        for old in complete_checkpoints(self.directory)[: -self.keep_last]:
            remove(old)

    def _on_rank_zero(self, action: Callable[[], None]) -> None:
        _on_rank_zero(self.directory, action)


def load_policy(saved: SavedPolicy, config: Config, context: ParallelContext) -> tuple[dict[str, Tensor], int]:
    """This rank's parameters of a checkpoint's policy in the training layout, without an optimizer, and their step. Collective.

    Rank 0's checkpoint counts: while the run goes on, ranks may have found another newest one. Tensors are named as in
    training_placement(). Raises UserError, on all ranks alike, for a damaged checkpoint.
    """
    name, step = from_rank_zero((str(saved.path), saved.step))
    path = Path(name)
    if reason := _damage(path):
        raise UserError(f"checkpoint {path} is damaged: {reason}; restore its files, or name another one with --step")
    _on_rank_zero(path, lambda: _require_plain(path))
    model_parallel_cuda_manual_seed(config.train.seed)  # without it no module can be built
    architecture = policy_architecture(config.model)
    module = build_model(architecture, transformer_config(architecture, config.model, config.parallel)).to(context.device)
    loaded = _load_sharded(path, {"model": module.sharded_state_dict()})
    module.load_state_dict(loaded["model"])
    return local_tensors(module), step


def _on_rank_zero(directory: Path, action: Callable[[], None]) -> None:
    """Run on rank 0 while the others wait; if it fails, all ranks fail with the same message."""

    def run() -> None:
        try:
            action()
        except OSError as error:
            raise UserError(f"checkpoint.directory = {directory}: {error.strerror} ({error.filename})") from error
        except ValueError as error:
            raise UserError(str(error)) from error

    on_rank_zero(run)


def _damage(path: Path) -> str | None:
    """The first damage found by any rank, each of which reads its share of the files. Collective."""
    found = all_gather(damage(path, dist.get_rank(), dist.get_world_size()))
    return next((reason for reason in found if reason is not None), None)


def _load_sharded(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a checkpoint in the layout of `expected`, whose tensors are overwritten. Collective. Raises UserError."""
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(expected, str(path))
    except _FAILURES as error:
        raise UserError(
            f"can't load checkpoint {path}: {_reason(error)}; move that directory away to use the one before"
        ) from error
    return loaded


def partial_rollouts_file(index: int) -> str:
    """Name of the file of RunState.partial_rollouts[index]."""
    return PARTIAL_ROLLOUTS if index == 0 else f"{Path(PARTIAL_ROLLOUTS).stem}_{index}{Path(PARTIAL_ROLLOUTS).suffix}"


def _set_aside(damaged: list[tuple[Path, str]]) -> None:
    """Rename damaged checkpoints so that they no longer count as checkpoints but remain for diagnosis."""
    for path, _ in damaged:
        places = (path.with_name(f"damaged_{path.name}{f'.{number}' * bool(number)}") for number in count())
        path.rename(next(place for place in places if not place.exists()))


def _require_plain(path: Path) -> None:
    """Raise UserError for pickled files with anything that a checkpoint does not need: they may come from anyone.

    Both files are read again later by the libraries, equally strictly, but with worse messages.
    """
    for name, read in ((_INDEX, _read_index), (_COMMON, partial(torch.load, map_location="cpu", weights_only=True))):
        with foreign_code(partial(_refused, path, name), passing=(OSError,)):  # damaged bytes may raise anything
            _require_file(path, name)
            with open(path / name, "rb") as file:
                read(file)


def _refused(path: Path, name: str, error: Exception) -> UserError:
    return UserError(f"checkpoint {path} is refused: {name}: {_reason(error)}; move that directory away to use the one before")


def _read_index(file: BinaryIO) -> None:
    """Raise UnpicklingError if the index refers to anything but files of the checkpoint."""
    stored = getattr(load_metadata(file), "storage_data", None) or {}
    for name in {str(info.relative_path) for info in stored.values()}:
        _require_file(Path(file.name).parent, name)


def _require_file(checkpoint: Path, name: str) -> None:
    """Raise unless `name` is a regular file of the checkpoint: reading from a pipe would block for ever."""
    if leaves(name) or not (checkpoint / name).is_file():
        raise UnpicklingError(f"{name} is no file of the checkpoint")


def _space(directory: Path) -> str:
    """Free space in words; empty if unknown."""
    with suppress(OSError):
        return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB free there)"
    return ""


def _reason(error: BaseException) -> str:
    """One line on an error of a checkpoint library; for a collective failure, that of the first rank."""
    if isinstance(error, CheckpointException):
        for rank, (cause, _) in error.failures.items():
            return f"rank {rank}: {_reason(cause)}"
        return "rank 0 says why"  # saving reports failures to the first rank only
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # torch.load's own words are before
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is not allowed there"
    return text.strip().partition("\n")[0] or type(error).__name__
