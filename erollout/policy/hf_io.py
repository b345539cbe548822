"""Reading of Hugging Face checkpoints: each rank streams its own slices, whatever the layout.

Every rank checks the files' headers before a weight is read, so that all ranks reject a bad checkpoint with the same message.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erollout.errors import UserError
from erollout.parallel.placement import LocalTensor, Piece, Placement, box_slices, pieces_by_tensor
from erollout.policy.architecture import EMBEDDING, OUTPUT, Architecture

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = ("F32", "BF16", "F16")
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers in old checkpoints that follow from the config."""


def load_weights(
    directory: str | Path, architecture: Architecture, placement: Placement, tensors: Mapping[str, Tensor]
) -> None:
    """Copy this rank's pieces from a directory's safetensors into `tensors`, named as in `placement`; padding becomes zero.

    At most one slice is in memory beside the destination. Raises UserError, naming file and tensor, for files that are missing,
    truncated or of another model.
    """
    files = check_weights(directory, architecture)
    by_file: dict[Path, list[tuple[LocalTensor, Piece]]] = {}
    for local, piece in pieces_by_tensor(placement):
        by_file.setdefault(files[piece.tensor], []).append((local, piece))
    if architecture.tie_word_embeddings and OUTPUT in files:
        _check_tied(files, [piece for _, piece in pieces_by_tensor(placement) if piece.tensor == EMBEDDING])
    with torch.no_grad():
        for local in placement:
            if sum(piece.numel for piece in local.pieces) < tensors[local.name].numel():
                tensors[local.name].zero_()
        for path, pieces in by_file.items():
            _copy_pieces(path, pieces, tensors)


def check_weights(directory: str | Path, architecture: Architecture) -> dict[str, Path]:
    """The file of every tensor of a checkpoint that this architecture can load, from the files' headers alone.

    Raises UserError, naming file and tensor, for files that are missing, truncated or of another model.
    """
    folder = Path(directory)
    files = _tensor_files(folder)
    _check_names(folder, architecture, files)
    for path in sorted(set(files.values())):
        _check_shapes(path, architecture, [name for name, holder in files.items() if holder == path])
    return files


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    index = folder / INDEX_FILE
    if index.exists():
        return {name: folder / file for name, file in _weight_map(index).items()}
    single = folder / SINGLE_FILE
    if not single.exists():
        raise UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as safetensors there")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a readable index of safetensors files: {error!r}") from error
    for name, file in weight_map.items():
        if not (index.parent / file).exists():
            raise UserError(f"{index.parent / file} is missing; {INDEX_FILE} says that it holds {name}")
    return weight_map


def _check_names(folder: Path, architecture: Architecture, files: Mapping[str, Path]) -> None:
    expected = architecture.logical_tensors()
    if missing := [name for name in expected if name not in files]:
        raise UserError(
            f"{folder} lacks tensor {missing[0]} ({len(missing)} in all) of the model that its config.json describes"
        )
    for name, path in files.items():
        tied = name == OUTPUT and architecture.tie_word_embeddings
        if name not in expected and not tied and not _DERIVED.fullmatch(name):
            raise UserError(f"{path} has tensor {name}, which the model that config.json describes has no place for")


def _check_shapes(path: Path, architecture: Architecture, names: list[str]) -> None:
    expected = architecture.logical_tensors()
    with _opened(path) as file:
        present = set(file.keys())
        for name in names:
            if name not in present:
                raise UserError(f"{path} lacks tensor {name}; {INDEX_FILE} says that it is there")
            if name not in expected:
                continue
            found = file.get_slice(name)
            if tuple(found.get_shape()) != expected[name]:
                raise UserError(f"{path}: tensor {name} is {found.get_shape()}, config.json makes it {list(expected[name])}")
            if found.get_dtype() not in _DTYPES:
                raise UserError(f"{path}: tensor {name} is {found.get_dtype()}; only {', '.join(_DTYPES)} can be trained")


def _check_tied(files: Mapping[str, Path], pieces: list[Piece]) -> None:
    """Check that the output layer of a tied model, which some tools write too, equals the embedding."""
    with _opened(files[OUTPUT]) as output, _opened(files[EMBEDDING]) as embedding:
        for piece in pieces:
            box = box_slices(piece.start, piece.shape)
            if not torch.equal(output.get_slice(OUTPUT)[box], embedding.get_slice(EMBEDDING)[box]):
                raise UserError(
                    f"{files[OUTPUT]}: {OUTPUT} differs from {EMBEDDING} but tie_word_embeddings = true in config.json"
                )


def _copy_pieces(path: Path, pieces: list[tuple[LocalTensor, Piece]], tensors: Mapping[str, Tensor]) -> None:
    with _opened(path) as file:
        for local, piece in pieces:
            source = file.get_slice(piece.tensor)[box_slices(piece.start, piece.shape)]
            tensors[local.name][box_slices(piece.local_start, piece.shape)].copy_(source)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error
