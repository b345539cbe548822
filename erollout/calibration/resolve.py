"""The calibration that a run starts with: configured, measured now, or guessed where nothing depends on it."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from erollout.calibration.devices import Hardware, find_hardware, nominal_roofline
from erollout.calibration.file import Calibration, Identity, calibration_of_run
from erollout.calibration.fit import fit, measured_passes
from erollout.calibration.model_size import model_size
from erollout.calibration.sweep import bootstrap, identify
from erollout.configuration.speculation import SpeculationConfig
from erollout.drafter.registry import proposer_kind
from erollout.engine.engine import Engine
from erollout.parallel.collectives import from_rank_zero
from erollout.speculation.cost.roofline import ModelSize

logger = logging.getLogger(__name__)

GUESSED = "guessed"
"""Source in the provenance of a calibration without measurements."""
GUESS = Hardware("unknown", bandwidth=20e9, compute=200e9)
"""Orders of magnitude of a CPU core."""


def named_calibration(options: SpeculationConfig, engine: Engine, formats: Sequence[str]) -> Calibration | None:
    """The configured calibration, or None if none is configured.

    Raises UserError if it is missing, damaged, or for another model, hardware, layout or drafter.
    """
    path = options.calibration
    if path is None or options.mode == "off":
        return None
    calibration = calibration_of_run(path, lambda _: identify(engine, formats))
    logger.info("speculation.calibration: %s, of %s", path, calibration.identity.hardware)
    return calibration


def present_calibration(options: SpeculationConfig, engine: Engine, formats: Sequence[str], num_sequences: int) -> Calibration:
    """A calibration measured now, equal on all ranks. Collective over the world; the engine is awake and idle.

    Args:
        formats: names of the drafters.
        num_sequences: largest batch of a replica.
    """
    identity = identify(engine, formats)
    if options.mode in ("off", "always"):
        return _guessed(options, engine, identity)
    seconds = options.toggle.bootstrap_seconds
    logger.info("speculation.calibration is not set: measuring this device's steps for about %g s", seconds)
    drafts = _draft_lengths(options)
    rows = bootstrap(engine, formats, num_sequences, drafts, seconds)  # on all replicas at once, because they share the machine
    return fit(measured_passes(from_rank_zero(rows)), _size(options, engine, identity), identity)


def _draft_lengths(options: SpeculationConfig) -> list[int]:
    """Draft lengths that the mode may choose."""
    if options.mode == "adaptive":
        return list(range(1, options.toggle.max_speculative_tokens + 1))
    return list(options.toggle.ladder.rungs) if options.mode == "ladder" else [options.num_speculative_tokens]


def _guessed(options: SpeculationConfig, engine: Engine, identity: Identity) -> Calibration:
    """A guess for modes that don't choose: only the coordinator uses it to compare replicas, and live steps correct it."""
    hardware = find_hardware(identity.hardware)
    hardware = replace(GUESS, name=hardware.name) if hardware.bandwidth == float("inf") else hardware
    roofline = nominal_roofline(_size(options, engine, identity), hardware, identity.formats)
    return Calibration(identity, roofline, provenance={"source": GUESSED})


def _size(options: SpeculationConfig, engine: Engine, identity: Identity) -> ModelSize:
    drafters = proposer_kind(options).drafters(options) if identity.formats else {}
    return model_size(engine.architecture, drafters, identity.tensor_model_parallel_size, identity.dtype)
