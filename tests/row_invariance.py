"""Tables of what must have the same bits in any company, to be run under one level of instructions: `row_invariance.py [step]`.

A level is a set of environment variables (LEVELS in test_row_invariance.py) that the libraries read when they load.
"""

import os
import sys

import torch

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention import Attention, PagedAttention, QuerySpan
from erollout.engine.model.decode_model import rms_norm
from erollout.engine.model.linear import LINEAR_KERNELS
from erollout.engine.model.native_model import NativeAttention
from erollout.engine.model.row_tiles import in_grains
from erollout.kernels import native
from erollout.policy.architecture import Architecture
from erollout.policy.families import read_architecture

LINEARS = [(960, 576), (96, 64), (97, 33), (576, 1536)]
"""Outputs, inputs."""
HEAD_SIZES = (64, 96, 128)
QUERIES_PER_KV = (1, 2, 4, 5)
ROWS = range(1, 41, int(sys.argv[1]) if len(sys.argv) > 1 else 1)
DTYPES = (torch.float32, torch.bfloat16)
LENGTH = 150
"""Tokens of each sequence: two chunks of keys."""


def kernels(dtype: torch.dtype) -> list[str]:
    lacks = {
        "torch": False,
        "prepacked": dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "native": dtype == torch.float32 or native.why_unavailable() is not None,
    }
    return [kernel for kernel in LINEAR_KERNELS if not lacks[kernel]]


def check_linear(kernel: str, dtype: torch.dtype, outputs: int, inputs: int, bias: bool) -> None:
    """The first and the last rows of passes of any length, beside the rows one by one. The sums cancel: their errors remain."""
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(outputs, inputs // 2, generator=generator)
    weight = torch.cat((half, torch.zeros(outputs, inputs % 2), -half), -1).to(dtype)
    side = torch.randn(max(ROWS) + 60, inputs // 2, generator=generator)
    x = torch.cat((side, torch.ones(len(side), inputs % 2), side), -1).to(dtype)
    linear = LINEAR_KERNELS[kernel](weight, torch.zeros(outputs, dtype=dtype) if bias else None)
    linear.prepare()
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (*ROWS, 64, 65, 99):
        assert torch.equal(linear(x[:rows]), alone[:rows]), (kernel, dtype, outputs, inputs, rows)
        assert torch.equal(linear(x[-rows:]), alone[-rows:]), (kernel, dtype, outputs, inputs, rows)


def architecture_of(heads: int, kv_heads: int, size: int) -> Architecture:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "hidden_size": heads * size}
    common = {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 512}
    return read_architecture({"model_type": "llama", **common, **shape}, "test")


class AttentionCase:
    """Sequences in a paged cache; outputs of any spans of theirs in one pass."""

    def __init__(self, kernel: str, dtype: torch.dtype, queries_per_kv: int, size: int, sequences: int) -> None:
        kv_heads, blocks = 2, -(-LENGTH // 16)
        heads = kv_heads * queries_per_kv
        cache = KVCache(architecture_of(heads, kv_heads, size), 1, sequences * blocks, 16, dtype, torch.device("cpu"))
        cache.allocate()
        self.layer = cache.layer(0)
        generator = torch.Generator().manual_seed(2)
        self.layer[:, : cache.num_blocks] = torch.randn(self.layer[:, : cache.num_blocks].shape, generator=generator).to(dtype)
        self.queries = (2 * torch.randn(sequences, LENGTH, heads, size, generator=generator)).to(dtype)
        self.tables = torch.randperm(sequences * blocks, generator=generator).view(sequences, blocks).tolist()
        make = NativeAttention if kernel == "native" else PagedAttention
        self.attention: Attention = make(heads, cache, kv_heads, size)

    def run(self, *spans: tuple[int, int, int]) -> list[torch.Tensor]:
        """Attention over spans (sequence, start, end), single tokens first."""
        plan = self.attention.plan([QuerySpan(start, end, self.tables[which]) for which, start, end in spans])
        query = torch.cat([self.queries[which, start:end] for which, start, end in spans])
        return list(self.attention(query, self.layer, plan).split([end - start for _, start, end in spans]))


def check_attention(kernel: str, dtype: torch.dtype, queries_per_kv: int, size: int, rows: range) -> None:
    """A prompt in one piece, in pieces of any length and token by token; and single tokens in company of any size."""
    case = AttentionCase(kernel, dtype, queries_per_kv, size, max(rows))
    name = (kernel, dtype, queries_per_kv, size)
    whole = case.run((0, 0, LENGTH))[0]
    for count in rows:
        start = LENGTH - count - 3
        assert torch.equal(case.run((0, start, start + count))[0], whole[start : start + count]), (*name, count, "tokens")
    last = [case.run((which, LENGTH - 1, LENGTH))[0] for which in range(max(rows))]
    assert torch.equal(last[0][0], whole[-1]), name
    for count in rows:
        together = case.run(*((which, LENGTH - 1, LENGTH) for which in range(count)))
        assert all(torch.equal(a, b) for a, b in zip(together, last, strict=False)), (*name, count, "sequences")


def check_rowwise(dtype: torch.dtype, width: int) -> None:
    """Norms and activations, which torch computes in vectors whose last one may not be full."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(max(ROWS), 2 * width, generator=generator).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)

    def activated(rows: torch.Tensor) -> torch.Tensor:
        gate = rows.clone().chunk(2, -1)[0]
        in_grains(lambda piece: torch.nn.functional.silu(piece, inplace=True), gate)
        return gate

    def normalised(rows: torch.Tensor) -> torch.Tensor:
        return rms_norm(rows[:, :width].contiguous(), weight, 1e-6)

    for function in (activated, normalised):
        alone = torch.cat([function(row[None]) for row in x])
        for rows in ROWS:
            assert torch.equal(function(x[:rows]), alone[:rows]), (function.__name__, dtype, width, rows)


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tables = 0
    for dtype in DTYPES:
        for width in (64, 100, 1536, 5000):
            check_rowwise(dtype, width)
        for kernel in kernels(dtype):
            for outputs, inputs in LINEARS:
                check_linear(kernel, dtype, outputs, inputs, bias=inputs == 64)
            if kernel == "prepacked":
                continue  # has torch's attention
            for size in HEAD_SIZES:
                for queries in QUERIES_PER_KV:
                    slow = dtype == torch.bfloat16 and kernel == "torch"  # without instructions for it
                    check_attention(kernel, dtype, queries, size, range(1, 41, 13) if slow else ROWS)
                    tables += 1
    print(f"{tables} tables of attention, kernels {kernels(torch.float32)} and {kernels(torch.bfloat16)}")


if __name__ == "__main__":
    sys.exit(main())
