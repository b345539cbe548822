"""Reshard plan: slices that a rank copies, sends and receives from the training to the decode layout. Pure: metadata only.

A destination rank takes its data from its own training model replica (data-parallel index). The
ranks of one replica hold the whole model together, so each replica is planned by itself, at a cost that depends on
tensor x pipeline and not on the world's size. Every rank derives its own part of the plan from the same placements with the
same rules, so what one rank sends is what its peer expects, and nothing is exchanged to agree on it.

Transfers of a pair of ranks are cut into buckets. Bucket b of the pair whose receiver is k places after its sender has
the key (k, b), and every rank works through its buckets in the order of the keys. The unfinished bucket with the smallest
key is then always at the head of both its sender's and its receiver's queue: with any number of buckets in flight, down to
one, no order of completion can deadlock.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from math import prod

from erollout.errors import UserError
from erollout.parallel.layout import DecodeLayout, TrainLayout
from erollout.parallel.placement import LocalTensor, Piece, Placement, Shape, intersect, pieces_by_tensor
from erollout.policy.architecture import Architecture
from erollout.policy.training_layout import training_placement

DEFAULT_BUCKET_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a local tensor."""

    tensor: str
    """Name of the local tensor."""
    start: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """A copy within the rank between two boxes of equal shape."""

    source: Box
    destination: Box


@dataclass(frozen=True, slots=True)
class Bucket:
    """One message: its boxes one after the other, each in row-major order."""

    peer: int
    """Global rank at the other end."""
    boxes: tuple[Box, ...]

    @property
    def numel(self) -> int:
        return sum(box.numel for box in self.boxes)


@dataclass(frozen=True, slots=True)
class Step:
    """The message to send and the message to receive at one position in the order of the keys."""

    send: Bucket | None
    receive: Bucket | None


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """The reshard plan of one rank."""

    rank: int
    itemsize: int
    """Bytes per element on the wire."""
    sources: Mapping[str, Shape]
    """Shapes of the rank's tensors in the training layout."""
    destinations: Mapping[str, Shape]
    local: tuple[LocalCopy, ...]
    steps: tuple[Step, ...]

    @property
    def sends(self) -> tuple[Bucket, ...]:
        return tuple(step.send for step in self.steps if step.send)

    @property
    def receives(self) -> tuple[Bucket, ...]:
        return tuple(step.receive for step in self.steps if step.receive)


