"""The decode model against transformers, its attention against the plain definition, and the bits of both against company."""

import pytest
import torch
import torch.distributed as dist
from tiny_decode import MODELS, make_engine, prompts, reference_logprobs, reference_model

from erollout.config import RolloutConfig
from erollout.engine.block_manager import BlockManager
from erollout.engine.engine import Engine
from erollout.engine.kv_cache import KVCache, num_blocks
from erollout.engine.model.attention import PagedAttention, QuerySpan, reference_attention
from erollout.engine.model.decode_model import sum_over_ranks
from erollout.engine.model.linear import LINEAR_KERNELS, PrepackedLinear, resolve_linear_kernel
from erollout.engine.scheduler import Batch, ScheduledSequence
from erollout.engine.sequence import Sequence
from erollout.errors import UserError
from erollout.kernels import native
from erollout.policy.families import read_architecture
from erollout.types import SamplingParams

CPU = torch.device("cpu")


def compute(engine: Engine, sequence: Sequence, num_tokens: int, *more: tuple[Sequence, int]) -> torch.Tensor:
    """Compute the next tokens of one or several sequences in one pass; logits of those that caught up."""
    batch = Batch()
    for item, count in [(sequence, num_tokens), *more]:
        start = item.num_computed_tokens
        batch.copies += engine.blocks.reserve(item.block_table, start, start + count)
        batch.scheduled.append(ScheduledSequence(item, start, count))
    engine.cache.copy_blocks(batch.copies)
    logits = engine.runner.run(batch)
    for scheduled in batch.scheduled:
        scheduled.sequence.num_computed_tokens = scheduled.end
    return logits


def make_sequence(ids: tuple[int, ...]) -> Sequence:
    return Sequence(0, 0, 0, ids, SamplingParams(), seed=0)


def logits_of_two_chunks_and_a_token(name: str) -> torch.Tensor:
    """What every rank holds of the vocabulary after 150 tokens in chunks of 140, 9 and 1."""
    group = dist.group.WORLD if dist.is_initialized() else None
    engine = make_engine(name, group)
    engine.model.prepare()
    sequence = make_sequence(prompts(150)[0])
    for count in (140, 9):
        compute(engine, sequence, count)
    return compute(engine, sequence, 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str) -> None:
    expected = reference_logprobs(reference_model(name), list(prompts(150)[0]))[-1]
    actual = logits_of_two_chunks_and_a_token(name)[0].log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_on_two_ranks(rank_pool, name: str) -> None:
    shards = rank_pool.run(2, logits_of_two_chunks_and_a_token, name)
    actual = torch.cat(shards, -1)[0, : MODELS[name]["vocab_size"]].log_softmax(-1)
    expected = reference_logprobs(reference_model(name), list(prompts(150)[0]))[-1]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name: str) -> None:
    """Root-mean-square error of the log-probs of bf16 weights' rounding and arithmetic, beside transformers' own."""
    ids = list(prompts(150)[0])
    exact = reference_logprobs(reference_model(name), ids)
    theirs = reference_logprobs(reference_model(name, "bfloat16"), ids)
    engine = make_engine(name, dtype="bfloat16")
    engine.model.prepare()
    sequence = make_sequence(tuple(ids))
    rows = []
    for end in range(1, len(ids) + 1):
        sequence.prompt_ids = tuple(ids[:end])  # so that every pass catches up and gives logits
        rows.append(compute(engine, sequence, 1)[0].float().log_softmax(-1))
    ours = torch.stack(rows)
    error = {name: (x - exact).pow(2).mean().sqrt().item() for name, x in (("ours", ours), ("theirs", theirs))}
    assert error["ours"] < 1.2 * error["theirs"], error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_a_tokens_logits_have_the_same_bits_in_any_company(name: str, dtype: str) -> None:
    """On torch's operators, one token at a time, beside other sequences and in chunks."""
    engine = make_engine(name, dtype=dtype, kernels="torch")
    engine.model.prepare()
    ids, other = prompts(60, 90)
    alone, beside, neighbour = make_sequence(ids), make_sequence(ids), make_sequence(other)
    for end in (*range(1, 9), 60):
        for sequence in (alone, beside):
            sequence.prompt_ids = ids[:end]  # so that every pass catches up and gives logits
        expected = compute(engine, alone, end - alone.num_computed_tokens)
        neighbour.prompt_ids = other[: neighbour.num_computed_tokens + 7]
        together = compute(engine, beside, end - beside.num_computed_tokens, (neighbour, 7))
        assert torch.equal(expected[0], together[0]), end


