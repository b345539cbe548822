"""Times of simulated steps, from a calibration or from published figures of a device and a model."""

from pathlib import Path

from erollout.calibration.devices import find_hardware, nominal_roofline
from erollout.calibration.file import load_calibration
from erollout.calibration.model_size import model_size
from erollout.config import ModelConfig
from erollout.drafter.registry import draft_weights
from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.policy.families import policy_architecture, published_architecture
from erollout.speculation.cost.cost_model import PassTimes

DEFAULT_FORMAT = "w4a16_clip"


def read_passes(
    calibration: str | None, hardware: str | None, model: str | None, drafter: str | None, tensor_parallel: int
) -> tuple[PassTimes, str]:
    """Pass times and the drafter's format; for the arguments see `erollout simulate --help`. Raises UserError."""
    if calibration is not None:
        if hardware is not None or model is not None:
            raise UserError("--calibration names hardware and model; leave out --hardware and --model")
        return _calibrated(calibration, drafter, tensor_parallel)
    if hardware is None or model is None:
        raise UserError("give --calibration, or both --hardware and --model")
    format = drafter or DEFAULT_FORMAT
    size = model_size(_architecture(model), draft_weights([format]), tensor_parallel)
    return PassTimes(nominal_roofline(size, find_hardware(hardware), [format])), format


def _calibrated(path: str, drafter: str | None, tensor_parallel: int) -> tuple[PassTimes, str]:
    calibration = load_calibration(path)
    ranks, formats = calibration.identity.tensor_model_parallel_size, calibration.identity.formats
    if ranks != tensor_parallel:
        raise UserError(
            f"calibration {path} is of {ranks} GPUs per replica; set --tensor-parallel {ranks}, or give another one"
        )
    format = drafter or next(iter(formats), DEFAULT_FORMAT)
    if format not in formats:
        raise UserError(f"calibration {path} has no drafter {format}; choose --drafter from {', '.join(formats) or 'none'}")
    return calibration.passes(), format


def _architecture(model: str) -> Architecture:
    """Architecture of a published model by name, or of a directory or file with a Hugging Face configuration."""
    path = Path(model)
    if path.exists():
        folder = str(path.parent if path.is_file() else path)
        return policy_architecture(ModelConfig(path=folder))  # type: ignore[call-arg]  # mypy does not see through section
    known = published_architecture(model)
    if known is None:
        raise UserError(f"--model {model} is no folder with a config.json, and no published model that is known by name")
    return known
