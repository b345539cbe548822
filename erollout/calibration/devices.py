"""Published figures of devices by name, and the roofline that they give before anything is measured. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from erollout.errors import UserError
from erollout.speculation.cost.roofline import Communication, ModelSize, PassCost, Roofline

BANDWIDTH_SHARE, COMPUTE_SHARE = 0.78, 0.75
"""Shares of the peaks that decoding reaches (EfficientRollout's sweeps on A100: 0.77-0.79 and 0.75)."""
PER_SEQUENCE, PER_TOKEN, PER_PASS = 40e-6, 20e-6, 4e-4
"""Seconds of overhead per sequence, per token of a verify pass and per pass: from the same sweeps."""
PER_LOOKUP = 1e-5
"""Seconds per sequence of a drafter that runs no model."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device and its links to the other devices of a replica."""

    name: str
    bandwidth: float = float("inf")
    """Peak in bytes/s; infinite: unknown."""
    compute: float = float("inf")
    """Peak dense FLOP/s in 16 bits."""
    link_bandwidth: float = 20e9
    """Bytes/s of an all-reduce."""
    link_latency: float = 30e-6
    """Seconds of a small all-reduce."""

    @property
    def communication(self) -> Communication:
        return Communication(self.link_latency, self.link_bandwidth)


_DEVICES = (
    Hardware("A100", 2.039e12, 312e12, 230e9),
    Hardware("A100-SXM4-40GB", 1.555e12, 312e12, 230e9),
    Hardware("A100-PCIE-40GB", 1.555e12, 312e12),
    Hardware("H100", 3.35e12, 989e12, 370e9),
    Hardware("H100 PCIe", 2.04e12, 756e12),
    Hardware("H200", 4.8e12, 989e12, 370e9),
    Hardware("B200", 8.0e12, 2250e12, 700e9),
    Hardware("L40S", 0.864e12, 362e12),
    Hardware("RTX 4090", 1.008e12, 165e12),
)
"""Known devices, from the manufacturers' data sheets."""


def find_hardware(name: str) -> Hardware:
    """The known device with the longest name contained in the given one, else one without peaks (any CPU)."""
    plain = _plain(name)
    known = [device for device in _DEVICES if _plain(device.name) in plain]
    if known:
        device = max(known, key=lambda d: len(d.name))
        return Hardware(name, device.bandwidth, device.compute, device.link_bandwidth, device.link_latency)
    return Hardware(name)


def nominal_roofline(size: ModelSize, hardware: Hardware, formats: Iterable[str]) -> Roofline:
    """The expected roofline where nothing is measured. Raises UserError for a device without known peaks."""
    if hardware.bandwidth == float("inf"):
        names = ", ".join(device.name for device in _DEVICES)
        raise UserError(
            f"hardware {hardware.name!r} is unknown; choose from {names}, or measure it with `erollout calibrate sweep`"
        )
    cost = PassCost(
        hardware.bandwidth * BANDWIDTH_SHARE, hardware.compute * COMPUTE_SHARE, per_pass=PER_PASS, per_sequence=PER_SEQUENCE
    )
    verify = PassCost(cost.bandwidth, cost.compute, per_pass=PER_PASS, per_sequence=PER_SEQUENCE, per_token=PER_TOKEN)
    draft = PassCost(cost.bandwidth, cost.compute, per_pass=PER_PASS, per_sequence=2 * PER_SEQUENCE)
    lookup = PassCost(cost.bandwidth, cost.compute, per_sequence=PER_LOOKUP)
    links = hardware.communication if size.reduces else Communication()
    drafts = {format: draft if size.draft_bytes[format] else lookup for format in formats}
    return Roofline(size, cost, verify, drafts, links)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
