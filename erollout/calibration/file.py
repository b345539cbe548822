"""A calibration: costs of one model on one hardware, as a JSON file that states what they hold for. Pure.

Configurations of the reference implementation, which hold only a roofline, can be read as well, to compare its fit with ours.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

from erollout.calibration.model_size import describe_shape
from erollout.drafter.registry import runs_no_model
from erollout.errors import UserError
from erollout.policy.families import published_architecture
from erollout.speculation.cost.cost_model import CalibratedCost, PassTimes
from erollout.speculation.cost.measured_table import MeasuredTable, Point
from erollout.speculation.cost.roofline import Communication, ModelSize, Pass, PassCost, Roofline

KIND = "erollout calibration"
VERSION = 1
REFERENCE_FORMAT = "w4a16"
"""Format of the reference implementation's drafter, which its files do not state."""
_REFERENCE_NUMBERS = {
    "hardware": ("tp", "BW_eff", "c_comm"),
    "model": ("W_t", "W_d", "C_dense", "C_attn", "kappa_theoretical"),
    "calibration": ("eta_d", "kappa_eff", "F_eff", "c_T", "c_V", "c_D"),
}
_OVERHEADS = ("per_pass", "per_sequence", "per_token", "per_context", "latency", "reduces", "reduce_bytes")
_MAY_BE_ZERO = frozenset(("attention_flops", "padded", *_OVERHEADS, "C_attn", "c_comm", "c_T", "c_V", "c_D"))
"""Numbers that may be 0; all others that passes are computed from are above 0."""
_DRAFT_BYTES = "size.draft_bytes."
"""Where drafters have 0 that run no model."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The model, hardware and layout that times hold for. An empty name is unknown and matches any, except for the hardware."""

    model: str
    """The model's sizes, from model_size.describe_shape."""
    hardware: str
    tensor_model_parallel_size: int = 1
    formats: tuple[str, ...] = ()
    """Formats of the drafters."""
    dtype: str = ""
    kernels: str = ""
    """Kernels of the decode model: `native`, `prepacked` or `torch`."""


@dataclass(frozen=True, slots=True)
class Calibration:
    identity: Identity
    roofline: Roofline
    tables: Mapping[tuple[Pass, str], tuple[Point, ...]] = field(default_factory=dict)
    """Measured points relative to the roofline, by pass and drafter format."""
    model_name: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Date, versions and source, for the reader."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """Accuracy of the roofline by component."""
    source: str = ""
    """Path of the file that it was read from."""

    def passes(self) -> PassTimes:
        """Seconds of single passes."""
        tables = {key: MeasuredTable(points, partial(self.roofline.rows, *key)) for key, points in self.tables.items()}
        return PassTimes(self.roofline, tables)

    def cost_model(self) -> CalibratedCost:
        """A new cost model without live corrections."""
        return CalibratedCost(self.passes())

    def require(self, run: Identity) -> None:
        """Raise UserError, naming both sides, if the times are not for this run's model, hardware, layout and drafters."""
        for name in ("model", "hardware", "tensor_model_parallel_size", "dtype", "kernels"):
            mine, theirs = getattr(self.identity, name), getattr(run, name)
            if mine != theirs and (name == "hardware" or (mine and theirs)):
                self._refuse(name, mine or "unknown", theirs)
        missing = [format for format in run.formats if format not in self.identity.formats]
        if missing:
            self._refuse("drafter formats", ", ".join(self.identity.formats) or "none", ", ".join(run.formats))

    def _refuse(self, name: str, mine: object, theirs: object) -> None:
        raise UserError(
            f"calibration {self.source or 'given'} is for {name} {mine}, this run has {theirs}: make a new one with "
            "`erollout calibrate sweep` and `fit`"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON tree with a checksum."""
        tree = _to_json(self)
        return {**tree, "checksum": _checksum(tree)}

    def save(self, path: str | Path) -> None:
        """Write the file. Raises UserError if it can't be written."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"can't write calibration {path}: {error.strerror}") from error


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration, ours or the reference implementation's. Raises UserError if it is missing or damaged."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"can't read calibration {path}: {error.strerror}; make one with `erollout calibrate sweep` and `calibrate fit`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"calibration {path} is damaged: no valid JSON ({error}); make it again") from None
    return read_calibration(tree, str(path))


def calibration_of_run(path: str, identity: Callable[[Calibration], Identity]) -> Calibration:
    """Read the `speculation.calibration` of a run with the given identity.

    Raises UserError, naming the key, if it is missing, damaged, or for another identity.
    """
    try:
        calibration = load_calibration(path)
        calibration.require(identity(calibration))
    except UserError as error:
        raise UserError(f"speculation.calibration: {error}, or unset it to measure at the start") from error
    return calibration


def read_calibration(tree: Any, source: str) -> Calibration:
    """The inverse of `to_dict`; also reads the reference implementation's. Raises UserError that names the source."""
    if not isinstance(tree, dict) or (tree.get("kind") != KIND and not {"hardware", "model", "calibration"} <= tree.keys()):
        raise UserError(f"{source} is not a calibration: it lacks kind = {KIND!r}; make one with `erollout calibrate fit`")
    try:
        return _from_json(tree, source) if tree.get("kind") == KIND else _from_reference(tree, source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"calibration {source} is damaged: {type(error).__name__} {error}; make it again") from None


