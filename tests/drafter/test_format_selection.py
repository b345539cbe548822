"""`auto` on a real model: what is measured, and that layers which suffer from few bits are given more."""

from functools import partial

import torch
from tiny_decode import MAX_MODEL_LEN, make_engine, prompts

from erollout.drafter.auto_format import CANDIDATES, CONFIGURED, acceptance, layers_by_unit, probabilities, select_formats
from erollout.drafter.drafter import Drafter
from erollout.engine.engine import Engine
from erollout.engine.proposers.quantized_policy import ModelProposer


def make_drafter(engine: Engine, overrides: list[tuple[str, str]]) -> Drafter:
    proposer = partial(ModelProposer, verification="coupled")
    return Drafter(engine.model, proposer, MAX_MODEL_LEN, format="none", group_size=16, overrides=overrides)


def test_units_cover_every_layer_once() -> None:
    for num_layers in (1, 2, 3, 7, 30):
        layers = [layer for unit in layers_by_unit(num_layers).values() for layer in unit]
        assert len(set(layers)) == len(layers) == 4 * num_layers


def test_every_layer_gets_a_format_that_was_tried() -> None:
    engine = make_engine("llama", dtype="bfloat16")
    overrides, selection = select_formats(engine.model, partial(make_drafter, engine), prompts(40, 24), {})
    assert sorted(layer for layer, _ in overrides) == sorted(f"layers.{i}.{k}_proj" for i in range(2) for k in KINDS)
    assert {format for _, format in overrides} <= {"none", *CANDIDATES}
    assert 0.3 < selection.acceptance <= 1.0 and selection.speed_up > 0


def test_what_the_configuration_decides_is_not_chosen_but_counted() -> None:
    """No int4 group of 32 divides these down projections: they are left to the configuration."""
    engine = make_engine("llama", dtype="bfloat16")
    proposer = partial(ModelProposer, verification="coupled")

    def make(overrides: list[tuple[str, str]], lm_head: str = "target") -> Drafter:
        return Drafter(
            engine.model, proposer, MAX_MODEL_LEN, format="none", group_size=32, overrides=overrides, lm_head=lm_head
        )

    configured = ["layers.0.down_proj", "layers.1.down_proj", "lm_head"]
    overrides, selection = select_formats(
        engine.model, make, prompts(40), {}, configured, lambda: make([("*.down_proj", "w8a8")], "w8a8")
    )
    assert not {layer for layer, _ in overrides} & set(configured) and len(overrides) == 6
    assert selection.formats[CONFIGURED] == CONFIGURED and selection.acceptance < 1.0


@torch.inference_mode()
def test_a_layer_that_int4_ruins_is_measured_so() -> None:
    """A weight of each group that meets no activation is forty times as large: int4 has nothing left for the others."""
    layer, tokens = "layers.0.qkv_proj", prompts(60)
    rates = []
    for outlier in (1, 40):
        engine = make_engine("llama", dtype="bfloat16")
        engine.local_tensors()["layers.0.input_norm.weight"][::16] = 0
        engine.local_tensors()[f"{layer}.weight"].view(-1, 16)[:, 0] *= outlier
        engine.model.prepare()
        drafter = make_drafter(engine, [(layer, "w4a16")])
        drafter.requantize_(f"{layer}.weight")
        expected = [probabilities(engine.model, t) for t in tokens]
        rates.append(acceptance(expected, drafter.model, tokens))
    good, ruined = rates
    assert good > 0.8 and ruined < good - 0.05


@torch.inference_mode()
def test_the_target_accepts_its_own_drafts() -> None:
    engine = make_engine("llama", dtype="bfloat16")
    engine.model.prepare()
    tokens = prompts(30, 12)
    expected = [probabilities(engine.model, t) for t in tokens]
    assert acceptance(expected, engine.model, tokens) > 1 - 1e-5


KINDS = ("qkv", "o", "gate_up", "down")
