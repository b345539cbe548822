"""Saves and restores a run: Megatron's distributed checkpoint of model and optimizer, and a small JSON of the rest.

A checkpoint is a directory `step_00000010`. It is written under another name and renamed once every file is there, so a
crash while saving leaves the previous ones as they were. The sharded format is independent of the layout: a run goes on
with another tensor x pipeline x data split. Random numbers need no state: they are functions of (seed, step, prompt, position).
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from erollout.checkpoint.manifest import MANIFEST, STATE, complete_checkpoints, verify, write_manifest
from erollout.errors import UserError
from erollout.kept_rollouts import KeptRollouts
from erollout.parallel.collectives import from_rank_zero
from erollout.policy.actor import Actor

logger = logging.getLogger(__name__)

_FAILURES = (OSError, RuntimeError, KeyError, CheckpointingException, CheckpointException)
"""What the two checkpoint libraries raise for files they can't write or read; the last is not even an Exception."""

KEPT = "rollouts.npz"
"""File of RunState.kept, which may be large."""

# Optimizer state that any layout can read back.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


RunKind = Literal["reinforcement learning", "supervised"]


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


class Checkpointer:
    def __init__(self, directory: Path, keep_last: int, actor: Actor, kind: RunKind) -> None:
        """`kind`: what the run does with the policy, so that it does not go on with another kind's optimizer."""
        self.directory = directory
        self.keep_last = keep_last
        self.actor = actor
        self.kind = kind

    def save(self, state: RunState) -> Path:
        """Collective. Raises UserError when the files can't be written; what was saved before is untouched."""
        target = self.directory / f"step_{state.step:08d}"
        partial = self.directory / f"{target.name}.partial"
        self._on_rank_zero(lambda: self._prepare(partial))
        try:
            dist_checkpointing.save(self._sharded_state(is_loading=False), str(partial), validate_access_integrity=False)
        except _FAILURES as error:
            raise UserError(
                f"can't save checkpoint {target} ({shutil.disk_usage(self.directory).free / 2**20:.0f} MiB free there): "
                f"{_reason(error)}; earlier checkpoints are intact"
            ) from error
        self._on_rank_zero(lambda: self._publish(partial, target, state))
        logger.info("saved checkpoint %s", target)
        return target

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it; None when there is none. Collective."""
        found = complete_checkpoints(self.directory) if dist.get_rank() == 0 else []
        return from_rank_zero(found[-1] if found else None)

    def load(self, path: Path) -> RunState:
        """Restore model, optimizer and schedule in place. Collective. Raises UserError for a checkpoint that doesn't fit."""
        self._on_rank_zero(lambda: verify(path))
        document = self._read_state(path)
        self._check_kind(path, document["kind"])
        self._check_model(path, document)
        expected = self._sharded_state(is_loading=True)
        try:
            loaded = dist_checkpointing.load(expected, str(path))
        except _FAILURES as error:
            raise UserError(f"can't load checkpoint {path}: {_reason(error)}") from error
        self.actor.module.load_state_dict(loaded["model"])
        self.actor.optimizer.load_state_dict(loaded["optimizer"])
        self.actor.scheduler.num_steps = 0  # load_state_dict adds the saved count to it
        self.actor.scheduler.load_state_dict(document["scheduler"])
        history = tuple(document["history"])
        return RunState(document["step"], document["run_id"], history, document.get("rollout"), self._read_kept(path))

    def _sharded_state(self, is_loading: bool) -> dict[str, Any]:
        model: dict[str, Any] = self.actor.module.sharded_state_dict()  # type: ignore[operator]
        optimizer = self.actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
        return {"model": model, "optimizer": optimizer}

    def _identity(self) -> dict[str, Any]:
        """What must be the same in the run that loads."""
        return {
            "architecture": json.loads(json.dumps(asdict(self.actor.architecture))),
            "dtype": self.actor.config.model.dtype,
            "use_distributed_optimizer": self.actor.config.optimizer.use_distributed_optimizer,
        }

    def _read_state(self, path: Path) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads((path / STATE).read_text())
            if missing := {"step", "run_id", "history", "kind", "identity", "scheduler"} - document.keys():
                raise ValueError(f"no {min(missing)}")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"checkpoint {path} is damaged: can't read {STATE} ({error}); remove the directory to use the one before"
            ) from error
        return document

    def _read_kept(self, path: Path) -> KeptRollouts | None:
        if not (path / KEPT).exists():
            return None
        try:
            return KeptRollouts.from_bytes((path / KEPT).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {path} is damaged: can't read {KEPT} ({error}); remove the directory") from error

    def _check_kind(self, path: Path, saved: RunKind) -> None:
        if saved != self.kind:
            raise UserError(
                f"checkpoint {path} is of a {saved} run and this one is {self.kind}; set train.output_dir to another place "
                "(a policy is handed on by checkpoint.export_path and model.path)"
            )

    def _check_model(self, path: Path, document: dict[str, Any]) -> None:
        saved, mine = document["identity"], self._identity()
        if saved["architecture"] != mine["architecture"]:
            keys = [k for k in mine["architecture"] if saved["architecture"].get(k) != mine["architecture"][k]]
            raise UserError(
                f"checkpoint {path} is of another model: {keys[0]} = {saved['architecture'].get(keys[0])} there, "
                f"{mine['architecture'][keys[0]]} here; set checkpoint.directory to another place or restore the model"
            )
        for key, section in (("dtype", "model"), ("use_distributed_optimizer", "optimizer")):
            if saved[key] != mine[key]:
                raise UserError(f"checkpoint {path} was saved with {section}.{key} = {saved[key]}; set it to that to resume")

    def _prepare(self, partial: Path) -> None:
        for left in self.directory.glob("step_*.partial"):  # by a crash or a full disk
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        self._require_space(partial)

    def _require_space(self, partial: Path) -> None:
        existing = complete_checkpoints(self.directory)
        if not existing:
            return
        needed = sum(json.loads((existing[-1] / MANIFEST).read_text()).values())
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise UserError(
                f"no disk space for a checkpoint in {self.directory}: {needed / 2**20:.0f} MiB needed, "
                f"{free / 2**20:.0f} MiB free; free some or lower checkpoint.keep_last"
            )

    def _publish(self, partial: Path, target: Path, state: RunState) -> None:
        document = asdict(replace(state, kept=None)) | {
            "kind": self.kind,
            "identity": self._identity(),
            "scheduler": self.actor.scheduler.state_dict(),
        }
        (partial / STATE).write_text(json.dumps(document, indent=1))
        if state.kept is not None:
            (partial / KEPT).write_bytes(state.kept.to_bytes())
        write_manifest(partial)
        if target.exists():  # the same step, saved again after a resume from an older one
            _remove(target)
        partial.rename(target)
        for old in complete_checkpoints(self.directory)[: -self.keep_last]:
            _remove(old)

    def _on_rank_zero(self, action: Any) -> None:
        """Run on rank 0 while the others wait; its failure is every rank's failure, with the same message."""
        failure = None
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = f"checkpoint.directory = {self.directory}: {error.strerror} ({error.filename})"
            except ValueError as error:
                failure = str(error)
        failure = from_rank_zero(failure)
        if failure:
            raise UserError(failure)


def _remove(checkpoint: Path) -> None:
    """The manifest goes first: a crash in between leaves no directory that looks complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _reason(error: BaseException) -> str:
    """One line of what a checkpoint library raised; of a collective failure, the first rank's."""
    if isinstance(error, CheckpointException):
        for rank, (cause, _) in error.failures.items():
            return f"rank {rank}: {_reason(cause)}"
        return "rank 0 says why"  # saving tells the failures to the first rank only
    return str(error).strip().partition("\n")[0] or type(error).__name__
