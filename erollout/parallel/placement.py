"""Placement of a model's logical tensors in the local tensors of a rank: the one description of a layout.

A logical tensor is a weight as a Hugging Face checkpoint names and shapes it (`model.layers.0.self_attn.q_proj.weight`,
[out_features, in_features]). A local tensor is what a rank holds: a slice of one logical tensor, or several of them fused
(QKV, gate and up). Loading, exporting, resharding and the decode engine all use the same description, so a new layout is
described once. Pure: metadata only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor, and its position in a local tensor of the same number of dimensions."""

    tensor: str
    """Name of the logical tensor."""
    start: Shape
    """First index of the box in the logical tensor."""
    shape: Shape
    local_start: Shape
    """First index of the box in the local tensor."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor that a rank holds. Elements that no piece covers (vocabulary padding) belong to no logical tensor."""

    name: str
    """Name in the rank's own module (state_dict key)."""
    shape: Shape
    pieces: tuple[Piece, ...]


Placement = tuple[LocalTensor, ...]
"""All local tensors of one rank."""


def box_slices(start: Shape, shape: Shape) -> tuple[slice, ...]:
    """Index for the box of `shape` that begins at `start`."""
    return tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))


def intersect(a: Piece, b: Piece) -> tuple[Shape, Shape] | None:
    """(start, shape), in logical coordinates, of the intersection of two pieces of one logical tensor; None: empty."""
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    end = tuple(min(x + n, y + m) for x, n, y, m in zip(a.start, a.shape, b.start, b.shape, strict=True))
    shape = tuple(e - s for s, e in zip(start, end, strict=True))
    return (start, shape) if all(n > 0 for n in shape) else None


def whole(name: str, tensor: str, shape: Shape) -> LocalTensor:
    """A local tensor that is one whole logical tensor."""
    zero = (0,) * len(shape)
    return LocalTensor(name, shape, (Piece(tensor, zero, shape, zero),))


def stacked(name: str, parts: Iterable[tuple[str, Shape, Shape]]) -> LocalTensor:
    """Boxes (logical name, start, shape) stacked along dimension 0: a fused weight, or a row shard when there is one part."""
    pieces: list[Piece] = []
    rows = 0
    rest: Shape = ()
    for tensor, start, shape in parts:
        rest = shape[1:]
        pieces.append(Piece(tensor, start, shape, (rows, *(0 for _ in rest))))
        rows += shape[0]
    return LocalTensor(name, (rows, *rest), tuple(pieces))


def padded(tensor: LocalTensor, rows: int) -> LocalTensor:
    """The tensor with dimension 0 padded to `rows`; the added rows belong to no logical tensor."""
    return LocalTensor(tensor.name, (rows, *tensor.shape[1:]), tensor.pieces)


def pieces_by_tensor(placement: Placement) -> Iterator[tuple[LocalTensor, Piece]]:
    """Pieces by logical tensor, each with its local tensor."""
    for local in placement:
        for piece in local.pieces:
            yield local, piece
