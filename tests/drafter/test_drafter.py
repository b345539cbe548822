"""The drafter over a target model: its layers' numbers and matmuls, its life from one policy version to the next."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from tiny_decode import MAX_MODEL_LEN, SIZES, make_engine, prompts, reference_model
from torch import Tensor

from erollout.drafter.activation_statistics import collect
from erollout.drafter.assignment import assign_formats
from erollout.drafter.drafter import Drafter
from erollout.drafter.formats import FORMATS, check_shape, find_format
from erollout.drafter.linears import Shard, make_linear, quantize_activations, resolve_matmul
from erollout.engine.kv_cache import KVCache
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.factory import model_class
from erollout.engine.model.linear import TorchLinear
from erollout.engine.model.model_runner import ModelRunner
from erollout.engine.proposers.base import DraftRequest, Drafts
from erollout.engine.proposers.quantized_policy import ModelProposer
from erollout.errors import UserError
from erollout.kernels.native import why_unavailable
from erollout.kernels.weights import QuantizedWeight, dequantize
from erollout.policy.families import read_architecture
from erollout.speculation.step import Arm
from erollout.types import RolloutRequest, SamplingParams

CPU = torch.device("cpu")
MODEL = {"model_type": "llama", **SIZES, "intermediate_size": 192, "tie_word_embeddings": True}
"""Its layers divide into native groups of 32."""
QUANTIZED = [name for name in FORMATS if not name.startswith("fp8")]
"""Formats whose numbers need no ModelOpt where the native path runs; test_quantizer.py has the others' numbers."""


def native_or_skip() -> None:
    if why_unavailable():
        pytest.skip(str(why_unavailable()))


def make_target(dtype: torch.dtype = torch.bfloat16, kernel: str = "torch") -> DecodeModel:
    """A decode model of MODEL with random weights."""
    architecture = read_architecture(MODEL, "tiny")
    cache = KVCache(architecture, 1, 16, 32, dtype, CPU)
    cache.allocate()
    target = model_class(kernel)(architecture, None, kernel, cache, MAX_MODEL_LEN)
    randomize(target, 0)
    return target


def randomize(target: DecodeModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in target.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.dim() == 2 else 1))


class Silent:
    """A draft loop that is not asked."""

    def __init__(self, model: DecodeModel) -> None:
        self.model = model

    def require(self, policy_version: int) -> None:
        raise AssertionError

    def propose(self, request: DraftRequest) -> Drafts:
        raise AssertionError

    def sleep(self) -> None:
        self.model.release()


def make_drafter(target: DecodeModel, **options: Any) -> Drafter:
    settings = {"format": "w4a16", "group_size": 32, "kernel": "torch", **options}
    return Drafter(target, Silent, MAX_MODEL_LEN, **settings)


def requantize(drafter: Drafter, target: DecodeModel, version: int) -> None:
    for name in target.tensors:
        drafter.requantize_(name)
    drafter.complete(version)


def logits(model: DecodeModel, tokens: Sequence[int]) -> Tensor:
    """float32 logits after every token of a sequence, through the model's cache."""
    with torch.inference_mode():
        return model.forward(ModelRunner(model).reading(tokens)).float()


# -- formats, sizes, patterns ------------------------------------------------------------------------------------------


def test_names_are_found_or_refused() -> None:
    assert find_format("none") is None
    for name, format in FORMATS.items():
        assert find_format(name) is format and format.name == name
    with pytest.raises(UserError, match=r"speculation.drafter.format = w3a16 is unknown; known are w4a16, .*none"):
        find_format("w3a16")
    with pytest.raises(UserError, match="nvfp4: ModelOpt quantises it only on CUDA"):
        find_format("nvfp4")


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.grouped])
def test_sizes_that_a_format_cannot_cut_are_refused_by_name(name: str) -> None:
    check_shape("layers.0.qkv_proj", FORMATS[name], (8, 576), 64)
    with pytest.raises(
        UserError, match=r"group_size = 128 does not divide the 576 .* layers\.0\.qkv_proj.* 96, 64, 48, 32, 16, 8"
    ):
        check_shape("layers.0.qkv_proj", FORMATS[name], (8, 576), 128)
    with pytest.raises(UserError, match=r"layers\.0\.qkv_proj has 7 rows"):
        check_shape("layers.0.qkv_proj", FORMATS[name], (7, 576), 64)
    check_shape("lm_head", FORMATS["w8a8"], (7, 577), 128)


