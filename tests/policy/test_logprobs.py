"""Vocabulary-parallel log-probs and entropy against torch's own operators and autograd."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

from erollout.policy import logprobs as module
from erollout.policy.logprobs import VocabShard, logprobs_and_entropy, reference_logprobs_and_entropy, vocab_shard

TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.bfloat16: dict(rtol=1.6e-2, atol=1e-3)}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "gather", "all_to_all", "all_to_all_single", "broadcast")


def _case(vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """logits [2, 5, vocab], labels [2, 5] that reach both ends of the vocabulary, upstream gradients [2, 2, 5]."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2, 5, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (2, 5), generator=generator)
    labels[0, 0], labels[-1, -1] = 0, vocab - 1
    return logits, labels, torch.randn(2, 2, 5, generator=generator)


def _with_gradient(function, logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient of upstream . (logprobs, entropy) by the logits)."""
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = function(leaf)
    (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def _expected(logits: Tensor, labels: Tensor, upstream: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The reference in float32, its gradient rounded to the dtype of the logits by autograd."""
    return _with_gradient(lambda x: reference_logprobs_and_entropy(x, labels, temperature), logits, upstream)


def test_the_reference_is_the_definition() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    logprobs, entropy = reference_logprobs_and_entropy(probabilities.log()[None], torch.tensor([1]))
    assert logprobs.item() == pytest.approx(-1.3862944)
    assert entropy.item() == pytest.approx(1.0397208)  # 1.5 ln 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk_elements", [1, 26, 1 << 24])
def test_one_rank_equals_the_reference(monkeypatch, dtype: torch.dtype, temperature: float, chunk_elements: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk_elements)
    logits, labels, upstream = _case(13, dtype)
    shard = VocabShard(None, 0, 13)
    got = _with_gradient(lambda x: logprobs_and_entropy(x, labels, shard, temperature), logits, upstream)
    want = _expected(logits, labels, upstream, temperature)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == dtype
    torch.testing.assert_close(got[0], want[0], **TOLERANCE[torch.float32])
    torch.testing.assert_close(got[1], want[1], **TOLERANCE[torch.float32])
    torch.testing.assert_close(got[2], want[2], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_left_as_they_were(dtype: torch.dtype) -> None:
    logits, labels, _ = _case(13, dtype)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(leaf, labels, VocabShard(None, 0, 13), temperature=0.5)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(leaf.detach(), logits)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradients_are_those_of_finite_differences() -> None:
    logits, labels, _ = _case(5, torch.float32)
    function = lambda x: logprobs_and_entropy(x, labels, VocabShard(None, 0, 5), 0.8)  # noqa: E731
    # eps^2 truncation and 1e-7 / eps rounding are both below the tolerance
    assert torch.autograd.gradcheck(function, (logits.div(3).requires_grad_(),), eps=1e-2, atol=2e-3, rtol=1e-2)


def test_logits_need_not_be_contiguous() -> None:
    logits, labels, upstream = _case(13, torch.float32)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    shard = VocabShard(None, 0, 13)
    plain = _with_gradient(lambda x: logprobs_and_entropy(x, labels, shard), logits, upstream)
    strided = _with_gradient(lambda x: logprobs_and_entropy(x.transpose(0, 1), labels, shard), turned.transpose(0, 1), upstream)
    assert torch.equal(plain[0], strided[0]) and torch.equal(plain[1], strided[1])
    assert torch.equal(plain[2], strided[2].transpose(0, 1))


def test_only_one_of_the_two_results_may_be_used() -> None:
    logits, labels, _ = _case(13, torch.float32)
    shard = VocabShard(None, 0, 13)
    for used in (0, 1):
        mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        logprobs_and_entropy(mine, labels, shard)[used].sum().backward()
        reference_logprobs_and_entropy(other, labels)[used].sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, **TOLERANCE[torch.float32])


def test_large_logits_neither_overflow_nor_give_nan() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e38, -3e38, -3e38]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 2]), VocabShard(None, 0, 3), 0.9)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(logprobs, torch.tensor([-6e4 / 0.9, -1.0986123]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 1.0986123]))


