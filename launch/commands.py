"""`erollout launch`: start a run on this node, on a Slurm cluster or on a Ray cluster, and look after it."""

import argparse

from erollout.launch import torchrun


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `launch` with its commands to the command line."""
    parser = commands.add_parser("launch", help="start a run with torchrun, Slurm or Ray, and look after it")
    launchers = parser.add_subparsers(dest="launcher", required=True, metavar="command")
    torchrun.add_command(launchers)