def test_the_last_matching_pattern_counts() -> None:
    layers = ["layers.0.qkv_proj", "layers.0.down_proj", "layers.10.down_proj", "lm_head"]
    overrides = [("layers.0.*", "w8a8"), ("*.down_proj", "fp8"), ("layers.10.*", "none")]
    formats = assign_formats(layers, "w4a16", overrides, "target")
    assert [f and f.name for f in formats.values()] == ["w8a8", "fp8", None, None]
    formats = assign_formats(layers, "none", [("lm_head", "w4a16")], "w8a8")
    assert [f and f.name for f in formats.values()] == [None, None, None, "w4a16"]
    formats = assign_formats(layers, "none", [("*", "w4a8")], "w8a8")
    assert [f and f.name for f in formats.values()] == ["w4a8", "w4a8", "w4a8", "w8a8"]


def test_a_pattern_that_matches_nothing_and_unknown_formats_are_refused() -> None:
    layers = ["layers.0.qkv_proj", "lm_head"]
    with pytest.raises(UserError, match=r"overrides\[1\].pattern = layers.1.\* matches none"):
        assign_formats(layers, "w4a16", [("layers.0.*", "none"), ("layers.1.*", "w8a8")], "target")
    with pytest.raises(UserError, match=r"overrides\[0\].format = int3 is unknown"):
        assign_formats(layers, "w4a16", [("*", "int3")], "target")
    with pytest.raises(UserError, match=r"drafter.lm_head = int3 is unknown"):
        assign_formats(layers, "w4a16", [], "int3")


# -- matmuls -----------------------------------------------------------------------------------------------------------


def numbers_of(name: str, rows: int, columns: int, group_size: int) -> QuantizedWeight:
    """Random numbers in a format's ranges."""
    format, generator = FORMATS[name], torch.Generator().manual_seed(3)
    if format.weight != "int4":
        values = torch.randint(-127, 128, (rows, columns), generator=generator)
        kind = torch.int8 if format.weight == "int8" else torch.float8_e4m3fn
        scales = torch.rand(1 if name == "fp8" else rows, 1, generator=generator) * 0.01
        return QuantizedWeight(format.weight, values.to(kind), scales, columns)
    groups = (rows, columns // group_size)
    zeros = torch.randint(-8, 8, groups, generator=generator).to(torch.int8) if format.asymmetric else None
    pre_scale = (torch.rand(columns, generator=generator) + 0.5).bfloat16() if format.search == "awq" else None
    values = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    scales = (torch.rand(groups, generator=generator) * 0.1).bfloat16()
    return QuantizedWeight("int4", values, scales, group_size, zeros, pre_scale)


def reference(name: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The format's definition in float64."""
    x = x if weight.pre_scale is None else x * weight.pre_scale
    group = {"int8_group": weight.group_size, "int8_token": x.shape[1]}.get(FORMATS[name].activations)
    if group is not None:
        values, scales = quantize_activations(x, group)
        x = values * scales.repeat_interleave(group, 1)
    y = x.double() @ dequantize(weight).double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_matmul_computes_its_definition(name: str, kernel: str) -> None:
    if kernel == "native":
        native_or_skip()
    for rows, columns, group_size, with_bias in ((48, 192, 32, True), (34, 64, 64, False)):
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
        shard = Shard("layer", rows, columns, bias, group_size, torch.bfloat16, CPU)
        if kernel == "native" and FORMATS[name].native is None:
            with pytest.raises(UserError, match=f"no matmul for drafter layer layer as {name}: .* only dequantised"):
                resolve_matmul(kernel, FORMATS[name], shard)
            return
        linear = make_linear(resolve_matmul(kernel, FORMATS[name], shard), FORMATS[name], shard)
        weight = numbers_of(name, rows, columns, group_size)
        linear.pack_(weight)
        linear.release()
        linear.prepare()
        for tokens in (1, 3, 17):
            x = torch.randn(tokens, columns, generator=generator).bfloat16()
            expected = reference(name, x, weight, bias)
            y = linear(x)
            assert y.dtype == torch.bfloat16 and y.shape == (tokens, rows)
            assert (y.double() - expected).norm() < 0.006 * expected.norm()


def test_which_matmul_serves_a_layer() -> None:
    shard = Shard("o", 48, 192, None, 32, torch.bfloat16, CPU)
    served = {name: resolve_matmul("torch", format, shard) for name, format in FORMATS.items()}
    weight_only = ("w4a16", "w4a16_clip", "w4a16_awq")
    assert {name for name, matmul in served.items() if matmul == "int4pack"} == set(weight_only)
    assert {name for name, matmul in served.items() if matmul == "int_mm"} == {"w8a8"}
    odd = Shard("o", 40, 192, None, 48, torch.bfloat16, CPU)
    narrow = Shard("o", 48, 192, None, 32, torch.float32, CPU)
    for other in (odd, narrow):
        assert resolve_matmul("prepacked", FORMATS["w4a16"], other) == "dequantized"
        assert resolve_matmul("auto", FORMATS["w4a16"], other) == "dequantized"
        with pytest.raises(UserError, match=r"rollout.kernels = native has no matmul for drafter layer o as w4a16"):
            resolve_matmul("native", FORMATS["w4a16"], other)
    native_or_skip()
    assert resolve_matmul("auto", FORMATS["w4a8"], shard) == "native"


def test_activations_that_are_zero_or_not_finite() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0, -4.0], [float("nan"), 1.0, 2.0, 2.0]])
    values, scales = quantize_activations(x, 2)
    assert values[0].tolist() == [0, 0, 32, -127] and scales[0].tolist() == [1.0, pytest.approx(4 / 127)]
    assert values[1, :2].isnan().all() and values[1, 2:].tolist() == [127, 127]


