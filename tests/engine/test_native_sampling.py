"""The native sampler against the torch one, token for token."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from test_sampler import PLAIN, SETTINGS, describe, draft, normal, rows_of
from torch import Tensor

from erollout.engine.sampling.random import LANES, block_exponentials
from erollout.engine.sampling.sampler import NonFiniteLogits, SampledTokens, Sampler, SamplingRow
from erollout.kernels import native
from erollout.kernels.native_sampling import block_noise, job_bytes
from erollout.types import SamplingParams

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def agree(got: SampledTokens, want: SampledTokens, tolerance: float = 1e-6) -> None:
    assert got.token_ids == want.token_ids
    assert got.raw_logprobs == pytest.approx(want.raw_logprobs, abs=tolerance)
    assert got.logprobs == pytest.approx(want.logprobs, abs=tolerance)


def both(logits: Tensor, rows: list[SamplingRow], vocab_size: int) -> tuple[SampledTokens, SampledTokens]:
    return Sampler(vocab_size, kernel="native").sample(logits, rows), Sampler(vocab_size).sample(logits, rows)


def logits_of(shape: str, rows: int, columns: int) -> Tensor:
    x = {
        "flat": torch.zeros(rows, columns),
        "near flat": normal(rows, columns, 0.01),
        "normal": normal(rows, columns),
        "wide": normal(rows, columns, 20.0),
        "peaked": normal(rows, columns) + 30 * torch.eye(rows, columns),
        "few": torch.full((rows, columns), -math.inf).index_fill(
            1, torch.tensor([columns // 9, columns // 2, columns - 1]), 1.0
        ),
        "steep": torch.arange(float(columns)).expand(rows, -1) / 100,
        "far from 0": normal(rows, columns) - 300.0,
    }
    return x[shape].contiguous()


SHAPES = ["flat", "near flat", "normal", "wide", "peaked", "few", "steep", "far from 0"]


def test_the_job_has_the_size_that_was_compiled() -> None:
    packed, compiled = job_bytes()
    assert packed == compiled


@pytest.mark.parametrize("key", [0, 1, -1, 0x123456789ABCDEF])
def test_bounds_are_ten_times_closer_than_their_margin(key: int) -> None:
    got = block_noise(key, 7, 1 << 17)
    smallest, _ = block_exponentials(torch.tensor(key), torch.arange(7, 7 + (1 << 17)))
    assert got.shape == smallest.shape and LANES == 16
    assert (got - -smallest.log()).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 64, 97, 1000, 5001])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_torchs(shape: str, vocab_size: int, dtype: torch.dtype) -> None:
    """Temperature alone; ties and ids of low probability included."""
    rows = [
        SamplingRow(replace(PLAIN, temperature=t), seed=100 * i + s, position=s % 7)
        for i, t in enumerate([0.0, 0.3, 1.0, 2.0])
        for s in range(12)
    ]
    agree(*both(logits_of(shape, len(rows), vocab_size).to(dtype), rows, vocab_size))


def test_a_large_vocabulary() -> None:
    rows = [*rows_of(PLAIN, 4), *rows_of(replace(PLAIN, temperature=0.7), 4), *rows_of(replace(PLAIN, temperature=0), 2)]
    for scale in (0.1, 3.0):
        agree(*both(normal(10, 49_152, scale).bfloat16(), rows, 49_152))


@pytest.mark.parametrize("params", SETTINGS, ids=describe)
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_every_setting_draws_torchs_tokens(params: SamplingParams, scale: float) -> None:
    logits = normal(24, 1500, scale)
    context = [3, 3, 77, *logits[0].topk(5).indices.tolist()]
    agree(*both(logits, rows_of(params, len(logits), context), 1500))


@pytest.mark.parametrize("params", [p for p in SETTINGS if p.temperature], ids=describe)
@pytest.mark.parametrize("shape", SHAPES)
def test_processed_logits_are_torchs(params: SamplingParams, shape: str) -> None:
    """The same tokens stay and go, ties included, with the same bits."""
    logits, rows = logits_of(shape, 4, 3000).bfloat16(), rows_of(params, 4, [1, 5, 5, 2999])
    processed = []
    for kernel in ("native", "torch"):
        sampler = Sampler(2999, kernel=kernel)
        processed.append(sampler.draw_on_device(logits, sampler.prepare(rows, logits.device))[1])
    assert torch.equal(processed[0].values, processed[1].values)
    assert (processed[0].first_id, processed[0].vocab_size) == (processed[1].first_id, processed[1].vocab_size)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 200,000 draws against the exact softmax."""
    vocabulary, batch, draws = 12, 500, 200_000
    logits, sampler = normal(1, vocabulary, 1.5), Sampler(vocabulary, kernel="native")
    many, counts = logits.repeat(batch, 1), torch.zeros(vocabulary)
    prepared = sampler.prepare([SamplingRow(PLAIN, seed, 0) for seed in range(batch)], logits.device)
    for _ in range(draws // batch):
        ids = sampler.draw_ids_on_device(many, prepared)
        counts += torch.bincount(ids, minlength=vocabulary)
        prepared = prepared.advance(ids)
    expected = logits[0].softmax(-1) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < (vocabulary - 1) + 5 * math.sqrt(2 * (vocabulary - 1))


def test_logprobs_are_those_of_float64() -> None:
    logits, rows = normal(8, 49_152).bfloat16(), rows_of(replace(PLAIN, temperature=0.8), 8)
    got = Sampler(49_152, kernel="native").sample(logits, rows)
    index = torch.tensor(got.token_ids).unsqueeze(-1)
    raw = logits.double().log_softmax(-1).gather(-1, index).flatten()
    processed = (logits.float() / 0.8).double().log_softmax(-1).gather(-1, index).flatten()
    assert got.raw_logprobs == pytest.approx(raw.tolist(), abs=3e-7)
    assert got.logprobs == pytest.approx(processed.tolist(), abs=3e-7)


def test_a_row_does_not_depend_on_its_neighbours_or_the_threads() -> None:
    logits = normal(len(SETTINGS), 3000).bfloat16()
    rows = [SamplingRow(p, 7 * i, i, [1, 2, 3]) for i, p in enumerate(SETTINGS)]
    sampler = Sampler(3000, kernel="native")
    together = sampler.sample(logits, rows)
    backwards = sampler.sample(logits.flip(0), rows[::-1])
    alone = [sampler.sample(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        parallel = Sampler(3000, kernel="native").sample(logits, rows)
    finally:
        torch.set_num_threads(threads)
    for other in (parallel, SampledTokens(*(column[::-1] for column in columns(backwards)))):
        assert other == together
    assert [columns(s) for s in alone] == [([t], [p], [r]) for t, p, r in zip(*columns(together), strict=True)]


def columns(sampled: SampledTokens) -> tuple[list[int], list[float], list[float]]:
    return sampled.token_ids, sampled.logprobs, sampled.raw_logprobs


def test_padding_and_strides() -> None:
    wide = normal(16, 96)
    wide[:, 50:] = 100.0
    for params in SETTINGS:
        rows = rows_of(params, 16, [1, 2, 60])
        got = Sampler(50, kernel="native").sample(wide[:, :64], rows)
        assert got == Sampler(50, kernel="native").sample(wide[:, :50].contiguous(), rows)
        agree(got, Sampler(50).sample(wide[:, :50], rows))


def test_a_draft_loop_draws_what_sampling_draws() -> None:
    context = [3, 77, 500]
    rows = [SamplingRow(p, 1000 + i, 4 * i, context) for i, p in enumerate(SETTINGS)]
    logits = [normal(n, 1500, 3.0, seed=n).bfloat16() for n in (len(rows), len(rows), 9, 2)]
    drafts = draft(Sampler(1500, kernel="native"), logits, rows)
    for got, want in zip(drafts, draft(Sampler(1500), logits, rows), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("params", SETTINGS, ids=describe)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits(params: SamplingParams, bad: float) -> None:
    """A draft is some valid id; sampling names the row."""
    logits = normal(3, 128)
    logits[0] = bad
    logits[1, 7] = bad
    logits[2, 100:] = bad  # padding
    rows = rows_of(params, 3, [1, 2])
    sampler = Sampler(100, kernel="native")
    token_ids = sampler.draw_ids_on_device(logits, sampler.prepare(rows, logits.device))
    assert token_ids.dtype == torch.int64 and all(0 <= i < 100 for i in token_ids.tolist())
    agree(*both(logits[2:], rows[2:], 100))
    for row in (0,) if bad == -math.inf else (0, 1):
        with pytest.raises(NonFiniteLogits, match=f"row 1 of 2 .*seed {1000 + row}, position {row}"):
            sampler.sample(logits[[2, row]], [rows[2], rows[row]])


def test_no_rows() -> None:
    sampler = Sampler(10, kernel="native")
    assert sampler.sample(torch.zeros(0, 10), []) == SampledTokens([], [], [])


def sample_shard(logits: Tensor, vocab_size: int, rows: list[SamplingRow]) -> tuple[SampledTokens, list[int]]:
    columns = logits.shape[1] // dist.get_world_size()
    start = dist.get_rank() * columns
    sampler, local = Sampler(vocab_size, start, dist.group.WORLD, "native"), logits[:, start : start + columns]
    drafted = sampler.draw_ids_on_device(local, sampler.prepare(rows, local.device))
    return sampler.sample(local, rows), drafted.tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("width", "vocab_size"), [(3000, 2999), (66, 15)])
def test_shards_draw_what_one_rank_draws(rank_pool: RankPool, world_size: int, width: int, vocab_size: int) -> None:
    """Cuts within a tile, padding, a shard of nothing but padding, ties; with filters over all shards and without."""
    logits = torch.cat([normal(2, width, 0.1), normal(2, width, 5.0), torch.zeros(2, width), normal(2, width).round()])
    plain = [replace(PLAIN, temperature=t) for t in (1.0, 0.0, 0.7)] + [replace(PLAIN, repetition_penalty=1.7)]
    for settings in (plain, SETTINGS):
        rows = [SamplingRow(settings[i % len(settings)], 31 * i, i, [0, 1, vocab_size - 1]) for i in range(len(logits) * 3)]
        many = logits.repeat(3, 1)
        one = Sampler(vocab_size).sample(many, rows)
        for sampled, drafted in rank_pool.run(world_size, sample_shard, many, vocab_size, rows):
            agree(sampled, one)
            assert drafted == one.token_ids
