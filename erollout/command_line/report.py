"""`erollout report`: a page on a run, or on several side by side."""

import argparse

from erollout.configuration.arguments import Commands


def add_command(commands: Commands) -> None:
    """Add `report`."""
    text = "write a page on a run, or on several side by side: one HTML file that needs no network"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("directories", nargs="+", metavar="RUN", help="train.output_dir of a run")
    parser.add_argument("--out", required=True, metavar="FILE", help="HTML file to write")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.report.page import write_report

    write_report(options.directories, options.out)
    print(f"wrote {options.out}")
    return 0
