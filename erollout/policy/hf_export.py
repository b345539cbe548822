"""Export of the policy as a Hugging Face directory, tensor by tensor, from shards on all ranks.

Global rank 0 collects and writes, holding at most one shard file. The files are written to a folder beside the destination,
which is renamed when complete, so a crash leaves the previous export (at worst as .<destination>.replaced, from which the
next export restores it).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from erollout.errors import UserError
from erollout.parallel.layout import TrainLayout
from erollout.parallel.placement import Piece, Shape, box_slices, pieces_by_tensor
from erollout.policy.architecture import Architecture
from erollout.policy.families import hf_config
from erollout.policy.hf_io import INDEX_FILE, SINGLE_FILE
from erollout.policy.training_layout import training_placement
from erollout.resilience.atomic_write import flush

MAX_SHARD_BYTES = 2 << 30

_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
"""Files copied from the tokenizer's directory, if present."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Owned:
    """A piece of a logical tensor, with the rank and local tensor that supply it."""

    rank: int
    local: str
    piece: Piece


def export_policy(
    directory: str | Path,
    architecture: Architecture,
    layout: TrainLayout,
    tensors: Mapping[str, Tensor],
    dtype: str,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write config.json, safetensors and the tokenizer's files. Collective over `group` (default: the world).

    Args:
        tensors: this rank's parameters, named as in training_placement(). Only those of data-parallel rank 0 are read.
        dtype: float32 or bfloat16, that of the written weights.

    Raises UserError, on all ranks alike, if the destination can't be replaced or written (no space, no permission).
    """
    destination, rank = Path(directory), dist.get_rank()
    writer = _Writer(destination, max_shard_bytes) if rank == 0 else None
    if writer:
        writer.attempt(writer.begin, architecture, dtype, Path(tokenizer) if tokenizer else None)
    _agree(writer, group)
    plan = plan_shards(architecture, _DTYPES[dtype].itemsize, max_shard_bytes)
    owners = _owners(architecture, layout)
    for number, names in enumerate(plan, start=1):
        shard: dict[str, Tensor] = {}
        for name in names:
            gathered = _gather(owners[name], architecture.logical_tensors()[name], tensors, _DTYPES[dtype], rank, group)
            if gathered is not None:
                shard[name] = gathered
        if writer:
            writer.attempt(writer.write_shard, shard, number, len(plan))
    if writer:
        writer.attempt(writer.finish)
    _agree(writer, group)


def plan_shards(architecture: Architecture, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Tensors of each file, in the checkpoint's order: as many as fit, and at least one."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in architecture.logical_tensors().items():
        size = prod(shape) * itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _owners(architecture: Architecture, layout: TrainLayout) -> dict[str, list[Owned]]:
    """Suppliers of all logical tensors' elements: the first holder among the ranks of the first model replica."""
    owners: dict[str, dict[tuple[Shape, Shape], Owned]] = {name: {} for name in architecture.logical_tensors()}
    for rank in layout.model_replica(0):
        for local, piece in pieces_by_tensor(training_placement(architecture, layout, rank)):
            owners[piece.tensor].setdefault((piece.start, piece.shape), Owned(rank, local.name, piece))
    return {name: list(pieces.values()) for name, pieces in owners.items()}


def _gather(
    owners: list[Owned],
    shape: Shape,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    rank: int,
    group: dist.ProcessGroup | None,
) -> Tensor | None:
    """A whole logical tensor on rank 0's CPU, None elsewhere. One message per rank that holds a part of it."""
    whole = torch.empty(shape, dtype=dtype) if rank == 0 else None
    device = next(iter(tensors.values())).device
    for source, owned in _by_rank(owners):
        flat = None
        if rank == source:
            flat = torch.cat([_piece_values(tensors[o.local], o.piece).to(dtype) for o in owned])
        if source != 0 and rank == source:
            assert flat is not None
            dist.send(flat, 0, group=group)
        elif source != 0 and rank == 0:
            flat = torch.empty(sum(o.piece.numel for o in owned), dtype=dtype, device=device)
            dist.recv(flat, source, group=group)
        if whole is not None and flat is not None:
            for o, values in zip(owned, flat.cpu().split([o.piece.numel for o in owned]), strict=True):
                whole[box_slices(o.piece.start, o.piece.shape)] = values.view(o.piece.shape)
    return whole


def _by_rank(owners: list[Owned]) -> Iterator[tuple[int, list[Owned]]]:
    for rank in dict.fromkeys(o.rank for o in owners):
        yield rank, [o for o in owners if o.rank == rank]


def _piece_values(local: Tensor, piece: Piece) -> Tensor:
    return local.detach()[box_slices(piece.local_start, piece.shape)].reshape(-1)


def _agree(writer: "_Writer | None", group: dist.ProcessGroup | None) -> None:
    """Raise rank 0's error, if any, on all ranks."""
    message = [writer.error if writer else None]
    dist.broadcast_object_list(message, 0, group=group)
    if message[0]:
        raise UserError(message[0])


@dataclass
class _Writer:
    """Rank 0's writer of files in a temporary folder beside the destination. After an error it only keeps the error.

    The other ranks keep sending, so rank 0 must keep receiving: the error is raised once all are done.
    """

    destination: Path
    max_shard_bytes: int
    error: str | None = None
    weight_map: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0

    @property
    def folder(self) -> Path:
        return self.destination.with_name(f".{self.destination.name}.partial")

    def attempt(self, action: Callable[..., None], *args: Any) -> None:
        if self.error:
            return
        try:
            action(*args)
        except (OSError, SafetensorError) as error:
            self.error = f"can't write {self.destination}: {' '.join(str(error).split())}; free space or choose another path"
        except UserError as error:
            self.error = str(error)
        if self.error:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def replaced(self) -> Path:
        return self.destination.with_name(f".{self.destination.name}.replaced")

    def begin(self, architecture: Architecture, dtype: str, tokenizer: Path | None) -> None:
        if self.replaced.exists() and not self.destination.exists():  # an earlier process ended between finish()'s two renames
            self.replaced.rename(self.destination)
        check_destination(self.destination, tokenizer)
        shutil.rmtree(self.folder, ignore_errors=True)  # left by an earlier process
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(hf_config(architecture, dtype), indent=2) + "\n")
        if tokenizer:
            for name in _COMPANIONS:
                if (tokenizer / name).exists():
                    shutil.copyfile(tokenizer / name, self.folder / name)

    def write_shard(self, shard: dict[str, Tensor], number: int, count: int) -> None:
        name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, self.folder / name, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(shard, name)
        self.total_bytes += sum(tensor.nbytes for tensor in shard.values())

    def finish(self) -> None:
        if len(set(self.weight_map.values())) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for path in (*self.folder.iterdir(), self.folder):
            flush(path)
        shutil.rmtree(self.replaced, ignore_errors=True)
        if self.destination.exists():
            self.destination.rename(self.replaced)
        self.folder.rename(self.destination)
        flush(self.destination.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)


def check_destination(destination: Path, tokenizer: Path | None) -> None:
    """Raise UserError unless `destination` is free or an earlier export, and not a directory that is read from."""
    if tokenizer and not any((tokenizer / name).exists() for name in _COMPANIONS):
        raise UserError(f"{tokenizer} holds no tokenizer files to export; set model.tokenizer to a Hugging Face directory")
    if not destination.exists():
        return
    if tokenizer and destination.samefile(tokenizer):
        raise UserError(f"can't export to {destination}: the tokenizer is read from there; choose another export path")
    if not destination.is_dir() or (any(destination.iterdir()) and not (destination / "config.json").exists()):
        raise UserError(f"can't export to {destination}: it exists and is not an exported model; choose another path")
