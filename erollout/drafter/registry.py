"""The kinds of proposers, by the name that speculation.proposer gives. Pure: a kind loads what it runs on when it is built."""

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Protocol

from erollout.configuration.speculation import DrafterConfig, SpeculationConfig
from erollout.drafter.assignment import LM_HEAD, assign_formats
from erollout.drafter.description import DrafterDescription, describe_drafters
from erollout.drafter.formats import AUTO, FIRST_FORMAT, FORMATS, check_shape
from erollout.engine.proposers.ngram import NGram
from erollout.errors import UserError
from erollout.parallel.placement import Placement
from erollout.speculation.cost.roofline import NO_MODEL, DraftWeights

if TYPE_CHECKING:
    from erollout.engine.engine import Engine
    from erollout.engine.proposers.proposer_set import ProposerSet


class ProposerKind(Protocol):
    """A way to propose draft tokens. What it needs at a refit is said by the ProposerSet that it builds."""

    @property
    def name(self) -> str:
        """Value of speculation.proposer."""
        ...

    @property
    def section(self) -> str:
        """Section of `speculation` with its tuning keys."""
        ...

    @property
    def known(self) -> tuple[str, ...]:
        """Names of its drafters, for messages."""
        ...

    def drafters(self, options: SpeculationConfig) -> Mapping[str, DraftWeights]:
        """The configured drafters by their names in Arm.format, the default one first, with what a step of each reads."""
        ...

    def find(self, drafter: str, group_size: int) -> DraftWeights | None:
        """What a step of the drafter with this name reads; None: the name is not of this kind.

        `group_size`: number of weights that share a scale in 4-bit formats.
        """
        ...

    def summary(self, options: SpeculationConfig) -> str:
        """The configured drafters in a few words."""
        ...

    def check(self, options: SpeculationConfig, placement: Placement) -> None:
        """Raise UserError, before any model is loaded, for drafters that can't be made of these tensors of a decode rank."""
        ...

    def build(self, options: SpeculationConfig, engine: "Engine") -> "ProposerSet":
        """Build the proposers of one decode rank, which do not draft before they are switched on. Raises UserError for what
        device or kernels do not support."""
        ...


class QuantizedPolicy:
    """The policy itself in fewer bits, made by ModelOpt. Keys: speculation.drafter."""

    name = "quantized_policy"
    section = "drafter"
    known = tuple(FORMATS)

    def drafters(self, options: SpeculationConfig) -> Mapping[str, DraftWeights]:
        group_size = options.drafter.group_size
        return {drafter.name: drafter.weights(group_size) for drafter in describe_drafters(options.drafter)}

    def find(self, drafter: str, group_size: int) -> DraftWeights | None:
        found = DrafterDescription.named(drafter)
        return found.weights(group_size) if found is not None else None

    def summary(self, options: SpeculationConfig) -> str:
        drafter = options.drafter
        return f"drafter {', '.join((drafter.format, *drafter.alternatives))}, LM head {drafter.lm_head}"

    def check(self, options: SpeculationConfig, placement: Placement) -> None:
        if importlib.util.find_spec("modelopt") is None:
            raise UserError(
                f"speculation.mode = {options.mode} needs NVIDIA ModelOpt, which makes the drafter; "
                "install it: pip install 'erollout[modelopt]', set speculation.proposer = ngram, which needs none, or set "
                "speculation.mode = off"
            )
        drafter = options.drafter
        shapes = {t.name.removesuffix(".weight"): t.shape for t in placement if len(t.shape) == 2}
        embedding = shapes.pop("embed_tokens")
        shapes.setdefault(LM_HEAD, embedding)
        overrides = [(override.pattern, override.format) for override in drafter.overrides]
        for name in (drafter.format, *drafter.alternatives):
            default = FIRST_FORMAT if name == AUTO else name
            for layer, format in assign_formats(shapes, default, overrides, drafter.lm_head).items():
                if format is not None:
                    check_shape(layer, format, (shapes[layer][0], shapes[layer][1]), drafter.group_size)

    def build(self, options: SpeculationConfig, engine: "Engine") -> "ProposerSet":
        from erollout.drafter.self_speculation import SelfSpeculation

        return SelfSpeculation(options, engine)


PROPOSERS: Mapping[str, ProposerKind] = {kind.name: kind for kind in (QuantizedPolicy(), NGram())}


def proposer_kind(options: SpeculationConfig) -> ProposerKind:
    """The configured kind."""
    return PROPOSERS[options.proposer]


def runs_no_model(drafter: str) -> bool:
    """Whether the drafter with this name is of a kind that runs no model."""
    return any(kind.find(drafter, DrafterConfig.group_size) == NO_MODEL for kind in PROPOSERS.values())


def unused_keys(options: SpeculationConfig) -> tuple[str, ...]:
    """Keys that differ from their defaults but are of another kind than the configured one."""
    default = SpeculationConfig()
    found: list[str] = []
    for section in (kind.section for kind in PROPOSERS.values() if kind.name != options.proposer):
        mine, theirs = getattr(options, section), getattr(default, section)
        found += [f"speculation.{section}.{f.name}" for f in fields(mine) if getattr(mine, f.name) != getattr(theirs, f.name)]
    return tuple(found)


def draft_weights(drafters: Iterable[str], group_size: int = DrafterConfig.group_size) -> dict[str, DraftWeights]:
    """What a step of each drafter reads, by its name in a sweep, a calibration or an option. Raises UserError."""
    found: dict[str, DraftWeights] = {}
    for name in drafters:
        weights = [known for kind in PROPOSERS.values() if (known := kind.find(name, group_size)) is not None]
        if not weights:
            names = [name for kind in PROPOSERS.values() for name in kind.known]
            raise UserError(f"drafter {name!r} is unknown; known are {', '.join(names)}")
        found[name] = weights[0]
    return found
