import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from erollout.engine.sampling.logits import ShardLogits, process_logits, shard_logits
from erollout.engine.sampling.random import gumbel, stream_keys
from erollout.engine.sampling.sampler import NonFiniteLogits, SampledTokens, Sampler, SamplingRow, draw
from erollout.types import SamplingParams

PLAIN = SamplingParams()


def reference_processed(logits: Tensor, params: SamplingParams, context: list[int]) -> Tensor:
    """Log-probabilities [V] that one row is sampled from, written plainly and in float64. Greedy: of the raw logits."""
    x = logits.double().clone()
    for token in set(context):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    if params.temperature == 0:
        return x.log_softmax(-1)
    x /= params.temperature
    if params.top_k:
        x[x < sorted(x.tolist(), reverse=True)[: params.top_k][-1]] = -math.inf
    probabilities, order = x.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    if params.top_p < 1:
        x[order[before >= params.top_p]] = -math.inf
    x[x.softmax(-1) < params.min_p * x.softmax(-1).max()] = -math.inf
    return x.log_softmax(-1)


def reference_token(logits: Tensor, row: SamplingRow) -> int:
    """Noise for every token, no shortcuts."""
    x = reference_processed(logits, row.params, list(row.context_ids or []))
    if row.params.temperature > 0:
        keys = stream_keys(torch.tensor([row.seed]), torch.tensor([row.position]))
        x = x + gumbel(keys, torch.arange(len(x)))
    return int(x.argmax())


def rows_of(params: SamplingParams, count: int, context: list[int] | None = None) -> list[SamplingRow]:
    return [SamplingRow(params, seed=1000 + i, position=i % 5, context_ids=context) for i in range(count)]


def normal(rows: int, columns: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


SETTINGS = [
    PLAIN,
    replace(PLAIN, temperature=0.0),
    replace(PLAIN, temperature=0.6),
    replace(PLAIN, temperature=2.5),
    replace(PLAIN, top_k=1),
    replace(PLAIN, top_k=7),
    replace(PLAIN, top_k=10**6),
    replace(PLAIN, top_p=0.5),
    replace(PLAIN, top_p=0.999),
    replace(PLAIN, top_p=1e-9),
    replace(PLAIN, min_p=0.1),
    replace(PLAIN, min_p=1.0),
    replace(PLAIN, repetition_penalty=1.7),
    replace(PLAIN, repetition_penalty=0.5, temperature=0.0),
    replace(PLAIN, temperature=1.3, top_k=40, top_p=0.8),
    replace(PLAIN, top_k=40, min_p=0.02),
    replace(PLAIN, temperature=0.8, top_p=0.9, min_p=0.05),
    replace(PLAIN, repetition_penalty=1.3, temperature=1.5, top_k=100, top_p=0.95, min_p=0.01),
]


def describe(p: SamplingParams) -> str:
    default = SamplingParams()
    changed = {name: getattr(p, name) for name in SamplingParams.__slots__ if getattr(p, name) != getattr(default, name)}
    return ",".join(f"{name}={value}" for name, value in changed.items()) or "plain"


@pytest.mark.parametrize("params", SETTINGS, ids=describe)
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_tokens_and_logprobs_equal_the_reference(params: SamplingParams, scale: float) -> None:
    logits = normal(24, 1500, scale)
    context = [3, 3, 77, *logits[0].topk(5).indices.tolist()]
    rows = rows_of(params, len(logits), context)
    got = Sampler(1500).sample(logits, rows)
    assert got.token_ids == [reference_token(x, row) for x, row in zip(logits, rows, strict=True)]
    for i, (x, token) in enumerate(zip(logits, got.token_ids, strict=True)):
        raw = x.double().log_softmax(-1)[token].item()
        processed = reference_processed(x, params, context)[token].item()
        assert got.raw_logprobs[i] == pytest.approx(raw, abs=2e-5)
        assert got.logprobs[i] == pytest.approx(raw if params.temperature == 0 else processed, abs=2e-5)


@pytest.mark.parametrize("params", SETTINGS, ids=describe)
def test_processed_distribution_equals_the_reference(params: SamplingParams) -> None:
    logits = normal(6, 2000)
    context = [0, 5, 1999]
    processed = process_logits(shard_logits(logits, 2000), [params] * 6, [context] * 6)
    got = processed.logprobs()[:, :2000]
    want = torch.stack([reference_processed(x, params, context) for x in logits])
    assert torch.equal(got.isfinite(), want.isfinite())
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite].float(), atol=2e-5, rtol=0)


