"""The native decode model against the torch model, its attention against the plain definition, and the bits of both against
company, chunks of any length and threads."""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_decode import MODELS, make_engine, prompts, reference_logprobs, reference_model

from erollout.engine.kv_cache import KVCache
from erollout.engine.model.attention import QuerySpan, reference_attention
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.factory import model_class
from erollout.engine.model.inputs import ForwardInputs
from erollout.engine.model.linear import PackedLinear
from erollout.engine.model.native_model import LayerStruct, ModelStruct, NativeAttention, NativeModel, PassStruct
from erollout.kernels import native
from erollout.policy.architecture import Architecture
from erollout.policy.families import read_architecture
from erollout.types import RolloutRequest, SamplingParams

pytestmark = pytest.mark.skipif(bool(native.why_unavailable()), reason=str(native.why_unavailable()))

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 16, 48


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def test_structs_are_those_of_the_extension() -> None:
    assert ctypes.sizeof(ModelStruct) == native.library().erollout_model_size()
    assert ctypes.sizeof(LayerStruct) == native.library().erollout_layer_size()
    assert ctypes.sizeof(PassStruct) == native.library().erollout_pass_size()
    header = (Path(native.__file__).parent / "cpp" / "model.h").read_text()
    layer = header.partition("struct Layer {")[2].partition("}")[0]
    assert [name for name, _ in LayerStruct._fields_] == re.findall(r"\* (\w+);", layer)


def test_exp2_is_within_its_bound() -> None:
    x = torch.cat([torch.linspace(-126, 128, 1 << 20)[:-1], torch.tensor([0.0])])
    y = torch.empty_like(x)
    native.library().erollout_exp2(x.data_ptr(), y.data_ptr(), len(x))
    assert (y.double() / x.double().exp2() - 1).abs().max() < 1.7e-7 and y[-1] == 1
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -1e30, -151, 129, 1e30, inf, nan, 1] * 2)
    y = torch.empty_like(x)
    native.library().erollout_exp2(x.data_ptr(), y.data_ptr(), len(x))
    assert y[:6].tolist() == [0, 0, 0, inf, inf, inf] and y[6].isnan() and y[7] == 2


# ---- attention ----

SHAPES = [(4, 2, 16), (9, 3, 64), (2, 2, 32), (8, 1, 64), (14, 2, 64), (4, 1, 80), (2, 1, 128), (3, 3, 24), (60, 1, 16)]
"""Heads, KV heads, head size."""


