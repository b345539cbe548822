"""The configuration's section `speculation`: every key, its default (written here and nowhere else) and its bounds. Pure."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from erollout.configuration import bounds
from erollout.configuration.section import section
from erollout.errors import UserError


def _mode(value: Any) -> Any:
    return "off" if value is False else value  # YAML's off


@section
class FormatOverrideConfig:
    pattern: str
    """Glob over linear layers of the decode model: `layers.0.*`, `*.down_proj`."""
    format: str


@section
class DrafterConfig:
    format: str = "w4a16_clip"
    """A name of erollout/drafter/formats.py, or `auto`: the choice per layer with the most predicted speed-up."""
    group_size: bounds.GroupSize = 128
    """Weights that share a scale, of the int4 formats; it must divide every layer's input size on a decode rank."""
    alternatives: tuple[str, ...] = ()
    """Further formats that `adaptive` may draft with instead: each is one more drafter of the same weights."""
    lm_head: Literal["target", "w8a8"] = "target"
    """The drafter's LM head: the target's own, or an INT8 copy of it."""
    overrides: tuple[FormatOverrideConfig, ...] = ()
    """Other formats for some layers; the last pattern that matches a layer counts."""
    statistics_tokens: bounds.Limit = 512
    """Tokens of the last rollout that the activation statistics of w4a16_clip and the like are taken from; 0: none are."""
    statistics_interval: bounds.Steps = 10
    """Steps between two collections of these statistics."""


@section
class LadderConfig:
    """The paper's rule for the draft length: one rung up or down when whole rollouts ask for it."""

    rungs: tuple[bounds.DraftLength, ...] = (5, 7, 9, 11)
    raise_above: bounds.Fraction = 0.94
    """Acceptance rate of a rollout that asks for the next longer draft."""
    lower_below: bounds.Fraction = 0.85
    persistence: bounds.Few = 2
    """Rollouts in a row that must ask for it."""


@section
class ToggleConfig:
    margin: bounds.Fraction = 0.02
    """A change must promise this share of the time per token."""
    max_speculative_tokens: bounds.DraftLength = 8
    """Longest draft that `adaptive` considers."""
    acceptance_window: bounds.Steps = 150
    """Drafts after which an old one counts e times less in the estimated acceptance."""
    probe_interval: bounds.Interval = 200
    """Steps between two probes of what is not chosen; 0: none."""
    probe_steps: bounds.Few = 2
    bootstrap_seconds: bounds.Seconds = 5.0
    """Without a calibration file: how long this device is measured before the first rollout."""
    ladder: LadderConfig = field(default_factory=LadderConfig)


@section
class SpeculationConfig:
    mode: Annotated[Literal["off", "always", "toggle", "adaptive", "ladder"], BeforeValidator(_mode)] = "off"
    """`always`: every step drafts num_speculative_tokens. `toggle`: they are drafted in the steps where that is predicted to be
    faster. `adaptive`: drafter and number too are chosen for each step. `ladder`: as `toggle`, with the paper's rule for the
    number between rollouts."""
    num_speculative_tokens: bounds.DraftLength = 3
    """Tokens that the drafter proposes before the target verifies them all at once."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """`coupled`: the samples are those of autoregressive decoding, token for token (on GPUs in distribution); refused on a CPU
    whose kernels can't. `rejection`: the same distribution, with the highest acceptance."""
    calibration: bounds.Location | None = None
    """File of `erollout calibrate fit` for this model, device, layout and drafter; default: measured at the start."""
    decision_interval: bounds.Few = 1
    """Steps between two decisions; above 1 where a replica has several ranks, which must agree on each."""
    trace_interval: bounds.Interval = 1
    """Rollouts between two whose decisions are written to <train.output_dir>/decisions; 0: none. The newest
    hundred of each replica are kept."""
    toggle: ToggleConfig = field(default_factory=ToggleConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)


def check_speculation(options: SpeculationConfig) -> None:
    """What no single key of the section can be checked for. Raises UserError."""
    drafter, rungs = options.drafter, options.toggle.ladder.rungs
    if drafter.format == "auto" and drafter.statistics_tokens < 2:
        raise UserError(
            f"speculation.drafter.statistics_tokens = {drafter.statistics_tokens} leaves format = auto nothing to choose by; "
            "set it to some hundred, or name a format"
        )
    if len({drafter.format, *drafter.alternatives}) <= len(drafter.alternatives):
        raise UserError(f"speculation.drafter.alternatives = {list(drafter.alternatives)} names a format twice; remove one")
    if drafter.alternatives and options.mode != "adaptive":
        raise UserError(
            f"speculation.drafter.alternatives = {list(drafter.alternatives)} but speculation.mode = {options.mode} drafts "
            "with one format only; set the mode to adaptive or remove them"
        )
    if not rungs or list(rungs) != sorted(set(rungs)):
        raise UserError(f"speculation.toggle.ladder.rungs = {list(rungs)} must ascend, with at least one; sort them")
    if options.toggle.ladder.lower_below > options.toggle.ladder.raise_above:
        raise UserError(
            f"speculation.toggle.ladder.lower_below = {options.toggle.ladder.lower_below} is above raise_above = "
            f"{options.toggle.ladder.raise_above}; lower it"
        )
