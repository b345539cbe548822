import math

import pytest
import torch
from torch import Tensor

from erollout.engine.sampling import random
from erollout.engine.sampling.random import gumbel, request_seed, sequence_seed, stream_keys, uniforms

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published generator's output for a state, in Python integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def reference_bits(key: int, counter: int) -> int:
    return splitmix64(key + (counter + 1) * 0x9E3779B97F4A7C15)


def reference_uniform(bits: int) -> float:
    return ((bits >> 12) + 0.5) / 2**52


def reference_gumbel(seed: int, position: int, token: int) -> float:
    key = splitmix64(splitmix64(seed + 0x9E3779B97F4A7C15) + (position + 1) * 0x9E3779B97F4A7C15)
    tile, lane, column = token // 1024, token // 64 % 16, token % 64
    bits = reference_bits(key, (1 << 32) + tile * 64 + column)
    exponential = -math.log(reference_uniform(bits)) / 16
    if bits % 16 != lane:
        exponential += -math.log(reference_uniform(reference_bits(key, token)))
    return -math.log(exponential)


def keys(seeds: list[int], positions: list[int]) -> Tensor:
    return stream_keys(torch.tensor(seeds), torch.tensor(positions))


def test_the_generator_is_the_published_one() -> None:
    """First outputs for the seeds 0 and 1234567, as widely published."""
    assert reference_bits(0, 0) == 0xE220A8397B1DCDAF
    assert [reference_bits(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]


def test_uniforms_equal_python_integers() -> None:
    some = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    got = uniforms(torch.tensor(some).unsqueeze(-1), torch.arange(50))
    assert got.tolist() == [[reference_uniform(reference_bits(key, i)) for i in range(50)] for key in some]


def test_gumbel_equals_python() -> None:
    tokens = [0, 1, 63, 64, 1023, 1024, 49151, 151_935]
    for seed, position in [(0, 0), (2**63 - 1, 7), (5, 100_000)]:
        got = gumbel(keys([seed], [position]), torch.tensor(tokens)).tolist()
        assert got == pytest.approx([reference_gumbel(seed, position, t) for t in tokens], rel=1e-14, abs=1e-14)


def test_extreme_bits_give_finite_noise() -> None:
    ends = random._uniforms(torch.tensor([0, -1]))
    assert ends.tolist() == [2.0**-53, 1 - 2.0**-53]
    assert ends.log().neg().log().isfinite().all()


def test_noise_of_a_token_does_not_depend_on_what_else_is_drawn() -> None:
    key = keys([3, 4, 5], [9, 9, 2])
    whole = gumbel(key.unsqueeze(-1), torch.arange(3000))
    assert torch.equal(gumbel(key[1:2], torch.arange(3000)), whole[1])
    for start, end in [(0, 1500), (1500, 3000), (777, 778), (1021, 1099)]:
        assert torch.equal(gumbel(key.unsqueeze(-1), torch.arange(start, end)), whole[:, start:end])
    shuffled = torch.randperm(3000)
    assert torch.equal(gumbel(key.unsqueeze(-1), shuffled), whole[:, shuffled])


def chi_square(counts: Tensor) -> float:
    """In standard deviations above its expectation, for equally likely bins."""
    expected = counts.sum().item() / counts.numel()
    freedom = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vary", ["seed", "position", "token"])
def test_noise_is_uniform_after_its_distribution_function(vary: str) -> None:
    index = torch.arange(400_000)
    constant = torch.zeros_like(index)
    seeds, positions, tokens = (index if vary == name else constant for name in ("seed", "position", "token"))
    uniform = torch.exp(-torch.exp(-gumbel(stream_keys(seeds, positions), tokens)))
    assert uniform.min() > 0 and uniform.max() < 1
    assert chi_square(torch.histc(uniform.float(), 1000, 0, 1)) < 5
    top = uniform[uniform > 0.999]  # the tail that decides which unlikely tokens win
    assert chi_square(torch.histc((top - 0.999).float() * 1000, 20, 0, 1)) < 5
    assert chi_square(torch.bincount((uniform * 2**20).long() % 64).double()) < 5  # low bits


@pytest.mark.parametrize(
    "step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 64), (0, 0, 1024), (1, -1, 0), (0, 1, -1), (1 << 40, 0, 0)], ids=str
)
def test_neighbouring_counters_are_independent(step: tuple[int, int, int]) -> None:
    """Joint uniformity of the noise at (seed, position, token) and at a fixed distance from it, over a grid."""
    grid = torch.cartesian_prod(torch.arange(20), torch.arange(1, 21), torch.arange(1, 1001))

    def at(offset: tuple[int, int, int]) -> Tensor:
        seed, position, token = (grid + torch.tensor(offset)).unbind(-1)
        return torch.exp(-torch.exp(-gumbel(stream_keys(seed, position), token)))

    first, second = at((0, 0, 0)), at(step)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(len(grid))
    cells = (first * 16).long() * 16 + (second * 16).long()
    assert abs(chi_square(torch.bincount(cells, minlength=256).double())) < 5


def test_each_token_of_a_block_is_equally_often_the_best() -> None:
    noise = gumbel(keys([0], [0]) + torch.arange(40_000).unsqueeze(-1) * 12345, torch.arange(0, 1024, 64))
    assert abs(chi_square(torch.bincount(noise.argmax(-1), minlength=16).double())) < 5
    assert abs(chi_square(torch.bincount(noise.argmin(-1), minlength=16).double())) < 5


def test_seeds_are_distinct_and_fit_in_int64() -> None:
    requests = {request_seed(run, step, prompt) for run in range(4) for step in range(25) for prompt in range(100)}
    assert len(requests) == 10_000
    samples = {sequence_seed(request, i) for request in list(requests)[:1000] for i in range(16)}
    assert len(samples) == 16_000
    assert not requests & samples
    assert all(0 <= seed < 2**63 for seed in requests | samples)
    assert abs(chi_square(torch.histc(torch.tensor([s / 2**63 for s in sorted(samples)]), 100, 0, 1))) < 5


def test_seeds_stay_the_same() -> None:
    """A resumed run draws what the unbroken one would have: these values may never change."""
    assert request_seed(1234, 5, 6) == REQUEST
    assert sequence_seed(REQUEST, 3) == SEQUENCE
    assert request_seed(-1, 0, 0) != request_seed(1, 0, 0)


REQUEST = 1307106598087634326
SEQUENCE = 3894796266351792967