ATTENTION = [
    pytest.param(dtype, heads, kv_heads, size, id=f"{dtype}-{heads}-{kv_heads}-{size}")
    for dtype in ("float32", "bfloat16")
    for heads, kv_heads, size in ((4, 2, 16), (9, 3, 64), (2, 2, 32), (8, 1, 64))
]


class AttentionCase:
    """Three sequences' keys and values in a paged cache whose unused slots hold large numbers."""

    lengths = (300, 37, 128)

    def __init__(self, dtype: str, heads: int, kv_heads: int, size: int, block_size: int = 16) -> None:
        architecture = read_architecture(
            {
                **MODELS["llama"],
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": size,
                "hidden_size": heads * 8,
            },
            "test",
        )
        generator = torch.Generator().manual_seed(0)
        self.cache = KVCache(architecture, 1, 64, block_size, getattr(torch, dtype), CPU)
        self.cache.allocate()
        self.layer = self.cache.layer(0)
        self.layer[:, : self.cache.num_blocks] = 1e4
        self.attention = PagedAttention(heads, self.cache, kv_heads, size)
        blocks = BlockManager(64, block_size)
        self.tables: list[list[int]] = [[] for _ in self.lengths]
        for start in range(0, max(self.lengths), block_size):  # interleaved, so that no table is contiguous
            for table, length in zip(self.tables, self.lengths, strict=True):
                if start < length:
                    blocks.reserve(table, start, min(start + block_size, length))
        self.values = [torch.randn(n, 2 * kv_heads, size, generator=generator).to(self.layer.dtype) for n in self.lengths]
        self.queries = [torch.randn(n, heads, size, generator=generator).to(self.layer.dtype) for n in self.lengths]
        for table, values in zip(self.tables, self.values, strict=True):
            for position, value in enumerate(values):
                self.layer[:, table[position // block_size], position % block_size] = value

    def run(self, *spans: tuple[int, int, int]) -> list[torch.Tensor]:
        """Outputs of (sequence, start, end) computed in one pass; single tokens first."""
        plan = self.attention.plan([QuerySpan(start, end, self.tables[which]) for which, start, end in spans])
        query = torch.cat([self.queries[which][start:end] for which, start, end in spans])
        return list(self.attention(query, self.layer, plan).split([end - start for _, start, end in spans]))

    def reference(self, which: int, start: int, end: int) -> torch.Tensor:
        keys, values = self.values[which][:end].chunk(2, dim=1)
        return reference_attention(self.queries[which][start:end], keys, values, start)


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "size"), ATTENTION)
def test_attention_equals_its_definition(dtype: str, heads: int, kv_heads: int, size: int) -> None:
    case = AttentionCase(dtype, heads, kv_heads, size)
    spans = [(1, 36, 37), (2, 127, 128), (0, 0, 300)]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for span, actual in zip(spans, case.run(*spans), strict=True):
        torch.testing.assert_close(actual.float(), case.reference(*span), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "size"), ATTENTION)
def test_attention_has_the_same_bits_in_any_company(dtype: str, heads: int, kv_heads: int, size: int) -> None:
    case = AttentionCase(dtype, heads, kv_heads, size)
    (whole,) = case.run((0, 0, 300))
    for position in (0, 1, 127, 128, 255, 299):
        alone = case.run((0, position, position + 1))[0]
        assert torch.equal(alone[0], whole[position])
        assert torch.equal(case.run((1, 36, 37), (0, position, position + 1), (2, 3, 90))[1], alone)
    assert torch.equal(case.run((1, 0, 1), (0, 41, 222))[1], whole[41:222])


def test_blocks_that_do_not_divide_the_chunk() -> None:
    case = AttentionCase("float32", 4, 2, 16, block_size=24)
    whole = case.run((0, 0, 300))[0]
    torch.testing.assert_close(whole, case.reference(0, 0, 300), atol=1e-5, rtol=0)
    for position in (0, 50, 299):
        assert torch.equal(case.run((0, position, position + 1))[0][0], whole[position])