def test_filters_keep_or_remove_equal_logits_together() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]])
    for params in [replace(PLAIN, top_k=2), replace(PLAIN, top_p=0.3), replace(PLAIN, min_p=0.9)]:
        kept = process_logits(shard_logits(logits, 6), [params], [None]).values[0] > -math.inf
        assert kept.nonzero().flatten().tolist() == [1, 2, 4]


def test_raw_logits_are_neither_copied_nor_changed_without_need() -> None:
    raw = shard_logits(normal(2, 100), 100)
    assert process_logits(raw, [PLAIN, replace(PLAIN, temperature=0.0, top_k=3)], [None, None]) is raw
    before = raw.values.clone()
    process_logits(raw, [replace(PLAIN, temperature=2.0, top_k=3, repetition_penalty=2.0)] * 2, [[1], [2]])
    assert torch.equal(raw.values, before)


@pytest.mark.parametrize(
    ("params", "draws"),
    [(PLAIN, 20_000), (SETTINGS[-1], 20_000), pytest.param(PLAIN, 200_000, marks=pytest.mark.full)],
    ids=["plain", "everything", "many"],
)
def test_samples_follow_the_distribution(params: SamplingParams, draws: int) -> None:
    """Chi-square of draws at successive positions of one sequence against the exact probabilities."""
    batch, vocabulary = 250, 12
    logits = normal(1, vocabulary, 1.5)
    processed = process_logits(shard_logits(logits, vocabulary), [params], [[1, 2]])
    many = replace(processed, values=processed.values.repeat(batch, 1))
    counts = torch.zeros(vocabulary)
    for start in range(0, draws, batch):
        rows = [SamplingRow(params, 42, position, [1, 2]) for position in range(start, start + batch)]
        counts += torch.bincount(draw(many, rows)[1], minlength=vocabulary)
    expected = reference_processed(logits[0], params, [1, 2]).exp().float() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


