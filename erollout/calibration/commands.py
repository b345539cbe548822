"""`erollout calibrate sweep | fit | validate | predict | plot | info | explain`. Light: scipy comes with the work."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from erollout.calibration.devices import find_hardware, nominal_roofline
from erollout.calibration.explain import explanation
from erollout.calibration.file import REFERENCE_FORMAT, Calibration, Identity, load_calibration
from erollout.calibration.model_size import describe_shape, model_size, parse_shape
from erollout.calibration.sweep_file import SweepRow, read_sweep
from erollout.configuration.arguments import add_run_arguments
from erollout.drafter.registry import draft_weights
from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.format_choice import expected_length
from erollout.speculation.step import Arm
from erollout.tracking.terminal import print_whole

if TYPE_CHECKING:
    from erollout.calibration.fit import Measured

DEFAULT_ACCEPTANCE = 0.9
"""Default acceptance at each position of a draft: about an INT4 drafter's on a policy in training."""
DEFAULT_DRAFTS = (1, 2, 3, 4, 5, 6, 7, 8)

Run = Callable[[argparse.Namespace, list[str]], int]
Lengths = Callable[[int], float]


def add_commands(subparsers: argparse._SubParsersAction, sweep: Run) -> None:
    """Add `calibrate` to the command line. `sweep` needs ranks, which the caller starts."""
    calibrate = subparsers.add_parser("calibrate", help="measure and model the cost of decode steps on this hardware")
    commands = calibrate.add_subparsers(dest="calibration_command", required=True, metavar="command")
    _add_sweep(commands, sweep)
    fit = _command(commands, "fit", _fit, "fit a calibration to a sweep")
    fit.add_argument("--csv", required=True, help="sweep to read")
    fit.add_argument("--out", required=True, help="JSON file to write")
    fit.add_argument("--hardware", help="hardware of the sweep if its file does not say: A100, H100, ...")
    fit.add_argument(
        "--model", help="model of the sweep if its file does not say: a name (Qwen2.5-7B) or a directory with config.json"
    )
    fit.add_argument("--format", default=REFERENCE_FORMAT, help="drafter format of the sweep if its file does not say")
    validate = _command(
        commands, "validate", _validate, "compare predictions with a sweep; exit status 1 if they miss the required accuracy"
    )
    _add_config(validate)
    validate.add_argument("--csv", required=True, help="sweep to compare with")
    _add_acceptance(validate)
    validate.add_argument("--held-out", action="store_true", help="predict each batch size from a fit to all others")
    validate.add_argument("--against", help="second calibration to compare, ours or the reference implementation's")
    predict = _command(commands, "predict", _predict, "print predicted times of every arm at one load")
    _add_point(predict)
    plot = _command(commands, "plot", _plot, "plot where speculation pays")
    _add_config(plot)
    plot.add_argument("--csv", help="sweep whose measured points to plot as well")
    plot.add_argument("--out", required=True, help="PNG file to write")
    plot.add_argument("--drafts", type=_integers, help="num_speculative_tokens to choose from; default: the measured ones")
    _add_acceptance(plot)
    _add_config(_command(commands, "info", _info, "print what a calibration was measured on and how well it fits"))
    _add_point(_command(commands, "explain", _explain, "explain which arm is best at one load"))


def _command(commands: argparse._SubParsersAction, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.set_defaults(run=run)
    return parser


def _add_sweep(commands: argparse._SubParsersAction, run: Run) -> None:
    parser = _command(
        commands, "sweep", run, "measure step times on this device with the model and drafters of a configuration"
    )
    add_run_arguments(parser)
    parser.add_argument("--out", required=True, help="CSV file to write; an existing sweep is resumed")
    parser.add_argument("--batches", type=_integers, help="batch sizes, as 1,2,4,8")
    parser.add_argument("--contexts", type=_integers, help="context lengths in tokens, as 64,512")
    parser.add_argument("--drafts", type=_integers, help="num_speculative_tokens, as 1,3,7")
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help="calibration: a JSON file from `fit`, or one of the reference implementation"
    )


def _add_acceptance(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--acceptance", type=_share, default=DEFAULT_ACCEPTANCE, help="probability that the next token of a draft is accepted"
    )
    group.add_argument(
        "--length", type=_length, help="acceptance length L instead of --acceptance: one number for all n, or 3=3.6,7=6.7"
    )