@lru_cache(maxsize=8)
def plan_for_rank(
    architecture: Architecture,
    train: TrainLayout,
    decode: DecodeLayout,
    rank: int,
    decode_placement: Callable[[Architecture, int, int], Placement],
    itemsize: int = 2,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> ReshardPlan:
    """The plan of a global rank.

    Args:
        decode_placement: (architecture, tensor, tensor_rank) to the placement of a decode rank.
        itemsize: bytes per element on the wire.
        bucket_bytes: largest message, and so the size of a staging buffer.

    Raises UserError if a layout does not divide the model or the two do not describe the same world.
    """
    if train.world_size != decode.world_size:
        raise UserError(f"training layout of {train.world_size} ranks, decode layout of {decode.world_size}: make them equal")
    _, data, _ = train.coordinates(rank)
    replica = train.model_replica(data)
    shards = {t: decode_placement(architecture, decode.tensor, t) for t in {decode.tensor_rank(r) for r in replica}}
    return build_plan(
        {r: training_placement(architecture, train, r) for r in replica},
        {r: shards[decode.tensor_rank(r)] for r in replica},
        rank,
        itemsize,
        bucket_bytes,
    )


def build_plan(
    sources: Mapping[int, Placement],
    destinations: Mapping[int, Placement],
    rank: int,
    itemsize: int = 2,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> ReshardPlan:
    """The plan of `rank` among ranks that together hold every tensor that any of them needs.

    Args:
        sources, destinations: global rank to placement, of the same ranks.

    Raises ValueError naming the tensor if the sources don't cover each element of this rank's destination exactly once.
    """
    _check_disjoint_destination(destinations[rank])
    holdings = _Holdings(sources, destinations)
    limit = max(1, bucket_bytes // itemsize)
    ranks = sorted(sources)
    mine = list(holdings.transfers_to(rank))
    _check_coverage(destinations[rank], mine)
    steps: list[Step] = []
    for shift in range(1, len(ranks)):
        position = ranks.index(rank)
        receiver, sender = ranks[(position + shift) % len(ranks)], ranks[position - shift]
        out = _buckets(receiver, (t.source for t in holdings.transfers_to(receiver, only_from=rank)), limit)
        into = _buckets(sender, (t.destination for t in mine if t.sender == sender), limit)
        steps += [Step(send, receive) for send, receive in zip_longest(out, into)]
    return ReshardPlan(
        rank,
        itemsize,
        {local.name: local.shape for local in sources[rank]},
        {local.name: local.shape for local in destinations[rank]},
        tuple(LocalCopy(t.source, t.destination) for t in mine if t.sender == rank),
        tuple(steps),
    )


@dataclass(frozen=True, slots=True)
class _Transfer:
    sender: int
    source: Box
    destination: Box
    piece: Piece
    """The destination's piece that this transfer fills in part."""
    logical_start: Shape


@dataclass(frozen=True, slots=True)
class _Shard:
    """A box of a logical tensor and the ranks that hold it (several if it is replicated)."""

    piece: Piece
    holders: dict[int, tuple[LocalTensor, Piece]]


class _Holdings:
    """Holders of all shards, and the choice of a holder for each receiver."""

    def __init__(self, sources: Mapping[int, Placement], destinations: Mapping[int, Placement]) -> None:
        self._destinations = destinations
        self._shards: dict[str, dict[tuple[Shape, Shape], _Shard]] = {}
        self._held: dict[int, set[str]] = {}
        for rank in sorted(sources):
            self._held[rank] = {piece.tensor for _, piece in pieces_by_tensor(sources[rank])}
            for local, piece in pieces_by_tensor(sources[rank]):
                shards = self._shards.setdefault(piece.tensor, {})
                shard = shards.setdefault((piece.start, piece.shape), _Shard(piece, {}))
                shard.holders.setdefault(rank, (local, piece))
        self._needed = {id(p): _pieces_of(p) for p in destinations.values()}  # decode replicas share placement objects
        self._servers: dict[tuple[str, Shape, Shape], dict[int, int]] = {}

    def transfers_to(self, rank: int, only_from: int | None = None) -> Iterator[_Transfer]:
        """Transfers that fill `rank`'s destination, in the destination's order."""
        for local, piece in pieces_by_tensor(self._destinations[rank]):
            if only_from is not None and piece.tensor not in self._held[only_from]:
                continue
            for shard in self._shards.get(piece.tensor, {}).values():
                if only_from is not None and only_from not in shard.holders:
                    continue
                if (common := intersect(shard.piece, piece)) is None:
                    continue
                server = self._server(shard, rank)
                if only_from is None or server == only_from:
                    held_in, held = shard.holders[server]
                    yield _transfer(server, held_in, held, local, piece, *common)

    def _server(self, shard: _Shard, rank: int) -> int:
        """The holder that serves `rank`: itself if it is one, otherwise the holders in turn."""
        if rank in shard.holders:
            return rank
        holders = list(shard.holders)
        if len(holders) == 1:
            return holders[0]
        key = (shard.piece.tensor, shard.piece.start, shard.piece.shape)
        if key not in self._servers:
            needers = [r for r in sorted(self._destinations) if r not in shard.holders and self._needs(r, shard.piece)]
            self._servers[key] = {r: holders[turn % len(holders)] for turn, r in enumerate(needers)}
        return self._servers[key][rank]

    def _needs(self, rank: int, held: Piece) -> bool:
        needed = self._needed[id(self._destinations[rank])].get(held.tensor, ())
        return any(intersect(held, piece) is not None for piece in needed)


def _pieces_of(placement: Placement) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for _, piece in pieces_by_tensor(placement):
        pieces.setdefault(piece.tensor, []).append(piece)
    return pieces


def _transfer(
    sender: int, source: LocalTensor, held: Piece, destination: LocalTensor, wanted: Piece, start: Shape, shape: Shape
) -> _Transfer:
    return _Transfer(
        sender,
        Box(source.name, _local_start(held, start), shape),
        Box(destination.name, _local_start(wanted, start), shape),
        wanted,
        start,
    )


def _local_start(piece: Piece, logical_start: Shape) -> Shape:
    return tuple(base + x - first for base, x, first in zip(piece.local_start, logical_start, piece.start, strict=True))


def _buckets(peer: int, boxes: Iterable[Box], limit: int) -> Iterator[Bucket]:
    """Cut and group a pair's boxes, identically at both ends, because only shapes matter.

    A box of at least a quarter of the limit is a message of its own: if it is contiguous, no staging copy is needed.
    """
    together: list[Box] = []
    for box in (part for whole_box in boxes for part in _cut(whole_box, limit)):
        if 4 * box.numel >= limit:
            yield Bucket(peer, (box,))
            continue
        if sum(other.numel for other in together) + box.numel > limit:
            yield Bucket(peer, tuple(together))
            together = []
        together.append(box)
    if together:
        yield Bucket(peer, tuple(together))


def _cut(box: Box, limit: int, dimension: int = 0) -> Iterator[Box]:
    """Parts of at most `limit` elements, each contiguous within the box."""
    if box.numel <= limit:
        yield box
        return
    row = prod(box.shape[dimension + 1 :])
    step = max(1, limit // row)
    for first in range(0, box.shape[dimension], step):
        size = min(step, box.shape[dimension] - first)
        start, shape = list(box.start), list(box.shape)
        start[dimension], shape[dimension] = start[dimension] + first, size
        yield from _cut(Box(box.tensor, tuple(start), tuple(shape)), limit, dimension + 1)


def _check_coverage(placement: Placement, transfers: list[_Transfer]) -> None:
    filled: dict[int, list[tuple[Shape, Shape]]] = {}
    for transfer in transfers:
        filled.setdefault(id(transfer.piece), []).append((transfer.logical_start, transfer.source.shape))
    for local, piece in pieces_by_tensor(placement):
        boxes = filled.get(id(piece), [])
        if sum(prod(shape) for _, shape in boxes) != piece.numel or not _disjoint(boxes):
            raise ValueError(f"the training ranks don't hold every element of {piece.tensor} (for {local.name}) exactly once")


def _check_disjoint_destination(placement: Placement) -> None:
    for local in placement:
        if not _disjoint([(piece.local_start, piece.shape) for piece in local.pieces]):
            raise ValueError(f"pieces of the decode tensor {local.name} overlap")


def _disjoint(boxes: list[tuple[Shape, Shape]]) -> bool:
    """Whether no two boxes share an element: a sweep along dimension 0."""
    boxes = sorted(boxes)
    for i, (start, shape) in enumerate(boxes):
        for other_start, other_shape in boxes[i + 1 :]:
            if other_start[0] >= start[0] + shape[0]:
                break
            overlaps = (
                max(a, b) < min(a + n, b + m) for a, n, b, m in zip(start, shape, other_start, other_shape, strict=True)
            )
            if all(overlaps):
                return False
    return True
