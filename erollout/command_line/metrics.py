"""`erollout metrics`: what runs have tracked, as a table in a file."""

import argparse

from erollout.configuration.arguments import Commands


def add_command(commands: Commands) -> None:
    """Add `metrics`."""
    text = "write the tracked metrics of runs as one table: run, step, metric, value"
    parser = commands.add_parser("metrics", help=text, description=text)
    parser.add_argument(
        "--run", required=True, nargs="+", dest="directories", metavar="DIR", help="train.output_dir of a run, or of several"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write: .csv or .parquet")
    parser.set_defaults(run=_metrics)


def _metrics(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.tracking.table import write_table

    print(f"{options.out}: {write_table(options.directories, options.out):,} rows")
    return 0