def _add_point(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", help="calibration; default: a prediction from published figures (see --model and --hardware)"
    )
    parser.add_argument("--model", help="without --config: a name (Qwen2.5-7B) or a directory with config.json")
    parser.add_argument("--hardware", help="without --config: A100, H100, ...")
    parser.add_argument("--tp", type=int, default=1, help="without --config: tensor_model_parallel_size")
    parser.add_argument("--format", default=REFERENCE_FORMAT, help="without --config: drafter format")
    parser.add_argument("--batch", type=_positive, required=True, help="decoding sequences")
    parser.add_argument("--context", type=_positive, required=True, help="context length in tokens")
    parser.add_argument("--drafts", type=_integers, default=DEFAULT_DRAFTS, help="num_speculative_tokens to consider, as 1,3,7")
    _add_acceptance(parser)


def _fit(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.calibration.fit import fit, measured_passes
    from erollout.calibration.noise import gaps, noise
    from erollout.calibration.report import print_accuracies, print_identity

    rows = read_sweep(options.csv)
    first, points = _one(rows, options.csv), measured_passes(rows, options.format)
    architecture = _architecture(options.model, first, options.csv)
    formats = tuple(dict.fromkeys(point.format for point in points if point.kind == "draft"))
    hardware = options.hardware or first.hardware or "unknown"
    ranks, dtype = first.tensor_model_parallel_size, first.dtype or "bfloat16"
    identity = Identity(describe_shape(architecture), hardware, ranks, formats, first.dtype, first.kernels)
    provenance = {
        "date": time.strftime("%Y-%m-%d"),
        "sweep": str(options.csv),
        "points": len(points),
        "versions": {name: _version(name) for name in ("erollout", "torch", "scipy")},
    }
    size = model_size(architecture, draft_weights(formats), ranks, dtype)
    calibration = fit(points, size, identity, options.model or first.model, provenance)
    noisy = noise(rows, calibration.passes().tables)
    calibration = replace(calibration, diagnostics={**calibration.diagnostics, "noise": noisy.as_json()})
    calibration.save(options.out)
    print_identity(calibration)
    print_accuracies("the roofline alone, at the points it was fitted to", calibration.diagnostics["roofline"])
    for component, names in calibration.diagnostics["at bounds"].items():
        if names:
            print(f"{component}: {', '.join(names)} ended at a bound; the points do not determine it")
    for line in (*noisy.lines(), *(f"WARNING: {warning}" for warning in (*noisy.warnings(), *gaps(rows)))):
        print(line)
    if hardware == "unknown":
        print("the sweep names no hardware; give --hardware, because a run only accepts a calibration of its own hardware")
    print(f"wrote {options.out}")
    return 0


def _validate(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.calibration.fit import measured_passes
    from erollout.calibration.report import print_accuracies, print_regrets, print_signs
    from erollout.calibration.validate import Gates, Predictor, held_out, validate

    calibration, rows = load_calibration(options.config), read_sweep(options.csv)
    first, points = _one(rows, options.csv), measured_passes(rows, calibration.identity.formats[0])
    _require_formats(calibration, [p.format for p in points if p.kind == "draft"], options.csv)
    for note in (*_differences(calibration, first, options.csv), *_in_sample(calibration, points, options)):
        print(note)
    lengths = _lengths(options)
    predictors: dict[str, Predictor] = {"calibration": _same(calibration.passes())}
    if options.held_out:
        predictors["held out by batch"] = held_out(points, calibration.roofline.size, calibration.identity)
    judged = list(predictors)[-1]
    if options.against:
        other = load_calibration(options.against)
        _require_formats(other, [p.format for p in points if p.kind == "draft"], options.csv)
        predictors[Path(options.against).name] = _same(other.passes())
    validations = {name: validate(points, predictor, lengths) for name, predictor in predictors.items()}
    for name, validation in validations.items():
        print_accuracies(name, validation.components)
    print_signs(validations, points, predictors, _assumption(options))
    print_regrets(points, predictors, lengths)
    failures = Gates().failures(validations[judged])
    for failure in failures:
        print(f"FAILED ({judged}): {failure}")
    return 1 if failures else 0


def _predict(options: argparse.Namespace, arguments: list[str]) -> int:
    passes = _point_passes(options)
    lengths = _lengths(options)
    table = Table(title=f"{options.batch} sequences of {options.context} tokens, {_assumption(options)}", title_justify="left")
    for heading in ("arm", "draft ms", "verify ms", "step ms", "tokens", "ms per token", "speed-up"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    at = (options.batch, float(options.context))
    target = passes.target_seconds(*at)
    table.add_row("off", "", "", f"{1e3 * target:.3f}", "1.00", f"{1e3 * target:.3f}", "1.000")
    for arm in (Arm(format, n) for format in passes.formats for n in options.drafts):
        n, step = arm.num_speculative_tokens, passes.step_seconds(arm, *at)
        draft, verify, length = passes.draft_seconds(arm.format, *at, n), passes.verify_seconds(*at, n), lengths(n)
        figures = [*(f"{1e3 * value:.3f}" for value in (draft, verify, step)), f"{length:.2f}"]
        table.add_row(str(arm), *figures, f"{1e3 * step / length:.3f}", f"{length * target / step:.3f}")
    print_whole(table)
    return 0


def _plot(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.calibration.fit import measured_passes
    from erollout.calibration.map_points import SMALL_BATCHES, axis, measured_lengths, measurements, predictions
    from erollout.calibration.regret import measured_places
    from erollout.calibration.validate import measured_cycles
    from erollout.plots.speculation_map import boundary

    calibration, lengths = load_calibration(options.config), _lengths(options)
    points = measured_passes(read_sweep(options.csv), calibration.identity.formats[0]) if options.csv else []
    _require_formats(calibration, [p.format for p in points if p.kind == "draft"], options.csv)
    places, passes = measured_places(measured_cycles(points), lengths), calibration.passes()
    drafts = options.drafts or sorted({p.num_speculative_tokens for p in points} - {0}) or measured_lengths(calibration)
    arms = [Arm(format, n) for format in passes.formats for n in drafts or DEFAULT_DRAFTS]
    all_points = [point for table in calibration.tables.values() for point in table]
    batches = axis(1, 2 * max((p.batch for p in all_points), default=SMALL_BATCHES), SMALL_BATCHES)
    contexts = axis(min((p.context for p in all_points), default=128), 2 * max((p.context for p in all_points), default=4096))
    prediction = predictions(passes, lengths, arms, batches, contexts)
    title = f"Where speculation pays: {calibration.model_name} on {calibration.identity.hardware}, {_assumption(options)}"
    try:
        boundary(prediction, measurements(places, passes, lengths), title).savefig(options.out, dpi=150)
    except OSError as error:
        raise UserError(f"can't write {options.out}: {error.strerror}") from error
    print(f"wrote {options.out}")
    return 0


def _info(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.calibration.report import print_accuracies, print_identity, print_roofline

    calibration = load_calibration(options.config)
    print_identity(calibration)
    print_roofline(calibration.roofline)
    if "roofline" in calibration.diagnostics:
        print_accuracies("the roofline alone, at the points it was fitted to", calibration.diagnostics["roofline"])
    return 0


def _explain(options: argparse.Namespace, arguments: list[str]) -> int:
    arms = options.drafts
    print(explanation(_point_passes(options), options.batch, float(options.context), _lengths(options), arms))
    return 0


def _differences(calibration: Calibration, row: SweepRow, path: str) -> list[str]:
    """Print a note for each property that calibration and sweep both state and that differs."""
    mine = calibration.identity
    both = {
        "model sizes": (mine.model, row.architecture),
        "hardware": (mine.hardware, row.hardware),
        "tensor_model_parallel_size": (mine.tensor_model_parallel_size, row.tensor_model_parallel_size),
        "dtype": (mine.dtype, row.dtype),
        "kernels": (mine.kernels, row.kernels),
    }
    return [
        f"NOTE: {name} of calibration {calibration.source}: {ours}; of sweep {path}: {theirs}"
        for name, (ours, theirs) in both.items()
        if ours and theirs and ours != theirs
    ]


def _in_sample(calibration: Calibration, points: Sequence["Measured"], options: argparse.Namespace) -> list[str]:
    """Print a note if the calibration was fitted to points of this sweep."""
    from erollout.calibration.validate import seen

    count, source = seen(calibration, points), str(calibration.provenance.get("csv_source") or "")
    if count:
        known = f"{options.config} was fitted to {count} of the {len(points)} points of {options.csv}"
    elif Path(source).name == Path(options.csv).name:
        known = f"{options.config} states that it was fitted to {source}"
    else:
        return []
    hint = (
        "see the column `held out by batch` for accuracy on unseen points"
        if options.held_out
        else "give --held-out for accuracy on unseen points"
    )
    return [f"IN SAMPLE: {known}; {hint}"]


def _one(rows: Sequence[SweepRow], path: str) -> SweepRow:
    """One row that represents all: a calibration covers one model, device and layout."""
    if not rows:
        raise UserError(f"sweep {path} has no points")
    kinds = {_kind(row) for row in rows}
    if len(kinds) > 1:
        raise UserError(f"sweep {path} mixes {' and '.join(' '.join(filter(None, kind)) for kind in sorted(kinds))}; split it")
    return rows[0]


def _kind(row: SweepRow) -> tuple[str, ...]:
    """Model, device and layout of a row."""
    ranks = f"TP{row.tensor_model_parallel_size}"
    return row.model, row.hardware, ranks, row.architecture, row.dtype, row.kernels


def _architecture(model: str | None, row: SweepRow, path: str) -> Architecture:
    """Architecture of a sweep's model: from the option, else from the sweep, else by the model's name."""
    if model is None and row.architecture:
        return parse_shape(row.architecture)
    return _named_architecture(model or row.model, f"sweep {path} names its model {row.model!r}")


def _named_architecture(model: str, where: str) -> Architecture:
    from erollout.config import ModelConfig
    from erollout.policy.families import policy_architecture, published_architecture

    if Path(model).is_dir():
        return policy_architecture(ModelConfig(path=model))  # type: ignore[call-arg]  # mypy does not see through section
    architecture = published_architecture(model)
    if architecture is None:
        raise UserError(f"{where}: {model!r} is neither a directory nor a known model; give --model DIRECTORY")
    return architecture


def _point_passes(options: argparse.Namespace) -> PassTimes:
    """Pass times from the given calibration, or from a device's data sheet."""
    if options.config:
        return load_calibration(options.config).passes()
    if not options.model or not options.hardware:
        raise UserError("give --config CALIBRATION, or --model and --hardware for a prediction from published figures")
    size = model_size(_named_architecture(options.model, "--model"), draft_weights((options.format,)), options.tp)
    return PassTimes(nominal_roofline(size, find_hardware(options.hardware), (options.format,)))


def _require_formats(calibration: Calibration, formats: Sequence[str], path: str) -> None:
    missing = [format for format in dict.fromkeys(formats) if format not in calibration.identity.formats]
    if missing:
        raise UserError(
            f"sweep {path} has drafter {', '.join(missing)}, calibration {calibration.source} has "
            f"{', '.join(calibration.identity.formats)}: compare those of the same drafters"
        )


def _same(passes: PassTimes) -> Callable[[int], PassTimes]:
    return lambda batch: passes


def _lengths(options: argparse.Namespace) -> Lengths:
    """Acceptance length by num_speculative_tokens, from the options."""
    given: Mapping[int, float] | float | None = options.length
    if given is None:
        return lambda n: expected_length(options.acceptance, n)
    if isinstance(given, float):
        return lambda n: given

    def by_length(n: int) -> float:
        if n not in given:
            raise UserError(f"--length has no value for num_speculative_tokens = {n}; add {n}=...")
        return given[n]

    return by_length


def _assumption(options: argparse.Namespace) -> str:
    return f"acceptance {options.acceptance:g}" if options.length is None else f"length {options.length}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive integers like 1,3,7") from None


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _length(text: str) -> float | dict[int, float]:
    try:
        if "=" not in text:
            return _at_least_one(text)
        return {_positive(n): _at_least_one(value) for n, _, value in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list like 3=3.6,7=6.7") from None


def _at_least_one(text: str) -> float:
    value = float(text)
    if not 1 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text} is below 1: every cycle yields at least one token")
    return value
