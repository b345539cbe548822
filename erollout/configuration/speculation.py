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
    """A name in erollout/drafter/formats.py, or `none` for the target's own layer."""


@section
class DrafterConfig:
    format: str = "w4a16_clip"
    """A name in erollout/drafter/formats.py, or `auto`: the choice per layer with the highest predicted speed-up."""
    group_size: bounds.GroupSize = 128
    """Number of weights that share a scale in int4 formats; it must divide every layer's input size on a decode rank."""
    alternatives: tuple[str, ...] = ()
    """Further formats for `adaptive` to choose from: each is another drafter of the same weights."""
    lm_head: Literal["target", "w8a8"] = "target"
    """The drafter's LM head: the target's own, or an INT8 copy of it."""
    overrides: tuple[FormatOverrideConfig, ...] = ()
    """Other formats for some layers; the last pattern that matches a layer counts."""
    statistics_tokens: bounds.Limit = 512
    """Number of tokens of the last rollout for the activation statistics of formats like w4a16_clip; 0: no statistics."""
    statistics_interval: bounds.Steps = 10
    """Steps between two collections of these statistics."""


@section
class NGramConfig:
    max_ngram: bounds.NGramLength = 4
    """Longest n-gram, in tokens, that is looked up: of those that occur earlier the longest counts."""
    min_ngram: bounds.NGramLength = 2
    """Shortest n-gram that is looked up: where the last tokens match nowhere at this length, nothing is proposed."""
    window: bounds.Window = 4096
    """Number of a sequence's last tokens that are searched. Memory (4 bytes per token, on the host) and time per step are
    proportional to it."""


@section
class LadderConfig:
    """The paper's rule for the draft length: one rung up or down, by the acceptance rates of whole rollouts."""

    rungs: tuple[bounds.DraftLength, ...] = (5, 7, 9, 11)
    """Draft lengths, ascending; a run starts with the first."""
    raise_above: bounds.Fraction = 0.94
    """Acceptance rate of a rollout above which it calls for the next longer draft."""
    lower_below: bounds.Fraction = 0.85
    """Acceptance rate of a rollout below which it calls for the next shorter draft."""
    persistence: bounds.Few = 2
    """Number of rollouts in a row that must call for it."""


@section
class ToggleConfig:
    max_speculative_tokens: bounds.DraftLength = 8
    """Longest draft that `adaptive` considers."""
    acceptance_window: bounds.Steps = 150
    """Number of drafts after which an old one weighs e times less in the estimated acceptance."""
    probe_interval: bounds.Interval = 200
    """Steps between two probes of an arm that is not chosen; 0: no probes."""
    probe_steps: bounds.Few = 2
    """Steps of a probe."""
    bootstrap_seconds: bounds.Seconds = 5.0
    """Time for measuring this device before the first rollout, without a calibration file."""
    ladder: LadderConfig = field(default_factory=LadderConfig)


@section
class SpeculationConfig:
    mode: Annotated[Literal["off", "always", "toggle", "adaptive", "ladder"], BeforeValidator(_mode)] = "off"
    """`always`: every step drafts num_speculative_tokens. `toggle`: a step drafts them if that is predicted to be faster.
    `adaptive`: drafter and number are chosen for each step as well. `ladder`: as `toggle`, with the paper's rule for the
    number between rollouts."""
    proposer: Literal["quantized_policy", "ngram"] = "quantized_policy"
    """What proposes draft tokens. `quantized_policy`: the policy itself in fewer bits, by ModelOpt; its keys are `drafter`.
    `ngram`: what followed the last tokens earlier in the same prompt and response; its keys are `ngram`. The keys of the other
    one are not used."""
    num_speculative_tokens: bounds.DraftLength = 3
    """Number of tokens that the drafter proposes before the target verifies them in one pass."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """`coupled`: the samples are those of autoregressive decoding, token for token (on GPUs in distribution); refused on a CPU
    whose kernels can't. `rejection`: the same distribution, with the highest acceptance."""
    calibration: bounds.Location | None = None
    """File of `erollout calibrate fit` for this model, device, layout and drafter; default: measured at the start."""
    decision_interval: bounds.Few = 1
    """Steps between two decisions; above 1 for replicas of several ranks, which must agree on each."""
    trace_interval: bounds.Interval = 1
    """Interval, in rollouts, of those whose decisions are written to <train.output_dir>/decisions; 0: none. The newest hundred
    per replica are kept."""
    toggle: ToggleConfig = field(default_factory=ToggleConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    ngram: NGramConfig = field(default_factory=NGramConfig)


def check_speculation(options: SpeculationConfig) -> None:
    """What no single key of the section can be checked for. Raises UserError."""
    rungs = options.toggle.ladder.rungs
    if options.ngram.min_ngram > options.ngram.max_ngram:
        raise UserError(
            f"speculation.ngram.min_ngram = {options.ngram.min_ngram} is above max_ngram = {options.ngram.max_ngram}; lower it"
        )
    if options.proposer == "quantized_policy":
        _check_drafter(options.drafter, options.mode)
    if not rungs or list(rungs) != sorted(set(rungs)):
        raise UserError(f"speculation.toggle.ladder.rungs = {list(rungs)} must ascend, with at least one; sort them")
    if options.toggle.ladder.lower_below > options.toggle.ladder.raise_above:
        raise UserError(
            f"speculation.toggle.ladder.lower_below = {options.toggle.ladder.lower_below} is above raise_above = "
            f"{options.toggle.ladder.raise_above}; lower it"
        )


def _check_drafter(drafter: DrafterConfig, mode: str) -> None:
    if drafter.format == "auto" and drafter.statistics_tokens < 2:
        raise UserError(
            f"speculation.drafter.statistics_tokens = {drafter.statistics_tokens} leaves format = auto nothing to choose by; "
            "set it to some hundred, or name a format"
        )
    if len({drafter.format, *drafter.alternatives}) <= len(drafter.alternatives):
        raise UserError(f"speculation.drafter.alternatives = {list(drafter.alternatives)} names a format twice; remove one")
    if drafter.alternatives and mode != "adaptive":
        raise UserError(
            f"speculation.drafter.alternatives = {list(drafter.alternatives)} but speculation.mode = {mode} drafts "
            "with one format only; set the mode to adaptive or remove them"
        )