def test_a_pass_writes_no_other_sequences_keys_and_values() -> None:
    engine = make_engine("llama")
    engine.model.prepare()
    neighbour, other = (make_sequence(ids) for ids in prompts(45, 90))
    compute(engine, neighbour, 45)
    pool = torch.stack([engine.cache.layer(i) for i in range(2)])
    held, null = pool[:, :, neighbour.block_table].clone(), engine.cache.null_block
    for count in (50, 39, 1):
        compute(engine, other, count)
        pool = torch.stack([engine.cache.layer(i) for i in range(2)])
        assert torch.equal(pool[:, :, neighbour.block_table], held)
    assert not pool[:, :, null].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_prepacked_linear_equals_torch_and_follows_the_weights(bias: bool, dtype: str) -> None:
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 weights on this processor")
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight, x = (torch.randn(*shape, generator=generator).to(kind) for shape in ((96, 64), (5, 64)))
    offset = torch.randn(96, generator=generator).to(kind) if bias else None
    plain, packed = LINEAR_KERNELS["torch"](weight, offset), PrepackedLinear(weight, offset)
    for _ in range(2):
        packed.prepare()
        torch.testing.assert_close(packed(x), plain(x), atol=0.1, rtol=1e-2)
        weight.copy_(torch.randn(96, 64, generator=generator))


def test_kernels_are_resolved_by_dtype_and_device() -> None:
    prepacked = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    best = "native" if not native.why_unavailable() else "prepacked" if prepacked else "torch"
    assert resolve_linear_kernel("auto", torch.float32, CPU) == "prepacked"
    assert resolve_linear_kernel("auto", torch.bfloat16, CPU) == best
    assert resolve_linear_kernel("auto", torch.bfloat16, torch.device("cuda")) == "torch"
    assert resolve_linear_kernel("torch", torch.bfloat16, CPU) == "torch"
    if prepacked:
        assert resolve_linear_kernel("prepacked", torch.bfloat16, CPU) == "prepacked"
    else:
        with pytest.raises(UserError, match=r"rollout.kernels = prepacked can't run: .* need avx512bw.*; use auto"):
            resolve_linear_kernel("prepacked", torch.bfloat16, CPU)
    with pytest.raises(UserError, match=r"rollout.kernels = prepacked can't run: .* CPU .* cuda; use auto"):
        resolve_linear_kernel("prepacked", torch.bfloat16, torch.device("cuda"))
    with pytest.raises(UserError, match=r"rollout.kernels = native can't run: .* bfloat16 .*float32 on cpu; use auto"):
        resolve_linear_kernel("native", torch.float32, CPU)
    with pytest.raises(UserError, match=r"rollout.kernels = fast is unknown; known are auto, native, prepacked, torch"):
        resolve_linear_kernel("fast", torch.float32, CPU)


def test_pool_size_follows_from_memory() -> None:
    architecture = read_architecture(MODELS["llama"], "test")
    per_block = 2 * 2 * 32 * 16 * 2  # layers, keys and values, kv size, block size, bytes
    assert num_blocks(RolloutConfig(kv_cache_gib=100.5 * per_block / 2**30), architecture) == 100
    assert num_blocks(RolloutConfig(num_kv_blocks=7), architecture) == 7
    with pytest.raises(UserError, match=r"rollout.kv_cache_gib"):
        num_blocks(RolloutConfig(kv_cache_gib=1e-6), architecture)


def sums_of_one_row_and_of_many() -> tuple[torch.Tensor, torch.Tensor]:
    """A row summed over the ranks alone, and among others."""
    assert dist.group.WORLD is not None
    rows = torch.randn(5, 576, generator=torch.Generator().manual_seed(dist.get_rank())).to(torch.bfloat16)
    alone = rows[2:3].clone()
    sum_over_ranks(alone, dist.group.WORLD)
    sum_over_ranks(rows, dist.group.WORLD)
    return alone[0].float(), rows[2].float()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_rows_sum_over_ranks_does_not_depend_on_the_other_rows(rank_pool, world_size: int) -> None:
    results = rank_pool.run(world_size, sums_of_one_row_and_of_many)
    for alone, among_others in results:
        assert torch.equal(alone, among_others) and torch.equal(alone, results[0][0])
