"""`erollout plot`: one figure of a run, or of several overlaid."""

import argparse

from erollout.configuration.arguments import Commands
from erollout.plots.run_figures import FIGURES, draw
from erollout.plots.style import save
from erollout.tracking.recorded_run import read_runs


def add_command(commands: Commands) -> None:
    """Add `plot`."""
    text = "draw a figure of a run, or of several runs overlaid"
    parser = commands.add_parser("plot", help=text, description=text)
    parser.add_argument(
        "--run", required=True, nargs="+", dest="directories", metavar="DIR", help="train.output_dir of a run, or of several"
    )
    parser.add_argument(
        "--figure",
        choices=FIGURES,
        default="reward",
        help="what to draw (default: reward); occupancy, decisions and boundary are of one run's rollouts, the others of steps",
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the rollout, from 1 (default: the newest)")
    parser.add_argument("--replica", type=int, default=0, metavar="R", help="replica for --figure decisions (default: 0)")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write: .png, .svg or .pdf")
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace, arguments: list[str]) -> int:
    figure = draw(options.figure, read_runs(options.directories), options.step, options.replica)
    save(figure, options.out)
    print(f"wrote {options.out}")
    return 0