class NoWaiting(TorchDispatchMode):
    """Fails at what makes the host wait for an accelerator: values or shapes that depend on data, tensors made from lists."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        scalar = "lift_fresh" in name and args[0].dim() == 0  # `x[i] = 1.0`: a fill
        assert scalar or not any(word in name for word in self.WAITING), f"{name} waits for the device"
        indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


def draft(sampler: Sampler, logits: list[Tensor], rows: list[SamplingRow]) -> list[Tensor]:
    """A draft loop over the given logits, each for as many leading rows as it has."""
    prepared = sampler.prepare(rows, logits[0].device)
    drafts: list[Tensor] = []
    with NoWaiting():
        for x in logits:
            if drafts:
                prepared = prepared.first(len(x)).advance(drafts[-1][: len(x)])
            drafts.append(sampler.draw_on_device(x, prepared)[0])
    return drafts


def test_no_waiting_notices_waits() -> None:
    x = torch.arange(3)
    for wait in (lambda: x[0].item(), x.nonzero, lambda: x[x > 1], lambda: torch.tensor([1]), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()


def test_a_draft_loop_draws_what_sampling_draws() -> None:
    """All settings at once, rows dropping out from the end, contexts that grow by the drafts."""
    vocabulary, context = 1500, [3, 77, 500]
    rows = [SamplingRow(p, 1000 + i, 4 * i, context) for i, p in enumerate(SETTINGS)]
    logits = [normal(n, vocabulary, 3.0, seed=n).bfloat16() for n in (len(rows), len(rows), 9, 2)]
    drafts = draft(Sampler(vocabulary), logits, rows)
    contexts = [list(context) for _ in rows]
    for step, (x, drafted) in enumerate(zip(logits, drafts, strict=True)):
        at = [replace(r, position=r.position + step, context_ids=c) for r, c in zip(rows, contexts, strict=True)][: len(x)]
        assert drafted.tolist() == Sampler(vocabulary).sample(x, at).token_ids
        for c, token in zip(contexts, drafted.tolist(), strict=False):
            c.append(token)


def test_processed_logits_of_a_draft_loop_stay_until_the_next_one() -> None:
    sampler, params = Sampler(300), [replace(PLAIN, temperature=0.5, top_k=20), PLAIN]
    for settings in (params, [PLAIN, PLAIN]):
        rows = sampler.prepare([SamplingRow(p, 1, 1) for p in settings], torch.device("cpu"))
        logits = [normal(2, 300, seed=i) for i in range(3)]
        kept = []
        for x in logits:
            token_ids, processed = sampler.draw_on_device(x, rows)
            kept.append(processed)
            rows = rows.advance(token_ids)
        for x, processed in zip(logits, kept, strict=True):
            want = process_logits(shard_logits(x, 300), settings, [None, None])
            assert torch.equal(processed.values, want.values)


@pytest.mark.parametrize("params", SETTINGS, ids=describe)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_draft_from_broken_logits_is_a_valid_id(params: SamplingParams, bad: float) -> None:
    logits = normal(3, 128)
    logits[0] = bad
    logits[1, 7] = bad
    logits[2, 100:] = bad  # padding
    rows = rows_of(params, 3, [1, 2])
    sampler = Sampler(100)
    token_ids, _ = sampler.draw_on_device(logits, sampler.prepare(rows, logits.device))
    assert token_ids.dtype == torch.int64 and all(0 <= i < 100 for i in token_ids.tolist())
    assert token_ids[2] == sampler.sample(logits[2:], rows[2:]).token_ids[0]


@pytest.mark.parametrize("shape", ["flat", "normal", "peaked", "few", "steep", "huge"])
def test_skipping_blocks_finds_the_same_token_as_noise_for_all(shape: str) -> None:
    vocabulary = 5000
    logits = {
        "flat": torch.zeros(32, vocabulary),
        "normal": normal(32, vocabulary),
        "peaked": normal(32, vocabulary) + 30 * torch.eye(32, vocabulary),
        "few": torch.full((32, vocabulary), -math.inf).index_fill(1, torch.tensor([5, 69, 4999]), 1.0),
        "steep": torch.arange(float(vocabulary)).expand(32, -1) / 100,
        "huge": normal(32, vocabulary) * 1e30,
    }[shape]
    rows = rows_of(PLAIN, 32)
    keys = stream_keys(torch.tensor([r.seed for r in rows]), torch.tensor([r.position for r in rows]))
    every = logits.double() + gumbel(keys.unsqueeze(-1), torch.arange(vocabulary))
    assert Sampler(vocabulary).sample(logits, rows).token_ids == every.argmax(-1).tolist()


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.zeros(2, 3000)
    logits[0, [2999, 1500, 70]] = 4.0
    got = Sampler(3000).sample(logits, rows_of(replace(PLAIN, temperature=0.0), 2))
    assert got.token_ids == [70, 0]
    assert got.logprobs == got.raw_logprobs


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = normal(len(SETTINGS), 3000).bfloat16()
    rows = [SamplingRow(p, 7 * i, i, [1, 2, 3]) for i, p in enumerate(SETTINGS)]
    sampler = Sampler(3000)
    together = sampler.sample(logits, rows)
    backwards = sampler.sample(logits.flip(0), rows[::-1])
    alone = [sampler.sample(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    assert together.token_ids == backwards.token_ids[::-1] == [s.token_ids[0] for s in alone]
    assert together.logprobs == pytest.approx([s.logprobs[0] for s in alone], abs=1e-6)
    assert together.raw_logprobs == pytest.approx([s.raw_logprobs[0] for s in alone], abs=1e-6)


@pytest.mark.parametrize("params", SETTINGS, ids=describe)
def test_padding_is_never_sampled(params: SamplingParams) -> None:
    logits = normal(16, 64)
    logits[:, 50:] = 100.0
    context = [1, 2, 60]
    got = Sampler(50).sample(logits, rows_of(params, 16, context))
    assert max(got.token_ids) < 50
    assert got == Sampler(50).sample(logits[:, :50], rows_of(params, 16, context))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [PLAIN, replace(PLAIN, temperature=0.0), replace(PLAIN, top_p=0.9), SETTINGS[-1]], ids=describe
)
def test_logits_without_a_softmax_are_an_error_that_names_the_row(bad: float, params: SamplingParams) -> None:
    logits = normal(4, 300)
    logits[2, 123] = bad
    with pytest.raises(NonFiniteLogits, match=r"row 2 of 4 .*seed 1002, position 2"):
        Sampler(300).sample(logits, rows_of(params, 4, [0]))


def test_a_row_of_minus_infinity_is_an_error() -> None:
    with pytest.raises(NonFiniteLogits):
        Sampler(300).sample(torch.full((1, 300), -math.inf), rows_of(PLAIN, 1))


def test_no_rows() -> None:
    assert Sampler(10).sample(torch.zeros(0, 10), []) == SampledTokens([], [], [])


def sample_shard(logits: Tensor, vocab_size: int, rows: list[SamplingRow]) -> tuple[SampledTokens, list[int]]:
    """Sampled and drafted; each rank takes its columns of logits that are padded to a multiple of the world."""
    columns = logits.shape[1] // dist.get_world_size()
    start = dist.get_rank() * columns
    sampler, local = Sampler(vocab_size, start, dist.group.WORLD), logits[:, start : start + columns]
    drafted, _ = sampler.draw_on_device(local, sampler.prepare(rows, local.device))
    return sampler.sample(local, rows), drafted.tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("columns", "vocab_size"), [(4096, 4096), (3000, 2999), (64, 15)])
def test_shards_draw_what_one_rank_draws(rank_pool: RankPool, world_size: int, columns: int, vocab_size: int) -> None:
    """Shards that end within a tile, padding, a shard of nothing but padding; every setting, flat and peaked rows, ties."""
    shapes = [normal(1, columns, 0.1), normal(1, columns, 5.0), torch.zeros(1, columns), normal(1, columns).round()]
    cases = list(itertools.product(SETTINGS, shapes))
    logits = torch.cat([x for _, x in cases])
    rows = [SamplingRow(p, 31 * i, i, [0, 1, 2, vocab_size - 1]) for i, (p, _) in enumerate(cases)]
    one = Sampler(vocab_size).sample(logits, rows)
    for shard, drafted in rank_pool.run(world_size, sample_shard, logits, vocab_size, rows):
        assert drafted == one.token_ids
        assert shard.token_ids == one.token_ids
        assert shard.logprobs == pytest.approx(one.logprobs, abs=2e-6)
        assert shard.raw_logprobs == pytest.approx(one.raw_logprobs, abs=2e-6)


def kept_columns(logits: Tensor, params: list[SamplingParams]) -> list[int]:
    columns = logits.shape[1] // dist.get_world_size()
    start = dist.get_rank() * columns
    raw = shard_logits(logits[:, start : start + columns], logits.shape[1], start, dist.group.WORLD)
    processed: ShardLogits = process_logits(raw, params, [None] * len(params))
    return (processed.values > -math.inf).sum(-1).tolist()


@pytest.mark.distributed
def test_top_p_over_shards_keeps_as_many_tokens_as_on_one_rank(rank_pool: RankPool) -> None:
    """From a few candidates to most of the vocabulary: several rounds of looking at more of it."""
    params = [replace(PLAIN, top_p=p) for p in (0.01, 0.1, 0.5, 0.9, 0.99, 0.9999)]
    logits = normal(1, 8192, 0.7).expand(len(params), -1).contiguous()
    one = process_logits(shard_logits(logits, 8192), params, [None] * len(params))
    kept = (one.values > -math.inf).sum(-1)
    assert kept[0] < 64 and kept[-1] > 7000
    shards = rank_pool.run(2, kept_columns, logits, params)
    assert (torch.tensor(shards[0]) + torch.tensor(shards[1])).tolist() == kept.tolist()


def sample_with_nan(logits: Tensor, rows: list[SamplingRow]) -> str:
    try:
        sample_shard(logits, logits.shape[1], rows)
    except NonFiniteLogits as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_nan_in_one_shard_is_an_error_on_every_rank(rank_pool: RankPool) -> None:
    logits = normal(3, 100)
    logits[1, 80] = math.nan
    for params in (PLAIN, replace(PLAIN, top_p=0.5)):
        messages = rank_pool.run(2, sample_with_nan, logits, rows_of(params, 3))
        assert all("row 1 of 3" in message for message in messages)
