"""The registry of proposers: names of drafters, what they read, and what each kind states."""

import sys
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from erollout.configuration.speculation import DrafterConfig, FormatOverrideConfig, NGramConfig, SpeculationConfig
from erollout.drafter.description import DrafterDescription, describe_drafters
from erollout.drafter.formats import FORMATS
from erollout.drafter.registry import PROPOSERS, draft_weights, proposer_kind, unused_keys
from erollout.errors import UserError
from erollout.speculation.cost.roofline import DraftWeights

INT4, ASYMMETRIC, INT8, FP8 = 0.5 + 2 / 128, 0.5 + 4 / 128, 1.0, 1.0
IN_FILES = {
    "w4a16": (INT4, None),
    "w4a16_asym": (ASYMMETRIC, None),
    "w4a16_clip+head": (INT4, 1.0),
    "w4a16_awq": (INT4, None),
    "w4a8+head+2 overrides": (INT4, 1.0),
    "w4a8_clip": (INT4, None),
    "w8a8+1 overrides": (INT8, None),
    "fp8": (FP8, None),
    "fp8_channel+head": (FP8, 1.0),
    "auto": (INT4, None),
    "none+12 overrides": (None, None),
}
"""Names as they stand in calibrations, sweeps and traces, with bytes per weight of linear layers and head."""


@pytest.mark.parametrize("name", IN_FILES)
def test_a_drafter_is_known_by_its_name_in_files(name: str) -> None:
    described = DrafterDescription.named(name)
    assert described is not None and described.name == name
    assert draft_weights([name]) == {name: DraftWeights(*IN_FILES[name])}


@pytest.mark.parametrize(("former", "name"), [("int4", "w4a16"), ("int8", "w8a8"), ("int4+head", "w4a16+head")])
def test_drafters_of_earlier_sweeps_are_known(former: str, name: str) -> None:
    assert draft_weights([former]) == {former: draft_weights([name])[name]}


def test_keys_of_another_proposer_are_named() -> None:
    drafter, ngram = DrafterConfig(format="w8a8"), NGramConfig(window=100)  # type: ignore[call-arg]
    options = replace(SpeculationConfig(), drafter=drafter, ngram=ngram)  # type: ignore[type-var]
    assert unused_keys(options) == ("speculation.ngram.window",)
    assert unused_keys(replace(options, proposer="ngram")) == ("speculation.drafter.format",)  # type: ignore[type-var]
    assert not unused_keys(SpeculationConfig())


def test_without_modelopt_the_proposer_that_needs_none_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(UserError, match=r"needs NVIDIA ModelOpt.* set speculation.proposer = ngram"):
        PROPOSERS["quantized_policy"].check(SpeculationConfig(), ())  # type: ignore[arg-type]


def test_a_format_holds_its_bits() -> None:
    assert {name: format.bits for name, format in FORMATS.items()} == {
        name: 4 if name in ("w4a16", "w4a16_asym", "w4a16_clip", "w4a16_awq", "w4a8", "w4a8_clip") else 8 for name in FORMATS
    }


@pytest.mark.parametrize("name", ["q5", "", "+head", "w4", "w4a16+tail", "w4a16+x overrides", "w4a16+head+head", "int2"])
def test_an_unknown_drafter_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"drafter '.*' is unknown; known are w4a16, "):
        draft_weights([name])


def test_names_say_what_costs_depend_on() -> None:
    drafter = DrafterConfig(  # type: ignore[call-arg]  # mypy does not see through section
        format="w4a8",
        alternatives=("w8a8",),
        lm_head="w8a8",
        overrides=(FormatOverrideConfig("layers.0.*", "none"),),  # type: ignore[call-arg]
    )
    assert [described.name for described in describe_drafters(drafter)] == ["w4a8+head+1 overrides", "w8a8+head+1 overrides"]


def test_the_configuration_names_every_kind() -> None:
    names = get_args(get_type_hints(SpeculationConfig)["proposer"])
    assert tuple(PROPOSERS) == names and all(kind.name == name for name, kind in PROPOSERS.items())
    assert SpeculationConfig().proposer == "quantized_policy", "checkpoints and configurations that lack the key"


@pytest.mark.parametrize("name", PROPOSERS)
def test_each_kind_finds_its_own_drafters(name: str) -> None:
    options = replace(SpeculationConfig(), proposer=name)  # type: ignore[type-var]
    kind = proposer_kind(options)
    drafters = kind.drafters(options)
    assert drafters and drafters == {drafter: kind.find(drafter, options.drafter.group_size) for drafter in drafters}
    assert drafters == draft_weights(drafters, options.drafter.group_size)
    assert kind.find("unheard of", 128) is None and kind.summary(options)