# -- the drafter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_drafter_decodes_with_its_numbers_and_shares_the_rest(name: str, kernel: str) -> None:
    if why_unavailable() and kernel == "auto":
        pytest.skip(str(why_unavailable()))
    target = make_target()
    drafter = make_drafter(target, format=name, kernel=kernel, lm_head="w8a8")
    requantize(drafter, target, 1)
    drafter.require(1)
    assert drafter.model.cache is target.cache
    assert all(drafter.model.tensors[key] is tensor for key, tensor in target.tensors.items())
    tokens = prompts(60)[0]
    target.prepare()
    actual, unquantised = logits(drafter.model, tokens), logits(target, tokens)

    exact = make_target(torch.float32)  # the target's arithmetic on the drafter's numbers
    for key, tensor in exact.tensors.items():
        tensor.copy_(target.tensors[key])
    quantizer = make_drafter(target, format=name, lm_head="w8a8")._quantizer
    replaced = {layer: dequantize(quantizer.quantize(layer, None)) for layer in drafter.linears}
    for layer in replaced.keys() - {"lm_head"}:
        exact.tensors[f"{layer}.weight"].copy_(replaced[layer])
    exact.lm_head = TorchLinear(replaced["lm_head"], None)
    expected = logits(exact, tokens)
    rounding = (actual - expected).norm() / expected.norm()
    quantisation = (unquantised - expected).norm() / expected.norm()
    assert rounding < (0.03 if FORMATS[name].activations == "bf16" else 0.06)
    assert name == "w8a8" or quantisation > 2 * rounding


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_new_weights_go_into_the_same_buffers(name: str, kernel: str) -> None:
    if why_unavailable() and kernel == "auto":
        pytest.skip(str(why_unavailable()))
    target = make_target()
    drafter = make_drafter(target, format=name, kernel=kernel, lm_head="w8a8")
    requantize(drafter, target, 1)
    addresses = {layer: linear.addresses for layer, linear in drafter.linears.items()}
    assert all(any(places) for places in addresses.values())
    randomize(target, 7)
    requantize(drafter, target, 2)
    drafter.sleep()
    assert {layer: linear.addresses for layer, linear in drafter.linears.items()} == addresses
    fresh = make_drafter(target, format=name, kernel=kernel, lm_head="w8a8")
    requantize(fresh, target, 2)
    assert torch.equal(logits(drafter.model, prompts(40)[0]), logits(fresh.model, prompts(40)[0]))


def test_a_stale_drafter_is_refused_with_both_versions() -> None:
    target = make_target()
    drafter = make_drafter(target)
    with pytest.raises(RuntimeError, match="policy version 0 are wanted"):
        drafter.require(0)
    requantize(drafter, target, 4)
    drafter.require(4)
    with pytest.raises(RuntimeError, match="is of policy version 4, but drafts for policy version 5"):
        drafter.require(5)
    drafter.requantize_("norm.weight")  # shared: nothing of the drafter's own changes
    drafter.require(4)
    drafter.requantize_("layers.1.o_proj.weight")
    with pytest.raises(RuntimeError, match="is being requantised, but drafts for policy version 4"):
        drafter.require(4)


def test_an_incomplete_drafter_is_refused_and_says_what_is_missing() -> None:
    target = make_target()
    drafter = make_drafter(target)
    for version in (1, 2):
        for name in target.tensors:
            if name not in ("layers.0.o_proj.weight", "layers.1.down_proj.weight"):
                drafter.requantize_(name)
        with pytest.raises(RuntimeError, match=rf"version {version} .*: layers.0.o_proj, layers.1.down_proj not requantised"):
            drafter.complete(version)
        requantize(drafter, target, version)
        drafter.require(version)


