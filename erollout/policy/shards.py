"""Shards of a model's tensors on a tensor-parallel rank, from the description of its layer, for all layouts. Pure."""

from collections.abc import Iterator

from erollout.errors import UserError
from erollout.parallel.layout import even_slice
from erollout.parallel.placement import LocalTensor, Piece, Shape, padded, stacked, whole
from erollout.policy.architecture import Architecture
from erollout.policy.decoder import Module, logical_name

_UNITS = {"num_query_groups": "the model's number of key/value heads", "ffn_hidden_size": "the model's feed-forward size"}

_Tensor = tuple[str, Shape]
"""Name and shape of a logical tensor."""


def module_shards(
    architecture: Architecture, module: Module, layer: int, local: str, ranks: int, rank: int, by_unit: bool = False
) -> Iterator[LocalTensor]:
    """A rank's part of a module in layer `layer`: its weight and, if any, its bias.

    Raises UserError if the module can't be divided evenly.

    Args:
        local: the module's name in the rank's own model.
        by_unit: whether the outputs of fused parts are stacked unit by unit, not part by part.
    """
    for kind in module.kinds(architecture):
        name = f"{local}.{kind}"
        tensors = [(logical_name(layer, part, kind), module.shape(part, kind, architecture)) for part in module.parts]
        if module.cut is None:
            yield whole(name, *tensors[0])
            continue
        total = getattr(architecture, module.unit)
        start, end = _units(architecture, module.unit, ranks, rank)
        if module.cut == "inputs":
            yield _columns(name, *tensors[0], start, end, total)
            continue
        ranges = [(unit, unit + 1) for unit in range(start, end)] if by_unit else [(start, end)]
        yield stacked(name, [_rows(*tensor, *bounds, total) for bounds in ranges for tensor in tensors])


def vocabulary_rows(architecture: Architecture, ranks: int) -> int:
    """Rows of the embedding and of the LM head on every rank, padding included."""
    return -(-architecture.vocab_size // ranks)


def vocabulary_shard(name: str, logical: str, architecture: Architecture, ranks: int, rank: int) -> LocalTensor:
    """A rank's rows of a tensor [vocabulary, hidden]; ranks at the vocabulary's end may hold mostly padding."""
    rows, hidden = vocabulary_rows(architecture, ranks), architecture.hidden_size
    start = min(rank * rows, architecture.vocab_size)
    real = min(rows, architecture.vocab_size - start)
    if real == 0:
        return LocalTensor(name, (rows, hidden), ())
    return padded(stacked(name, [(logical, (start, 0), (real, hidden))]), rows)


def _units(architecture: Architecture, unit: str, ranks: int, rank: int) -> tuple[int, int]:
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    if heads % groups:
        raise UserError(f"the model's {heads} attention heads are not a multiple of its {groups} key/value heads")
    return even_slice(getattr(architecture, unit), ranks, rank, _UNITS[unit])


def _rows(logical: str, shape: Shape, start: int, end: int, total: int) -> tuple[str, Shape, Shape]:
    """Units [start, end) of `total` along dimension 0: (name, first index, shape)."""
    size = shape[0] // total
    return logical, (start * size, *(0 for _ in shape[1:])), ((end - start) * size, *shape[1:])


def _columns(name: str, logical: str, shape: Shape, start: int, end: int, total: int) -> LocalTensor:
    """Units [start, end) of `total` along dimension 1."""
    size = shape[1] // total
    local = (shape[0], (end - start) * size)
    return LocalTensor(name, local, (Piece(logical, (0, start * size), local, (0, 0)),))