def _to_json(calibration: Calibration) -> dict[str, Any]:
    roofline = calibration.roofline
    communication = {name: value for name, value in asdict(roofline.communication).items() if value != float("inf")}
    return {
        "kind": KIND,
        "version": VERSION,
        "identity": {**asdict(calibration.identity), "formats": list(calibration.identity.formats)},
        "model_name": calibration.model_name,
        "provenance": dict(calibration.provenance),
        "size": {**asdict(roofline.size), "draft_bytes": dict(roofline.size.draft_bytes)},
        "roofline": {
            "target": asdict(roofline.target),
            "verify": asdict(roofline.verify),
            "draft": {format: asdict(cost) for format, cost in roofline.draft.items()},
            "communication": communication,
        },
        "tables": [
            {"pass": kind, "format": format, "points": [[getattr(p, f.name) for f in fields(Point)] for p in points]}
            for (kind, format), points in calibration.tables.items()
        ],
        "diagnostics": dict(calibration.diagnostics),
    }


def _from_json(tree: dict[str, Any], path: str) -> Calibration:
    if tree.get("version") != VERSION:
        raise UserError(f"calibration {path} has version {tree.get('version')}, this erollout reads {VERSION}; make it again")
    _require_numbers({"size": tree["size"], "roofline": tree["roofline"]}, path)
    tree = dict(tree)
    found, expected = tree.pop("checksum", None), _checksum(tree)
    if found != expected:
        raise UserError(f"calibration {path} is damaged: its checksum is {found}, its content has {expected}; make it again")
    costs = tree["roofline"]
    roofline = Roofline(
        ModelSize(**tree["size"]),
        PassCost(**costs["target"]),
        PassCost(**costs["verify"]),
        {format: PassCost(**cost) for format, cost in costs["draft"].items()},
        Communication(**costs["communication"]),
    )
    identity = Identity(**{**tree["identity"], "formats": tuple(tree["identity"]["formats"])})
    tables = {(t["pass"], t["format"]): tuple(_point(point, path) for point in t["points"]) for t in tree["tables"]}
    return Calibration(identity, roofline, tables, tree["model_name"], tree["provenance"], tree["diagnostics"], path)


def _from_reference(tree: dict[str, Any], path: str) -> Calibration:
    """The reference's roofline: eta_d on the drafter's weights, one kappa, and n + 1 times the FLOP in a verify pass."""
    _require_numbers({name: {key: tree[name][key] for key in keys} for name, keys in _REFERENCE_NUMBERS.items()}, path)
    hardware, model, fit = tree["hardware"], tree["model"], tree["calibration"]
    size = ModelSize(
        weight_bytes=model["W_t"],
        draft_bytes={REFERENCE_FORMAT: model["W_d"]},
        flops=model["C_dense"],
        attention_flops=model["C_attn"],
        kv_bytes=model["kappa_theoretical"],
    )
    common = {
        "bandwidth": hardware["BW_eff"],
        "compute": fit["F_eff"],
        "kv_factor": fit["kappa_eff"] / model["kappa_theoretical"],
    }
    roofline = Roofline(
        size,
        PassCost(**common, per_sequence=fit["c_T"] * 1e-6),
        PassCost(**common, per_sequence=fit["c_V"] * 1e-6),
        {REFERENCE_FORMAT: PassCost(**common, weight_factor=fit["eta_d"], per_sequence=fit["c_D"] * 1e-6)},
        Communication(per_sequence=hardware["c_comm"]),
    )
    architecture = published_architecture(model["name"])
    sizes = describe_shape(architecture) if architecture else ""
    identity = Identity(sizes, hardware["gpu"], hardware["tp"], (REFERENCE_FORMAT,))
    provenance = {key: tree.get("metadata", {}).get(key) for key in ("created", "csv_source")}
    return Calibration(identity, roofline, {}, model["name"], provenance, {}, path)


def _require_numbers(tree: Mapping[str, Any], path: str, where: str = "") -> None:
    """Raise UserError, naming file and key, for values that are not usable numbers."""
    for key, value in tree.items():
        may_be_zero = key in _MAY_BE_ZERO or (where == _DRAFT_BYTES and runs_no_model(key))
        if isinstance(value, dict):
            _require_numbers(value, path, f"{where}{key}.")
        elif not isinstance(value, int | float) or not 0 <= value < inf or (value == 0 and not may_be_zero):
            least = "of at least 0" if may_be_zero else "above 0"
            raise UserError(f"calibration {path}: {where}{key} = {value!r} must be a number {least}; make it again")


def _point(values: Sequence[Any], path: str) -> Point:
    point = Point(*values)
    if not (point.batch >= 1 and 0 < point.context < inf and point.num_speculative_tokens >= 0 and isfinite(point.log_ratio)):
        raise UserError(f"calibration {path}: tables has a point {list(values)}, which no sweep measures; make it again")
    return point


def _checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]