def test_what_an_update_took_is_reported() -> None:
    target = make_target()
    drafter = make_drafter(target, format="w8a8")
    for name in target.tensors:
        drafter.requantize_(name)
    stats = drafter.complete(1)
    largest = 2 * 192 * 64  # gate_up_proj
    weights = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 192)
    assert 0 < stats.seconds < 60
    assert largest <= stats.peak_extra_bytes <= 24 * largest
    assert weights <= stats.buffer_bytes <= 1.1 * weights


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    target = make_target()
    drafter = make_drafter(target)
    target.tensors["layers.1.down_proj.weight"][3, 5] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.down_proj has weights that are not finite"):
        requantize(drafter, target, 1)


@pytest.mark.parametrize("kernel", ["torch", "prepacked", "native"])
def test_the_targets_own_layers_are_borrowed_and_left_alone(kernel: str) -> None:
    if kernel == "native":
        native_or_skip()
    if kernel == "prepacked" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 weights on this processor")
    target = make_target(kernel=kernel)
    drafter = make_drafter(target, overrides=[("layers.0.*", "none"), ("*.down_proj", "none")], kernel=kernel)
    assert set(drafter.linears) == {f"layers.1.{name}" for name in ("qkv_proj", "o_proj", "gate_up_proj")}
    requantize(drafter, target, 1)
    target.prepare()
    before = logits(target, prompts(20)[0])
    own = logits(drafter.model, prompts(20)[0])
    drafter.model.prepare()
    drafter.sleep()
    assert torch.equal(before, logits(target, prompts(20)[0]))  # not released
    assert torch.equal(own, logits(drafter.model, prompts(20)[0])) and not torch.equal(own, before)
    everything = make_drafter(target, format="none", kernel=kernel)
    requantize(everything, target, 1)
    assert torch.equal(before, logits(everything.model, prompts(20)[0]))


def test_native_layers_make_a_native_model() -> None:
    native_or_skip()
    from erollout.engine.model.native_model import NativeModel

    target = make_target(kernel="native")
    assert isinstance(make_drafter(target, kernel="auto").model, NativeModel)
    assert not isinstance(make_drafter(target, kernel="torch").model, NativeModel)


def test_formats_without_a_matmul_say_that_they_are_not_faster(caplog: pytest.LogCaptureFixture) -> None:
    target = make_target()
    with caplog.at_level("INFO"):
        make_drafter(target, format="w8a8", overrides=[("layers.1.o_proj", "w4a8")])
    assert "drafter: 7 x w8a8, 1 x w4a8, 1 x target; matmuls: 7 x int_mm, 1 x dequantized" in caplog.text
    assert "w4a8 has no matmul here and is dequantised" in caplog.text


def test_what_cannot_be_held_is_refused_when_the_drafter_is_made() -> None:
    target = make_target()
    with pytest.raises(UserError, match=r"group_size = 128 does not divide the 64 input features of layers\.0\.qkv_proj"):
        make_drafter(target, group_size=128)
    with pytest.raises(UserError, match=r"native has no matmul for drafter layer layers\.1\.o_proj as fp8"):
        make_drafter(target, format="none", overrides=[("layers.1.o_proj", "fp8")], kernel="native")


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
def test_statistics_are_those_of_the_layers_inputs(family: str) -> None:
    model, engine = reference_model(family), make_engine(family)
    seen: dict[str, list[Tensor]] = {}
    block = model.model.layers[1]
    places = {"qkv_proj": block.self_attn.q_proj, "o_proj": block.self_attn.o_proj}
    places |= {"gate_up_proj": block.mlp.up_proj, "down_proj": block.mlp.down_proj}
    for name, module in places.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.setdefault("lm_head", []).append(args[0][0]))
    sequences = prompts(30, 50, 40)
    with torch.no_grad():
        model(torch.tensor([sequences[0]]))
        model(torch.tensor([sequences[1][:34]]))  # 64 tokens in all
    found = collect(engine.model, sequences, max_tokens=64, sample_rows=40, generation=3)
    assert set(found) == {*(f"layers.{i}.{name}" for i in (0, 1) for name in places), "lm_head"}
    for name, inputs in seen.items():
        x, actual = torch.cat(inputs), found[name if name == "lm_head" else f"layers.1.{name}"]
        torch.testing.assert_close(actual.mean_square, x.square().mean(0), rtol=1e-3, atol=1e-6)
        assert actual.samples is not None and actual.generation == 3
        torch.testing.assert_close(actual.samples, x[:40], rtol=1e-3, atol=1e-3)