def test_no_tokens_are_no_error() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.int64), VocabShard(None, 0, 7))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,) and logits.grad.shape == (0, 7)


def _on_a_tensor_rank(vocab: int, columns: int, dtype: torch.dtype, temperature: float, chunk: int) -> dict[str, object]:
    """This rank's results for its columns of `_case`, behind which padding holds large values, and what crossed ranks."""
    logits, labels, upstream = _case(vocab, dtype)
    shard = vocab_shard(dist.group.WORLD, vocab, columns)
    local = torch.full((*logits.shape[:-1], columns), 1e4, dtype=dtype)
    local[..., : shard.size] = logits[..., shard.start : shard.start + shard.size]
    sent: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    before, module._CHUNK_ELEMENTS = module._CHUNK_ELEMENTS, chunk
    try:
        for name, original in originals.items():
            setattr(dist, name, _recording(name, original, sent))
        results = _with_gradient(lambda x: logprobs_and_entropy(x, labels, shard, temperature), local, upstream)
    finally:
        module._CHUNK_ELEMENTS = before
        for name, original in originals.items():
            setattr(dist, name, original)
    # plain floats: the parent needs no shared memory to read them
    return {"results": [r.float().tolist() for r in results], "sent": sent, "size": shard.size, "dtype": results[2].dtype}


def _recording(name: str, collective, sent: list[tuple[str, int]]):
    def recorded(*args, **kwargs):
        sent.append((name, sum(a.numel() for a in args if isinstance(a, Tensor))))
        return collective(*args, **kwargs)

    return recorded


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world_size", "vocab", "columns", "temperature", "chunk"),
    [
        (2, 13, 7, 1.0, 1 << 24),  # one column of padding
        (2, 8, 4, 0.7, 1 << 24),  # none
        (4, 13, 4, 2.0, 8),  # a last shard of one real column; chunks of two rows
        (4, 13, 5, 0.7, 1),  # a last shard of padding alone; chunks of one row
    ],
)
def test_tensor_parallel_ranks_equal_the_reference(
    rank_pool: RankPool, world_size: int, vocab: int, columns: int, temperature: float, chunk: int, dtype: torch.dtype
) -> None:
    answers = rank_pool.run(world_size, _on_a_tensor_rank, vocab, columns, dtype, temperature, chunk)
    logits, labels, upstream = _case(vocab, dtype)
    logprobs, entropy, gradient = _expected(logits, labels, upstream, temperature)
    sizes = [answer["size"] for answer in answers]
    assert sum(sizes) == vocab
    for rank, answer in enumerate(answers):
        got_logprobs, got_entropy, got_gradient = (torch.tensor(r) for r in answer["results"])
        assert answer["results"][:2] == answers[0]["results"][:2], "ranks must agree bit for bit"
        torch.testing.assert_close(got_logprobs, logprobs, **TOLERANCE[torch.float32])
        torch.testing.assert_close(got_entropy, entropy, **TOLERANCE[torch.float32])
        start, size = sum(sizes[:rank]), sizes[rank]
        torch.testing.assert_close(got_gradient[..., :size], gradient[..., start : start + size].float(), **TOLERANCE[dtype])
        assert not got_gradient[..., size:].any(), "padding has no gradient"
        assert answer["dtype"] == dtype
        assert answer["sent"] == [("all_reduce", labels.numel()), ("all_reduce", 3 * labels.numel())]


def _shard_sizes(vocab: int, columns: int) -> tuple[int, int, bool]:
    shard = vocab_shard(dist.group.WORLD, vocab, columns)
    return shard.start, shard.size, shard.group is None


@pytest.mark.distributed
def test_shards_cut_the_real_vocabulary(rank_pool: RankPool) -> None:
    assert rank_pool.run(4, _shard_sizes, 9, 4) == [(0, 4, False), (4, 4, False), (8, 1, False), (12, 0, False)]
    assert rank_pool.run(1, _shard_sizes, 9, 16) == [(0, 9, True)]