class AttentionCase:
    """Sequences whose keys and values lie in a paged cache, in shuffled blocks; unused slots hold NaN."""

    lengths = (300, 37, 129)

    def __init__(self, heads: int, kv_heads: int, size: int, block_size: int) -> None:
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "hidden_size": heads * 8}
        architecture = read_architecture({**MODELS["llama"], **sizes}, "test")
        generator = torch.Generator().manual_seed(0)
        blocks = [-(-n // block_size) for n in self.lengths]
        cache = KVCache(architecture, 1, sum(blocks), block_size, torch.bfloat16, CPU)
        cache.allocate()
        self.layer = cache.layer(0)
        self.layer[:] = float("nan")
        self.attention = NativeAttention(heads, cache, kv_heads, size)
        shuffled = torch.randperm(sum(blocks), generator=generator).split(blocks)
        self.tables: list[list[int]] = [table.tolist() for table in shuffled]
        self.values = [torch.randn(n, 2 * kv_heads, size, generator=generator).bfloat16() for n in self.lengths]
        self.queries = [(3 * torch.randn(n, heads, size, generator=generator)).bfloat16() for n in self.lengths]
        for table, values in zip(self.tables, self.values, strict=True):
            for position, value in enumerate(values):
                self.layer[:, table[position // block_size], position % block_size] = value

    def run(self, *spans: tuple[int, int, int], padding: int = 0) -> list[torch.Tensor]:
        """Outputs of (sequence, start, end) computed in one pass, and of the padding."""
        plan = self.attention.plan([QuerySpan(start, end, self.tables[which]) for which, start, end in spans])
        query = [self.queries[which][start:end] for which, start, end in spans]
        output = self.attention(torch.cat([*query, query[0][:1].expand(padding, -1, -1)]), self.layer, plan)
        return list(output.split([*(end - start for _, start, end in spans), padding]))

    def reference(self, which: int, start: int, end: int) -> torch.Tensor:
        keys, values = self.values[which][:end].chunk(2, dim=1)
        return reference_attention(self.queries[which][start:end], keys, values, start)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 24, 100])
def test_attention_equals_its_definition(shape: tuple[int, int, int], block_size: int) -> None:
    """Within the rounding of the weights and of the output to bfloat16; NaN beyond a sequence's end is never read into it."""
    case = AttentionCase(*shape, block_size)
    spans = [(1, 36, 37), (2, 120, 128), (0, 0, 300), (2, 128, 129)]
    for span, actual in zip(spans, case.run(*spans), strict=False):
        torch.testing.assert_close(actual.float(), case.reference(*span), atol=2e-2, rtol=0)
        assert (actual.float() - case.reference(*span)).pow(2).mean().sqrt() < 2e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_has_the_same_bits_in_any_company(shape: tuple[int, int, int], threads: int) -> None:
    case = AttentionCase(*shape, 16)
    whole = case.run((0, 0, 300))[0]
    for position in (0, 1, 30, 62, 63, 64, 65, 127, 128, 299):
        assert torch.equal(case.run((0, position, position + 1))[0][0], whole[position]), position
    for start, count in ((0, 2), (1, 3), (63, 2), (64, 8), (65, 17), (200, 50)):
        together = case.run((1, 30, 37), (0, start, start + count), (2, 64, 129))
        assert torch.equal(together[1], whole[start : start + count]), (start, count)


def test_attention_of_padding_is_zero_and_nan_stays_with_its_tokens() -> None:
    case = AttentionCase(9, 3, 64, 16)
    clean = case.run((0, 0, 300), (1, 0, 37))
    case.layer[:, case.tables[0][100 // 16], 100 % 16] = float("nan")
    first, second, padding = case.run((0, 0, 300), (1, 0, 37), padding=2)
    assert torch.equal(first[:100], clean[0][:100]) and first[100:].isnan().all()
    assert torch.equal(second, clean[1])
    assert not padding.any()


# ---- the model ----


def build(kernel: str, name: str, tensors: dict[str, torch.Tensor] | None = None, **sizes: Any) -> DecodeModel:
    """A model with a cache of its own, prepared; weights as large as those of tiny_decode."""
    architecture = read_architecture({**MODELS[name], **sizes}, name)
    group = dist.group.WORLD if dist.is_initialized() else None
    size = group.size() if group is not None else 1
    cache = KVCache(architecture, size, NUM_BLOCKS, BLOCK_SIZE, torch.bfloat16, CPU)
    cache.allocate()
    model = model_class(kernel)(architecture, group, kernel, cache, 512, tensors)
    if tensors is None:
        generator = torch.Generator().manual_seed(0)
        for key, tensor in model.tensors.items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15 + ("norm" in key))
    model.prepare()
    return model


TABLES = [list(range(0, NUM_BLOCKS, 2)), list(range(1, NUM_BLOCKS, 2))]
"""Blocks of two sequences, interleaved."""


@torch.inference_mode()
def run(model: DecodeModel, *spans: tuple[int, int, int]) -> list[torch.Tensor]:
    """Logits of all tokens of (sequence, start, end), computed in one pass; the tokens are fixed by sequence and position."""
    ids, positions, slots = [], [], []
    for which, start, end in spans:
        for position in range(start, end):
            ids.append((position * 31 + which * 7) % model.architecture.vocab_size)
            positions.append(position)
            slots.append(TABLES[which][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    plan = model.plan([QuerySpan(start, end, TABLES[which]) for which, start, end in spans])
    placed = (torch.tensor(x) for x in (ids, positions, slots))
    logits = model.forward(ForwardInputs(*placed, plan, torch.arange(len(ids))))
    return list(logits.split([end - start for _, start, end in spans]))


def logits_of_both(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the torch model in float32 and in bfloat16, and of the native model, after chunks of several lengths."""
    plain = build("torch", name)
    fast = build("native", name, plain.tensors)
    wide = DecodeModel(plain.architecture, plain.group, "torch", _wide_cache(plain.architecture, plain.group), 512,
                       {key: tensor.float() for key, tensor in plain.tensors.items()})  # fmt: skip
    chunks = [(0, 0, 140), (0, 140, 149), (0, 149, 150), (0, 150, 154)]
    return tuple(torch.cat([run(model, chunk)[0] for chunk in chunks]) for model in (wide, plain, fast))  # type: ignore


def _wide_cache(architecture: Architecture, group: dist.ProcessGroup | None) -> KVCache:
    size = group.size() if group is not None else 1
    cache = KVCache(architecture, size, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    cache.allocate()
    return cache


def assert_as_exact_as_torch(exact: torch.Tensor, plain: torch.Tensor, fast: torch.Tensor) -> None:
    """Both round alike, so both are about as far from float32; the native model's attention rounds less."""
    error = {key: (x.float() - exact).pow(2).mean().sqrt().item() for key, x in (("torch", plain), ("native", fast))}
    assert 0 < error["native"] < 1.05 * error["torch"] < 0.05 * exact.std(), (error, exact.std())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_torch_model(name: str) -> None:
    assert_as_exact_as_torch(*logits_of_both(name))


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_torch_model_on_two_ranks(rank_pool, name: str) -> None:
    shards = rank_pool.run(2, logits_of_both, name)
    for shard in shards:
        assert_as_exact_as_torch(*shard)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-tied"])
def test_only_attention_differs_from_the_torch_model(name: str) -> None:
    """A token at position 0 attends to itself alone: all the rest rounds as the torch model does. What is left is the order in
    which the norms sum up, which seldom moves a normalised value to the next bfloat16."""
    plain = build("torch", name)
    fast = build("native", name, plain.tensors)
    plain_on_native = DecodeModel(plain.architecture, None, "native", plain.cache, 512, plain.tensors)
    plain_on_native.prepare()
    tokens = plain.architecture.vocab_size
    inputs = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens) % NUM_BLOCKS * BLOCK_SIZE
    logits = []
    for model in (fast, plain_on_native):
        spans = [[QuerySpan(0, 1, [block])] for block in range(NUM_BLOCKS)]
        passes = [[x[i : i + 1] for x in inputs] for i in range(tokens)]
        plans = [model.plan(spans[i % NUM_BLOCKS]) for i in range(tokens)]
        with torch.inference_mode():
            logits.append(
                [model.forward(ForwardInputs(*x, plan, torch.tensor([0]))) for x, plan in zip(passes, plans, strict=True)]
            )
    equal = [torch.equal(ours, theirs) for ours, theirs in zip(*logits, strict=True)]
    assert sum(equal) > 0.9 * tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_tokens_logits_have_the_same_bits_in_any_company(name: str, threads: int) -> None:
    """One token per pass, several at once as in verification, chunks of a prompt, beside another sequence, on any threads."""
    model = build("native", name)
    singles = torch.cat([run(model, (0, position, position + 1))[0] for position in range(90 if threads == 1 else 20)])
    assert torch.equal(run(model, (0, 0, 90))[0][: len(singles)], singles)
    for ends in ([60, 62, 66, 74, 90], [63, 64, 72, 73, 90]):
        chunks = zip([0, *ends], ends, strict=False)
        together = torch.cat([run(model, (1, 0, 70), (0, *chunk))[1] for chunk in chunks])
        assert torch.equal(together[: len(singles)], singles)
    if threads == 2:
        torch.set_num_threads(1)
        assert torch.equal(run(build("native", name, model.tensors), (0, 0, 90))[0], together)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_sizes_that_fill_no_vector(name: str) -> None:
    sizes = {"hidden_size": 60, "intermediate_size": 90, "head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 1}
    plain = build("torch", name, **sizes)
    fast = build("native", name, plain.tensors, **sizes)
    expected, actual = run(plain, (0, 0, 50))[0].float(), run(fast, (0, 0, 50))[0].float()
    assert (actual - expected).pow(2).mean().sqrt() < 0.05 * expected.std()


def test_nan_stays_in_its_sequence() -> None:
    model = build("native", "llama")
    clean = run(model, (0, 0, 40), (1, 0, 20))
    model.embedding[39 * 31 % 97] = float("nan")  # the token at position 39 of sequence 0 alone
    first, second = run(model, (0, 0, 40), (1, 0, 20))
    assert torch.equal(first[:39], clean[0][:39]) and first[39].isnan().all()
    assert torch.equal(second, clean[1])


def test_inputs_beyond_the_models_bounds_are_refused() -> None:
    model = build("native", "llama")
    good = [torch.tensor([5]), torch.tensor([0]), torch.tensor([0])]
    bad = {"token_ids": (0, 97), "positions": (1, 512), "slots": (2, (NUM_BLOCKS + 2) * BLOCK_SIZE)}
    plan = model.plan([QuerySpan(0, 1, [0])])
    for name, (index, value) in bad.items():
        for wrong in (value, -1):
            inputs = list(good)
            inputs[index] = torch.tensor([wrong])
            with pytest.raises(IndexError, match=name):
                model.forward(ForwardInputs(*inputs, plan, torch.tensor([0])))
    with pytest.raises(IndexError, match="logit_rows"):
        model.forward(ForwardInputs(*good, plan, torch.tensor([1])))
    assert model.forward(ForwardInputs(*good, plan, torch.tensor([0, 0, 0]))).shape == (3, 97)


def test_weights_are_followed_in_place_and_released() -> None:
    model = build("native", "llama3-tied-wide")
    before = run(model, (0, 0, 9))[0]
    weight = model.tensors["layers.1.down_proj.weight"]
    weight.mul_(-1)
    model.release()
    model.prepare()
    assert not torch.equal(run(model, (0, 0, 9))[0], before)
    weight.mul_(-1)
    model.prepare()
    assert torch.equal(run(model, (0, 0, 9))[0], before)


def test_a_model_with_linear_layers_of_its_own_shares_the_rest() -> None:
    target = build("native", "qwen2-tied")
    made: dict[str, PackedLinear] = {}

    def halved(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        made[name] = PackedLinear(weight * 0.5 if name == "layers.1.o_proj" else weight, bias)
        return made[name]

    drafter = NativeModel(target.architecture, None, "native", target.cache, 512, target.tensors, halved)
    assert isinstance(drafter, NativeModel) and drafter.tensors is target.tensors and drafter.cache is target.cache
    drafter.prepare()
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")]
    assert list(made) == [*names, "lm_head"]
    expected = run(target, (0, 0, 30))[0]
    assert not torch.equal(run(drafter, (0, 0, 30))[0], expected)
    assert torch.equal(run(target, (0, 0, 30))[0], expected)


# ---- the engine on it ----

REQUESTS = [
    RolloutRequest(i, ids, 3, SamplingParams(temperature=1.0, max_tokens=24), seed=100 + i)
    for i, ids in enumerate(prompts(5, 1, 16, 33, 150))
]


def sample(settings: dict[str, Any], requests: list[RolloutRequest] = REQUESTS) -> dict[tuple[int, int], Any]:
    torch.set_num_threads(1)
    group = dist.group.WORLD if dist.is_initialized() else None
    engine = make_engine("llama", group, dtype="bfloat16", kernels="native", **settings)
    assert isinstance(engine.model, NativeModel)
    rollouts = engine.generate(requests)
    return {(r.prompt_index, r.sample_index): (r.response_ids, r.rollout_logprobs, r.raw_logprobs) for r in rollouts}


COMPANY: list[dict[str, Any]] = [
    {"max_num_seqs": 1},
    {"max_num_batched_tokens": 7},
    {"max_num_batched_tokens": 50},
    {"num_kv_blocks": 14},
    {"block_size": 7},
]


def test_samples_are_bit_equal_in_any_company() -> None:
    expected = sample({})
    for settings in COMPANY:
        assert sample(settings) == expected, settings
    assert sample({}, REQUESTS[::-1]) == expected
    alone = sample({}, [replace(REQUESTS[3], group_size=1)])
    assert alone.items() <= expected.items()


def test_logprobs_are_the_policys() -> None:
    """As far from the float32 policy's as transformers' own bfloat16 arithmetic."""
    model, rounded = reference_model("llama"), reference_model("llama", "bfloat16")
    errors: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}
    for (prompt, _), (tokens, _, raw) in sample({}).items():
        ids = [*REQUESTS[prompt].prompt_ids, *tokens]
        chosen = torch.tensor(tokens)[:, None]

        def logprobs(of: Any, ids: list[int] = ids, chosen: torch.Tensor = chosen) -> torch.Tensor:
            return reference_logprobs(of, ids)[-len(chosen) - 1 : -1].gather(1, chosen)[:, 0]

        errors["ours"].append(torch.tensor(raw) - logprobs(model))
        errors["theirs"].append(logprobs(rounded) - logprobs(model))
    rms: Callable[[str], float] = lambda who: torch.cat(errors[who]).pow(2).mean().sqrt().item()  # noqa: E731
    assert rms("ours") < 1.2 * rms("theirs")


@pytest.mark.distributed
def test_ranks_stay_in_step(rank_pool) -> None:
    ranks = rank_pool.run(2, sample, {"max_num_seqs": 4})
    assert ranks[0] == ranks[1]