def test_statistics_of_nothing() -> None:
    engine = make_engine("llama")
    assert collect(engine.model, prompts(30), max_tokens=0) == {}
    assert collect(engine.model, [], max_tokens=64) == {}
    found = collect(engine.model, prompts(8), max_tokens=64)
    assert found["lm_head"].samples is None


def test_statistics_of_rollouts_sharpen_the_drafter() -> None:
    """Less error of a clipped layer's outputs on the policy's own inputs than without statistics."""
    target = make_target()
    tokens = prompts(100, 100)
    inputs = collect(target, tokens, max_tokens=200, sample_rows=200)
    target.tensors["layers.1.down_proj.weight"].mul_(torch.randn(192, 64, generator=torch.Generator().manual_seed(1)).T)
    drafter = make_drafter(target, format="w4a16_clip")
    assert drafter.needs_statistics and drafter.sample_rows == 0
    assert make_drafter(target, format="w4a16_awq").sample_rows > 0 and not make_drafter(target).needs_statistics
    x = inputs["layers.1.down_proj"].samples
    assert x is not None
    errors = []
    for statistics in ({}, inputs):
        drafter.use_statistics(statistics)
        requantize(drafter, target, 1)
        exact = x.float() @ target.tensors["layers.1.down_proj.weight"].float().T
        errors.append((drafter.linears["layers.1.down_proj"](x).float() - exact).norm())
    assert errors[1] < 0.99 * errors[0]


# -- tensor parallelism ------------------------------------------------------------------------------------------------


def drafts_on_ranks(formats: Sequence[str], verification: str, model: str = "llama") -> list[tuple[bool, float]]:
    """For each format: whether greedy and sampled speculative tokens are those of plain decoding, and the acceptance."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    engine = make_engine(model, group, num_kv_blocks=100)
    requests = [
        RolloutRequest(i, ids, 1, SamplingParams(temperature=0.0 if i % 2 else 1.0, max_tokens=24), seed=i)
        for i, ids in enumerate(prompts(9, 21, 30, 14))
    ]
    plain = {rollout.prompt_index: rollout.response_ids for rollout in engine.generate(requests)}
    results = []
    for format in formats:
        drafter = Drafter(
            engine.model,
            lambda model: ModelProposer(model, verification),  # type: ignore[arg-type]
            MAX_MODEL_LEN,
            format=format,
            group_size=16,
            lm_head="w8a8",
            overrides=[("*.down_proj", "w8a8")],  # 88 inputs on each of two ranks: no group fits
        )
        if format != "w4a16_awq":  # whose search would import ModelOpt on every rank
            drafter.use_statistics(collect(engine.model, prompts(60), 64))
        requantize(drafter, engine.model, 1)
        engine.speculate({"": drafter}, Arm("", 3), verification)  # type: ignore[arg-type]
        same = {rollout.prompt_index: rollout.response_ids for rollout in engine.generate(requests)} == plain
        results.append((same, engine.stats.speculation.acceptance_rate))
    return results


def row_shard_on_rank() -> Tensor:
    """What the drafter's numbers make of this rank's columns of o_proj."""
    engine = make_engine("llama", dist.group.WORLD if dist.get_world_size() > 1 else None)
    drafter = make_drafter(engine.model, group_size=16, overrides=[("*.down_proj", "w8a8")])
    return dequantize(drafter._quantizer.quantize("layers.0.o_proj", None))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_coupled_speculation_equals_plain_decoding_whatever_the_format(rank_pool: RankPool, world_size: int) -> None:
    ranks = rank_pool.run(world_size, drafts_on_ranks, QUANTIZED, "coupled")
    assert all(rank == ranks[0] for rank in ranks)
    for name, (same, acceptance_rate) in zip(QUANTIZED, ranks[0], strict=True):
        assert same, name
        assert acceptance_rate > (0.9 if name == "w8a8" else 0.5), (name, acceptance_rate)


@pytest.mark.distributed
def test_norms_of_heads_are_the_drafters_too(rank_pool: RankPool) -> None:
    for same, acceptance_rate in rank_pool.run(2, drafts_on_ranks, ["w8a8", "w4a16_clip"], "coupled", "qwen3-tied")[0]:
        assert same and acceptance_rate > 0.5, acceptance_rate


@pytest.mark.distributed
def test_shards_have_the_numbers_of_the_whole(rank_pool: RankPool) -> None:
    (whole,) = rank_pool.run(1, row_shard_on_rank)
    assert torch.equal(torch.cat(rank_pool.run(2, row_shard_on_rank), dim=1), whole)
