"""Description of one drafter, for those who don't need its tensors: its name, format and head, and what it reads. Pure."""

import re
from dataclasses import dataclass

from erollout.configuration.speculation import DrafterConfig
from erollout.drafter.formats import AUTO, FIRST_FORMAT, FORMATS, HEAD_FORMAT, NONE
from erollout.speculation.cost.roofline import DraftWeights

_FORMER = {"int4": "w4a16", "int8": "w8a8"}
"""Names in sweeps and calibrations of earlier versions, with the formats of as many bytes."""
_NAME = re.compile(r"(?P<format>[^+]+)(?P<head>\+head)?(\+(?P<overrides>\d+) overrides)?")


@dataclass(frozen=True, slots=True)
class DrafterDescription:
    """One drafter: the policy in a format. What determines its costs makes its name."""

    format: str
    """A name of FORMATS, NONE or AUTO."""
    has_own_head: bool = False
    """Whether it has an INT8 copy of the LM head instead of the target's."""
    overrides: int = 0
    """Number of configured overrides."""

    @property
    def name(self) -> str:
        """Its name in Arm.format, calibrations, sweeps and decision traces."""
        overrides = f"+{self.overrides} overrides" if self.overrides else ""
        return f"{self.format}{'+head' if self.has_own_head else ''}{overrides}"

    @classmethod
    def named(cls, name: str) -> "DrafterDescription | None":
        """The inverse of `name`, also for former names; None for a name that is not a quantised policy's."""
        parts = _NAME.fullmatch(name)
        format = None if parts is None else _FORMER.get(parts["format"], parts["format"])
        if parts is None or format not in (*FORMATS, NONE, AUTO):
            return None
        return cls(format, parts["head"] is not None, int(parts["overrides"] or 0))

    def weights(self, group_size: int) -> DraftWeights:
        """What one step of it reads. `auto` counts with its first format; overrides don't count."""
        format = FORMATS.get(FIRST_FORMAT if self.format == AUTO else self.format)
        linear = format.weight_bytes(group_size) if format is not None else None
        return DraftWeights(linear, FORMATS[HEAD_FORMAT].weight_bytes(group_size) if self.has_own_head else None)


def describe_drafters(options: DrafterConfig) -> tuple[DrafterDescription, ...]:
    """The configured drafters, the default one first."""
    has_own_head, overrides = options.lm_head != "target", len(options.overrides)
    return tuple(DrafterDescription(format, has_own_head, overrides) for format in (options.format, *options.alternatives))
