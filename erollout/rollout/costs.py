"""What a replica's steps cost in this run: by the named calibration, else as the run has measured before, else measured now."""

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
    """The costs that a run's toggle starts with. Every rank has the same."""

    def __init__(self, options: SpeculationConfig, engine: Engine, formats: Sequence[str]) -> None:
        """Raises UserError for a named calibration that is not of this run.

        Args:
            formats: names of the drafters.
        """
        self.options = options
        self.engine = engine
        self.formats = tuple(formats)
        self.calibration = named_calibration(options, engine, formats)
        """What the toggle's corrections are relative to; None: not looked up yet, and none is named."""

    def first_toggle(self, num_sequences: int, saved: Mapping[str, Any]) -> Toggle:
        """The run's toggle, with the costs and the acceptance of its earlier attempts, where they are of this model, hardware
        and drafters. Collective over the world.

        Args:
            num_sequences: most that a replica will decode at once.
            saved: `calibration` and `toggle` of a checkpoint; empty: there is none.
        """
        known = from_rank_zero(self._usable(saved))
        found = self.calibration or known or present_calibration(self.options, self.engine, self.formats, num_sequences)
        self.calibration = found
        toggle = Toggle(self.options, self.formats, found.cost_model())
        if known is not None:
            state = dict(saved["toggle"])
            if (known.roofline, known.tables) != (found.roofline, found.tables):  # corrections are relative to these
                logger.info("speculation.calibration is not that of the checkpoint: what live steps added to it is dropped")
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
                logger.info("costs and acceptance of the run so far are not used: %s", error)
            return None
        return calibration
