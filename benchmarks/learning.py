"""Does RL come out the same with speculation? The same run without and with drafts, over several seeds.

    python benchmarks/learning.py                           # the demo's model, 5 arms, 3 seeds: about an hour on two cores
    python benchmarks/learning.py --arms off coupled rejection --seeds 5 train.steps=30
    python benchmarks/learning.py --config run.yaml --mode adaptive

Arms:

    off         without drafts
    coupled     drafts verified by `coupled`: must equal `off` number for number
    rejection   drafts verified by `rejection`: other samples of the same distribution, so within the seeds' spread
    frozen      `coupled`, but the drafter stays that of the first policy, as one that is trained beforehand would
    stale       `coupled`, but the drafter is one update older than the policy, as one that is made beside the training would

Whatever the drafter, `coupled` samples the same tokens, so acceptance rates of `coupled`, `frozen` and `stale` differ by the
age of the drafter alone. `--mode always` drafts in every step; `adaptive` may decide against drafts, which then proves nothing.

Runs go to --out, each in a directory of its own, and are not repeated if they are complete there. Prints Markdown: held-out
accuracy and reward by arm, the largest difference to `off`, seconds, acceptance; writes the curves to --figure.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from erollout import Config, load_config, read_metrics, train
from erollout.doctor.cpu import processor
from erollout.parallel.groups import expected_world_size
from erollout.plots import style
from erollout.resilience.stopping import VERDICT
from erollout.tracking import metrics as names

ROOT = Path(__file__).resolve().parent.parent
ARMS: dict[str, tuple[str, ...]] = {
    "off": ("speculation.mode=off",),
    "coupled": ("speculation.verification=coupled",),
    "rejection": ("speculation.verification=rejection",),
    "frozen": ("speculation.verification=coupled",),
    "stale": ("speculation.verification=coupled",),
}
COMPARED = ("train/loss", "train/grad_norm", names.REWARD, f"{names.RESPONSE_LENGTH}/mean", names.ACCURACY)
ACCEPTANCE = "speculation/acceptance_rate"
ROLLOUT_SECONDS = f"{names.SECONDS}/rollout"
TIMEOUT_SECONDS = 4 * 3600

History = Sequence[Mapping[str, float]]
Runs = Mapping[str, Sequence[History]]
"""Histories by arm, one per seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("--warm-start", default=str(ROOT / "configs" / "demo-sft.yaml"), help="config of its model's SFT")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mode", default="always", help="speculation.mode of the arms with drafts")
    parser.add_argument("--out", default="build/learning", help="directory of the runs")
    parser.add_argument("--figure", default=None, help="file of the curves; default: learning.png in --out")
    parser.add_argument("overrides", nargs="*", help="key=value of all runs")
    options = parser.parse_intermixed_args()
    _warm_up(load_config(options.config, options.overrides), options.warm_start)
    runs: dict[str, list[History]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        for arm in options.arms:
            runs[arm].append(_run(options, arm, seed))
    print("\n".join(report(options, runs)))
    plot(runs, Path(options.figure or Path(options.out) / "learning.png"))


def _warm_up(config: Config, warm_start: str) -> None:
    """Make the model that all runs start from, unless it is there."""
    if config.model.path and not Path(config.model.path, "config.json").is_file():
        from erollout.data.tokenizer import save_character_tokenizer

        save_character_tokenizer(load_config(warm_start).tokenizer_path)
        subprocess.run(
            [sys.executable, "-m", "erollout.cli", "sft", "--config", warm_start], check=True, timeout=TIMEOUT_SECONDS
        )


def _run(options: argparse.Namespace, arm: str, seed: int) -> History:
    """The history of an arm's run, which is made if it is not there."""
    directory = Path(options.out).absolute() / f"{arm}-{seed}"
    mode = () if arm == "off" else (f"speculation.mode={options.mode}",)
    keys = (f"train.seed={seed}", f"train.output_dir={directory}", "checkpoint.interval=0", "checkpoint.export_path=null")
    overrides = [*options.overrides, *mode, *ARMS[arm], *keys, f"tracking.run_name={arm}-{seed}"]
    config = load_config(options.config, overrides)
    verdict = directory / VERDICT
    if not verdict.is_file() or verdict.read_text().strip() != "done":
        ranks = expected_world_size(config.parallel)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
        directory.mkdir(parents=True, exist_ok=True)
        print(f"{arm}, seed {seed}: {directory}", file=sys.stderr, flush=True)
        with (directory / "log").open("w") as log:
            command = [*start, sys.executable, __file__, "--rank", arm, options.config, *overrides]
            subprocess.run(command, stdout=log, stderr=log, check=True, timeout=TIMEOUT_SECONDS)
    return read_metrics(directory)


def rank(arm: str, config: str, overrides: Sequence[str]) -> None:
    """Train on one rank."""
    with patch("erollout.drafter.drafter.Drafter.requantize_", aged(arm)):
        train(load_config(config, overrides))


def aged(arm: str) -> Callable[[Any, str], None]:
    """`Drafter.requantize_` of an arm: from the tensors of now, of the first policy, or of the policy before."""
    from erollout.drafter.drafter import Drafter

    requantize = Drafter.requantize_
    older: dict[tuple[int, str], torch.Tensor] = {}

    def made(drafter: Any, name: str) -> None:
        if arm not in ("frozen", "stale") or name not in drafter._layers:
            requantize(drafter, name)
            return
        tensor, key = drafter.model.tensors[name], (id(drafter), name)
        now = tensor.clone()
        tensor.copy_(older.get(key, now))
        requantize(drafter, name)
        tensor.copy_(now)
        if arm == "stale" or key not in older:
            older[key] = now

    return made


def report(options: argparse.Namespace, runs: Runs) -> list[str]:
    steps = int(max(row["step"] for row in next(iter(runs.values()))[0]))
    seeds = f"{options.seeds} seed{'' if options.seeds == 1 else 's'}"
    lines = [
        f"Config {Path(options.config).name}{''.join(f' {o}' for o in options.overrides)}, {steps} steps, {seeds}, "
        f"speculation.mode={options.mode}; {_machine()}.",
        "",
        "| arm | held-out accuracy before | after, by seed | gain in points, median (worst) | reward, last tenth | "
        "step seconds | rollout seconds | acceptance, first and last tenth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, histories in runs.items():
        accuracies = [values(history, names.ACCURACY) for history in histories]
        gains = [100 * (found[-1] - found[0]) for found in accuracies]
        before = statistics.median(found[0] for found in accuracies)
        after = ", ".join(f"{100 * found[-1]:.1f} %" for found in accuracies)
        reward = statistics.median(_mean_of_last(values(history, names.REWARD)) for history in histories)
        step, rollout = (_seconds(histories, name) for name in (names.STEP_SECONDS, ROLLOUT_SECONDS))
        lines.append(
            f"| {arm} | {100 * before:.1f} % | {after} | {statistics.median(gains):+.1f} ({min(gains):+.1f}) | {reward:.3f} | "
            f"{step:.2f} | {rollout:.2f} | {_acceptance(histories)} |"
        )
    if "off" in runs:
        lines += ["", *(_difference(arm, runs["off"], found) for arm, found in runs.items() if arm != "off")]
    return lines


def _difference(arm: str, off: Sequence[History], other: Sequence[History]) -> str:
    """How an arm's numbers differ from those without drafts."""
    pairs = [(values(one, name), values(two, name)) for one, two in zip(off, other, strict=True) for name in COMPARED]
    different = sum(a != b for one, two in pairs for a, b in zip(one, two, strict=True))
    total = sum(len(one) for one, _ in pairs)
    if not different:
        return f"- {arm}: all {total:,} numbers ({', '.join(COMPARED)}) equal those of off, to the last bit."
    last = [[values(history, names.ACCURACY)[-1] for history in found] for found in (off, other)]
    means = [100 * statistics.fmean(found) for found in last]
    spread = [100 * (max(found) - min(found)) for found in last]
    return (
        f"- {arm}: {different:,} of {total:,} numbers differ from those of off. Held-out accuracy at the end: mean "
        f"{means[1]:.1f} % against {means[0]:.1f} %, between seeds {spread[1]:.1f} and {spread[0]:.1f} points apart."
    )


def values(history: History, name: str) -> list[float]:
    return [row[name] for row in history if name in row]


def _mean_of_last(found: Sequence[float]) -> float:
    return statistics.fmean(found[-max(1, len(found) // 10) :])


def _seconds(histories: Sequence[History], name: str) -> float:
    """Median over all steps of all seeds."""
    return statistics.median(value for history in histories for value in values(history, name))


def _acceptance(histories: Sequence[History]) -> str:
    found = [rates for history in histories if (rates := values(history, ACCEPTANCE))]
    if not found:
        return "no drafts"
    first = statistics.median(_mean_of_last(rates[::-1]) for rates in found)
    return f"{first:.3f}, {statistics.median(map(_mean_of_last, found)):.3f}"


def _machine() -> str:
    _, model = processor()
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def plot(runs: Runs, out: Path) -> None:
    """Reward, held-out accuracy and acceptance by step: the seeds' mean, and a band from the least to the largest."""
    from matplotlib.ticker import MaxNLocator

    figure = style.figure(13, 4.2, "Reinforcement learning without and with speculation")
    panels = {"mean reward": names.REWARD, "held-out accuracy": names.ACCURACY, "acceptance rate of drafts": ACCEPTANCE}
    for axes, (title, name) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        style.plain(axes, "step", "", title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for color, (arm, histories) in zip(style.SERIES, runs.items(), strict=False):
            found = [{row["step"]: row[name] for row in history if name in row} for history in histories]
            steps = sorted(set.intersection(*(set(rows) for rows in found)))
            if not steps or (name != ACCEPTANCE and arm in ("frozen", "stale")):  # they sample what coupled does
                continue
            columns = [[rows[step] for rows in found] for step in steps]
            dashes = "--" if arm == "coupled" and name != ACCEPTANCE else "-"  # on top of off
            axes.plot(steps, [statistics.fmean(column) for column in columns], dashes, color=color, label=arm)
            axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15, linewidth=0)
        axes.legend(frameon=False, labelcolor=style.INK, loc="best")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"\nCurves: {out}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()
