"""Check that data-parallel ranks hold bit-equal parameters: memory and links may corrupt some silently."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from erollout.errors import UserError
from erollout.parallel.collectives import all_gather

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """[P] int64: checksum of each tensor, the sum of its bits as integers. A single flipped bit always changes it."""
    return torch.stack([_checksum(tensor.detach().reshape(-1)) for tensor in tensors.values()])


def _checksum(flat: Tensor) -> Tensor:
    """Checksum by words of 8 bytes where aligned: on a CPU sums of narrower integers are much slower."""
    per_word = 8 // flat.element_size()
    narrow = _INTEGERS[flat.element_size()]
    if flat.storage_offset() % per_word:
        return flat.view(narrow).sum(dtype=torch.int64)
    whole = flat.numel() // per_word * per_word
    return flat[:whole].view(torch.int64).sum() + flat[whole:].view(narrow).sum(dtype=torch.int64)


def require_equal_replicas(tensors: Mapping[str, Tensor], step: int) -> None:
    """Compare with the other ranks of the data-parallel group. Collective over the world.

    Raises UserError on all ranks, naming ranks and parameter, if the ranks of any group differ.
    """
    mine = checksums(tensors)
    group = parallel_state.get_data_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    table = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(table, mine, group=group)
    found = _difference(torch.stack(table).cpu(), ranks, list(tensors))
    differs = torch.tensor([float(found is not None)], device=mine.device)
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    if differs.item():
        messages = sorted({message for message in all_gather(found) if message})
        raise UserError(
            f"parameters of data-parallel ranks differ after step {step}: {'; '.join(messages)}; "
            "exclude that machine and resume from a checkpoint"
        )


def _difference(table: Tensor, ranks: list[int], names: list[str]) -> str | None:
    """The difference in words; None: all rows are equal. `table`: [ranks, P]."""
    common = table.mode(dim=0).values
    differing = table != common
    if not differing.any():
        return None
    parameter = names[int(differing.any(0).nonzero()[0])]
    few = [rank for rank, row in zip(ranks, differing, strict=True) if row.any()]
    if 2 * len(few) == len(ranks):
        return f"{parameter} of rank {', '.join(map(str, ranks))}, and no majority tells which is right"
    return f"{parameter} of rank {', '.join(map(str, few))} is not that of the others among {', '.join(map(str, ranks))}"
