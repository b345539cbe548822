"""Step costs of a run: from the configured calibration, else as measured by an earlier attempt, else measured now."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from erollout.calibration.file import Calibration, read_calibration
from erollout.calibration.resolve import GUESSED, named_calibration, present_calibration
from erollout.calibration.sweep import identify
from erollout.configuration.speculation import SpeculationConfig
from erollout.engine.engine import Engine
from erollout.errors import UserError
from erollout.parallel.collectives import from_rank_zero
from erollout.speculation.toggle import Toggle

logger = logging.getLogger(__name__)


class RunCosts:
    """The costs with which a run's toggle starts, equal on all ranks."""

    def __init__(self, options: SpeculationConfig, engine: Engine, formats: Sequence[str]) -> None:
        """Raises UserError for a configured calibration that is not for this run.

        Args:
            formats: names of the drafters.
        """
        self.options = options
        self.engine = engine
        self.formats = tuple(formats)
        self.calibration = named_calibration(options, engine, formats)
        """Calibration that the toggle's corrections refer to; None: none is configured, and none has been resolved yet."""

    def first_toggle(self, num_sequences: int, saved: Mapping[str, Any]) -> Toggle:
        """The run's toggle, with costs and acceptance of earlier attempts if they are for this model, hardware and drafters.
        Collective over the world.

        Args:
            num_sequences: largest batch of a replica.
            saved: `calibration` and `toggle` of a checkpoint; empty: there is none.
        """
        known = from_rank_zero(self._usable(saved))
        found = self.calibration or known or present_calibration(self.options, self.engine, self.formats, num_sequences)
        self.calibration = found
        toggle = Toggle(self.options, self.formats, found.cost_model())
        if known is not None:
            state = dict(saved["toggle"])
            if (known.roofline, known.tables) != (found.roofline, found.tables):  # corrections refer to these
                logger.info("speculation.calibration differs from the checkpoint's: its live corrections are dropped")
                del state["cost"]
            try:
                toggle.load_state_dict(state)
            except ValueError as error:
                raise UserError(f"the checkpoint's rollout state is damaged: {error}; resume from an earlier one") from error
        return toggle

    def _usable(self, saved: Mapping[str, Any]) -> Calibration | None:
        if "calibration" not in saved:
            return None
        try:
            calibration = read_calibration(saved["calibration"], "of the checkpoint")
            calibration.require(identify(self.engine, self.formats))
            if calibration.provenance.get("source") == GUESSED and self.options.mode != "always":
                raise UserError("they were guessed")
        except UserError as error:
            if self.options.mode != "off":  # where they are always guessed
                logger.info("costs and acceptance in the checkpoint are not used: %s", error)
            return None
        return calibration
